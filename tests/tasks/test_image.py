"""What conditions a generator of images, at the size that the network works at; a rectified flow learns two images."""

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
from medseg_diffusion.tasks.image import ImageDiffusion, class_shares, enlarged, reduced


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


def test_a_mask_is_the_share_of_each_class_in_each_cell() -> None:
    mask = torch.tensor([[[0, 2, 1, 1], [0, 0, 1, 1]]])
    assert torch.equal(class_shares(mask, 3, (2, 4)).argmax(1), mask)
    shares = class_shares(mask, 3, (1, 2))
    assert torch.equal(shares, torch.tensor([[[[0.75, 0.0]], [[0.0, 1.0]], [[0.25, 0.0]]]]))


def test_no_mask_is_no_mask_of_background_alone() -> None:
    empty, none = torch.zeros(1, 4, 4, dtype=torch.long), torch.full((1, 4, 4), 2)
    assert float(class_shares(empty, 2, (2, 2))[:, 0].min()) == 1
    assert not class_shares(none, 2, (2, 2)).any()


def masked_task(dims: int, latent: bool) -> ImageDiffusion:
    """A generator of masks of two classes, on a side of 8, with weights that are not 0 anywhere."""
    torch.manual_seed(0)
    size = 8 if dims == 2 else (8, 8, 8)
    section = {"dims": dims, "channels": 8, "channel_mult": [1], "norm_groups": 4}
    stage = {"autoencoder": "autoencoder-tiny-imagenet-small"} if latent else {}
    config = GeneratorConfig.model_validate(
        {
            "method": "latent" if latent else "pixel",
            "data": {"size": size, "channels": 1, "labels": ["a"]},
            "network": section,
            "condition": {"mask": True, "drop": 0.5},
            **stage,
        }
    )
    task = build.generator(config, 0, 2 if latent else None, 2)
    assert isinstance(task, ImageDiffusion)
    for parameter in task.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return task


@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize("dims", [2, 3])
def test_a_mask_reaches_the_network_and_a_dropped_one_does_not(dims: int, latent: bool) -> None:
    """Two masks give two predictions; examples that lose their mask have the same loss whatever it was."""
    task = masked_task(dims, latent)
    x0 = torch.randn(2, 2 if latent else 1, *[4 if latent else 8] * dims)
    one, other = torch.zeros(2, *[8] * dims, dtype=torch.uint8), torch.ones(2, *[8] * dims, dtype=torch.uint8)
    batch = {"image": x0, "label": torch.zeros(2, dtype=torch.long), "seed": torch.tensor([1, 2])}

    def loss(mask: torch.Tensor, drop: float) -> float:
        task.drop = drop
        return task.train()({**batch, "mask": mask}).item()

    assert loss(one, 0.0) != loss(other, 0.0)
    assert loss(one, 1.0) == loss(other, 1.0) != loss(one, 0.0)
    assert task.eval()({**batch, "mask": one}).item() == loss(one, 0.0), "validation drops nothing"
    null = task.null(x0)["concat"]
    assert not null.any() and torch.equal(null, task.condition(size=x0.shape[2:], mask=task.no_mask(x0[:1]))["concat"])


def test_a_model_of_masks_needs_one_or_none_said() -> None:
    with pytest.raises(ValueError, match="conditioned by masks"):
        masked_task(2, latent=False).condition(size=(8, 8))
