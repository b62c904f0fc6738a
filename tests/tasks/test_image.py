"""Low-resolution images are brought to the size that an upsampler works at, and a rectified flow learns two images."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from medseg_diffusion import build
from medseg_diffusion.config.generator import GeneratorConfig
from medseg_diffusion.config.load import parse_config
from medseg_diffusion.diffusion.denoiser import Clipped
from medseg_diffusion.diffusion.noise import gaussian, generators
from medseg_diffusion.sampling.loop import sample
from medseg_diffusion.tasks.image import enlarged, reduced


def test_a_low_resolution_image_is_brought_to_the_size_of_any_latent() -> None:
    low = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(enlarged(low, (8, 8)), low)
    torch.testing.assert_close(enlarged(low, (4, 4)), reduced(low, 2))  # means, not every other pixel
    assert enlarged(low, (16, 16)).shape == (2, 3, 16, 16)


@pytest.mark.slow
def test_a_rectified_flow_draws_each_of_two_images_about_as_often_as_it_saw_it() -> None:
    content = {
        "method": "pixel",
        "data": {"size": 8, "channels": 1},
        "network": {"dims": 2, "channels": 16, "channel_mult": [1, 2], "norm_groups": 8},
        "diffusion": {"schedule": {"name": "rectified-flow"}, "target": "flow", "times": "logit-normal"},
    }
    config = parse_config(content, "test")
    assert isinstance(config, GeneratorConfig)
    torch.manual_seed(0)
    model = build.generator(config, 0)
    images = torch.full((2, 1, 8, 8), -0.8)
    images[0, :, :4], images[1, :, :, :4] = 0.8, 0.8
    steps, generator = 300, torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        which = (torch.rand(32, generator=generator) < 0.7).long()
        optimizer.zero_grad()
        model({"image": images[which], "seed": torch.arange(32 * step, 32 * step + 32)}).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    denoiser, noise = Clipped(model.eval().denoiser), gaussian((1, 8, 8), generators(range(200)))
    for name, count in (("euler", 10), ("heun", 5)):
        times = build.generator_times(denoiser.schedule, name, count)
        drawn = sample(denoiser, build.sampler(name), noise, times)
        nearest, which = (drawn[:, None] - images).square().flatten(2).mean(2).sqrt().min(1)
        assert float((nearest < 0.15).float().mean()) > 0.9, name
        assert 0.5 < float(which.float().mean()) < 0.9, name
