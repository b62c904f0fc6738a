"""Trained and imported networks, loaded as they are."""

from __future__ import annotations

import pytest
import torch

from medseg_diffusion.errors import ModelError
from medseg_diffusion.models.imported import load_model
from tests.helpers.generators import QUIET

pytestmark = QUIET


def test_the_trained_network_is_at_hand(image_models) -> None:
    loaded = load_model(image_models["class"])
    out = loaded.network(torch.zeros(1, 3, 16, 16), torch.tensor([5]), torch.tensor([1]))
    assert out.shape == (1, 3, 16, 16)


def test_a_segmenter_is_not_loaded_as_a_generator() -> None:
    with pytest.raises(ModelError, match=r"hippocampus-t1: a model for 'mask', expected denoiser"):
        load_model("hippocampus-t1")
