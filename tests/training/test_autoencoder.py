"""The loss of an autoencoder of images: its precision and its gradients."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from medseg_diffusion.data.draws import Draws
from medseg_diffusion.networks.autoencoder import KLAutoencoder
from medseg_diffusion.training.autoencoder import (
    AutoencoderTraining,
    GradientSSIM,
    LossWeights,
    as_images,
    balance,
)
from medseg_diffusion.training.runtime import Runtime
from medseg_diffusion.training.trainer import Callbacks, TrainingOptions, TrainingRun, fit
from tests.helpers.training import resume_file


def test_the_loss_of_an_autoencoder_is_float32_under_autocast() -> None:
    """SSIM's variance is a difference of nearly equal moments: in bfloat16 the loss of flat images went to -inf."""
    torch.manual_seed(0)
    training = AutoencoderTraining(KLAutoencoder(2, 3, 3, 2, (32, 32), 1, (False, False)), GradientSSIM()).eval()
    flat = torch.linspace(-1, 1, 4).reshape(4, 1, 1, 1) + 0.01 * torch.randn(4, 3, 16, 16)
    batch = {"image": flat, "seed": torch.arange(4)}
    seen: list[torch.dtype] = []
    kept, training._perceptual[0] = training._perceptual[0], lambda a, b: (seen.append(a.dtype), kept(a, b))[1]
    with torch.no_grad():
        exact = training(batch)
        with torch.autocast("cpu", torch.bfloat16):
            half = training(batch)
    assert seen == [torch.float32, torch.float32]
    torch.testing.assert_close(half, exact, rtol=0.02, atol=0)  # what is left is the rounding of the network


@pytest.mark.parametrize("adversarial", [0.0, 0.5])
def test_whatever_asks_for_a_gradient_gets_one(adversarial) -> None:
    """Of what does not, several processes would wait for each other without end."""
    torch.manual_seed(0)
    codec = KLAutoencoder(2, 1, 1, 2, channels=(32, 32), attention_levels=(False, False))
    weights = LossWeights(adversarial=adversarial, adversarial_start=0)
    model = AutoencoderTraining(codec, GradientSSIM(), weights, 8, 1).train()
    model({"image": torch.rand(2, 1, 16, 16), "seed": torch.arange(2)}).backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    asking = [name for name, p in model.named_parameters() if p.requires_grad and name.startswith("discriminator")]
    assert bool(asking) == (adversarial > 0)


def small_training(**weights: float) -> AutoencoderTraining:
    torch.manual_seed(0)
    codec = KLAutoencoder(2, 1, 1, 2, channels=(32, 32), attention_levels=(False, False))
    return AutoencoderTraining(codec, GradientSSIM(), LossWeights(**weights), 8, 1).train()  # type: ignore[arg-type]


BATCH = {"image": torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0)), "seed": torch.arange(2)}


class Images:
    """Two images of noise."""

    def __len__(self) -> int:
        return 2

    def example(self, index: int, generator: torch.Generator) -> Mapping[str, Tensor]:
        return {"image": BATCH["image"][index]}


def test_the_discriminator_waits_for_the_start_of_the_adversarial_loss() -> None:
    model = small_training(adversarial_start=2)
    for step in range(4):
        model.zero_grad()
        model.begin_step(step)
        model(BATCH).backward()
        moved = any(bool(p.grad.any()) for p in model.discriminator.parameters() if p.grad is not None)
        assert moved == (step >= 2), step


def test_a_batch_in_parts_is_one_step(tmp_path: Path) -> None:
    """The step, at which the adversarial loss begins, is not counted once for each part."""
    options = TrainingOptions(batch_size=2, examples_at_once=1, max_steps=3, warmup_steps=0, validate_every=3)
    callbacks = Callbacks(lambda averaged: {"score": 0.0}, lambda averaged, step, numbers: None)
    model = small_training(adversarial_start=2)
    fit(model, Draws(Images(), 0), options, callbacks, TrainingRun(tmp_path), Runtime("cpu", "fp32"))
    content = resume_file(tmp_path)
    assert int(content["model"]["step"]) == int(content["ema"]["step"]) == 3
    assert {int(state["step"]) for state in content["optimizers"][1]["state"].values()} == {1}


