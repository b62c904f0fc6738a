"""A restored generator uses its condition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from medseg_diffusion.config.generator import GeneratorConfig
from medseg_diffusion.diffusion.denoiser import NetworkDenoiser
from medseg_diffusion.diffusion.guidance import ClassifierGradient
from medseg_diffusion.diffusion.noise import NoiseSource, gaussian, generators
from medseg_diffusion.diffusion.objective import Simple
from medseg_diffusion.diffusion.schedule import NoiseSchedule, linear
from medseg_diffusion.models.generator import Generator, restore_generator
from medseg_diffusion.models.store import load_model_files
from medseg_diffusion.tasks.image import ImageDiffusion
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


@pytest.mark.parametrize(("sampler", "draws"), [("ddim", 1), ("ddpm", 3)])
def test_all_noise_of_a_sample_is_of_the_kind_that_the_model_was_trained_with(
    sampler: str, draws: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """White noise added to smooth noise would be an input that the network has never seen."""
    config = GeneratorConfig.model_validate({"method": "pixel", "data": {"size": 8}, "diffusion": {"noise": "simplex"}})
    asked: list[str] = []

    def source(name: str) -> NoiseSource:
        def noise(*arguments: object) -> Tensor:
            asked.append(name)
            return gaussian(*arguments)  # type: ignore[arg-type]

        return noise

    monkeypatch.setattr("medseg_diffusion.build.noise_source", source)
    task = ImageDiffusion(NetworkDenoiser(Constant(), linear(1000), "x0"), Simple())
    Generator(task.requires_grad_(False), config, (1, 4, 4), None).sample([0], sampler, 3)
    assert asked == ["simplex"] * draws


class Constant(nn.Module):
    """Predicts x0 = 2 everywhere, beyond the range of pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor, timesteps: Tensor, cond: object = None) -> Tensor:
        return self.value.expand_as(x)


def logits(x_t: Tensor, timesteps: Tensor) -> Tensor:
    """A classifier of two classes; the sum of the pixels speaks against the first."""
    return torch.stack([-x_t.flatten(1).sum(1), torch.zeros(len(x_t))], dim=1)


@pytest.mark.parametrize("clip_first", [False, True])
def test_guidance_works_on_the_unclipped_prediction_unless_the_flag_is_set(clip_first: bool) -> None:
    """One step from T = 1, by hand: guidance subtracts from x0 = 2; clipped before it, less is left."""
    schedule = NoiseSchedule(torch.tensor([1.0, 0.5], dtype=torch.float64))
    config = GeneratorConfig.model_validate({"method": "pixel", "data": {"size": 8}})
    task = ImageDiffusion(NetworkDenoiser(Constant(), schedule, "x0"), Simple())
    gradient = ClassifierGradient(logits, torch.zeros(1, dtype=torch.int64), 1.5)
    generator = Generator(task.requires_grad_(False), config, (1, 1, 1), None)
    found = generator.sample([0], "ddim", 1, classifier=gradient, clip_first=clip_first)
    x_t = gaussian((1, 1, 1), generators([0]))
    p = float(logits(x_t, torch.zeros(1)).softmax(1)[0, 1])  # the gradient of log p(0) is -p(1)
    moved = (1.0 if clip_first else 2.0) - 1.5 * p * 0.5 / 0.5**0.5  # sigma^2 / alpha times the gradient
    torch.testing.assert_close(found, torch.full_like(found, min(1.0, moved)))
    assert (moved < 1) == clip_first
