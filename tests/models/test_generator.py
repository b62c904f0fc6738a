"""A restored generator uses its condition."""

from __future__ import annotations

import torch

from medseg_diffusion.models.generator import restore_generator
from medseg_diffusion.models.store import load_model_files
from tests.helpers.generators import QUIET

pytestmark = QUIET


def test_an_upsampler_of_latents_sees_the_low_resolution_image(image_models) -> None:
    found = restore_generator(load_model_files(image_models["latent-upsampler"]))
    assert found.shape == (2, 8, 8) and found.codec is not None
    with torch.no_grad():  # the last layer starts at zero: two steps of training hardly use the condition
        for parameter in found.task.network.parameters():
            parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    dark, bright = (found.sample([0], "ddim", 2, low=torch.full((1, 3, 8, 8), value)) for value in (-1.0, 1.0))
    assert dark.shape == (1, 3, 16, 16) and not torch.allclose(dark, bright)