def test_the_balance_is_that_of_the_gradients_of_both_losses() -> None:
    """Not a constant: ten times the reconstruction loss has ten times the weight, and a weak discriminator more."""
    layer = nn.Parameter(torch.tensor([1.0, 2.0]))
    reconstruction, adversarial = (layer * torch.tensor([3.0, 4.0])).sum(), (layer * torch.tensor([0.0, 0.5])).sum()
    assert float(balance(reconstruction, adversarial, layer)) == pytest.approx(10.0, rel=1e-4)
    assert float(balance(10 * reconstruction, adversarial, layer)) == pytest.approx(100.0, rel=1e-4)
    assert float(balance(reconstruction, 0 * adversarial, layer)) == 1e4


def test_the_adversarial_gradient_has_its_balanced_share_at_the_last_layer() -> None:
    """What the whole loss adds to the gradient of the reconstruction alone has 0.5 times that gradient's norm."""
    gradients = []
    for adversarial in (0.0, 0.5):
        model = small_training(adversarial=adversarial, adversarial_start=0, regularisation=0.0)
        model(BATCH).backward()
        gradient = model.autoencoder.last_layer.grad
        assert gradient is not None
        gradients.append(gradient.clone())
    alone, both = gradients
    assert float((both - alone).norm() / alone.norm()) == pytest.approx(0.5, rel=0.02)


def test_each_network_has_an_optimiser_and_a_clip_of_its_own(tmp_path: Path) -> None:
    """In the trainer: the discriminator's moments begin with its loss, and its gradient does not shrink the other's."""
    model = small_training(adversarial_start=2)
    before = [p.clone() for p in model.discriminator.parameters()]
    options = TrainingOptions(batch_size=2, max_steps=3, warmup_steps=0, validate_every=3, gradient_clip=1e-3)
    draws = Draws(Images(), 0)
    callbacks = Callbacks(lambda averaged: {"score": 0.0}, lambda averaged, step, numbers: None)
    fit(model, draws, options, callbacks, TrainingRun(tmp_path), Runtime("cpu", "fp32"))
    content = resume_file(tmp_path)
    first, second = content["optimizers"]
    assert {int(state["step"]) for state in first["state"].values()} == {3}
    assert {int(state["step"]) for state in second["state"].values()} == {1}, "the first two steps had no such loss"
    assert any(not torch.equal(a, b) for a, b in zip(before, model.discriminator.parameters(), strict=True))
    for moments, parts in ((second, 1), (first, 3)):
        # Adam's first moment is 0.1 of the clipped gradients; that of one step has the norm of the clip.
        norm = sum(float(state["exp_avg"].square().sum()) for state in moments["state"].values()) ** 0.5
        assert 0 < norm <= 1.001e-3 * (1 - 0.9**parts)


def test_networks_for_images_see_a_volume_as_slices_in_three_planes() -> None:
    """At random positions, which are those of a seed; each slice is one of the volume's."""
    volume = torch.arange(2 * 4 * 5 * 6, dtype=torch.float32).reshape(2, 1, 4, 5, 6)
    slices = as_images(volume, 2, seed=3)
    assert [tuple(part.shape) for part in slices] == [(4, 1, 5, 6), (4, 1, 4, 6), (4, 1, 4, 5)]
    for axis, part in zip((2, 3, 4), slices, strict=True):
        own = [plane for one in volume for plane in one.movedim(axis - 1, 1)[0]]
        assert all(any(torch.equal(image[0], plane) for plane in own) for image in part)
        first, second = part[:2], part[2:]
        assert torch.equal(second - first, torch.full_like(first, 4 * 5 * 6))  # the same positions of both volumes
    again, other = as_images(volume, 2, seed=3), as_images(volume, 2, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(slices, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(slices, other, strict=True))
    assert [len(part) for part in as_images(volume, 99, seed=0)] == [8, 10, 12]
    image = volume[:, :, 0]
    assert as_images(image, 2, seed=0)[0] is image


@pytest.mark.parametrize("start", [0, 9])
def test_an_autoencoder_of_volumes_learns_from_slices(start: int) -> None:
    """Every parameter gets a gradient, and the discriminator one when its time has come."""
    torch.manual_seed(0)
    codec = KLAutoencoder(3, 1, 1, 2, (8, 8), 1, (False, False), norm_groups=4, middle_attention=False)
    model = AutoencoderTraining(codec, GradientSSIM(), LossWeights(adversarial_start=start), 8, 1, slices=2).train()
    model.begin_step(0)
    loss = model({"image": torch.rand(2, 1, 16, 16, 24) * 2 - 1, "seed": torch.arange(2)})
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is not None and bool(p.grad.any()) for p in codec.parameters() if p.ndim > 1)
    assert any(bool(p.grad.any()) for p in model.discriminator.parameters()) == (start == 0)
