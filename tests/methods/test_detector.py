"""What all detectors share: reproducible maps, counted evaluations, refused settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

from medseg_diffusion.diffusion.denoiser import Denoiser, GaussianDenoiser, NetworkDenoiser
from medseg_diffusion.diffusion.noise import gaussian
from medseg_diffusion.methods.counterfactual import ClassifierCounterfactual, FreeCounterfactual
from medseg_diffusion.methods.detector import Detector, residual
from medseg_diffusion.methods.partial_noise import PartialNoise
from medseg_diffusion.methods.patched import Patched
from medseg_diffusion.sampling.loop import spread
from medseg_diffusion.tasks.patched import PatchedDiffusion
from tests.helpers.diffusion import LINEAR, normal
from tests.helpers.gaussian_walks import LABEL, MEAN, NORMAL, NULL, SHAPES, STD, Spy, classifier, no_noise


class Small(nn.Module):
    """A convolution that knows the time and the class; the same for 2D and 3D."""

    def __init__(self, channels: int, dims: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        kind = nn.Conv2d if dims == 2 else nn.Conv3d
        self.conv = kind(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, timesteps: Tensor, cond: Mapping[str, Tensor] | None = None) -> Tensor:
        shift = timesteps / 1000 + (cond["label"] if cond else 0)
        return torch.sin(self.conv(x) + shift.reshape(-1, *[1] * (x.ndim - 1)))


def small_classifier(x_t: Tensor, timesteps: Tensor) -> Tensor:
    value = (x_t.flatten(1).tanh().mean(1) + timesteps / 1000)[:, None]
    return torch.cat([value, value.square()], dim=1)


def test_a_bright_residual_is_the_positive_part_of_the_difference() -> None:
    image, healthy = normal(1, 2, 3, 5, 5), normal(2, 2, 3, 5, 5)
    bright, dark = residual(image, healthy, "bright"), residual(-image, -healthy, "bright")
    torch.testing.assert_close(bright - dark, (image - healthy).mean(1, keepdim=True))
    torch.testing.assert_close(bright + dark, residual(image, healthy))


MAKERS: dict[str, Callable[[Denoiser, tuple[int, ...]], Detector]] = {
    "partial noise": lambda denoiser, size: PartialNoise(denoiser, gaussian, start=300, steps=6),
    "partial noise, 3 draws": lambda denoiser, size: PartialNoise(denoiser, gaussian, start=300, steps=4, draws=3),
    "patched": lambda denoiser, size: Patched(denoiser, gaussian, size),
    "patched, overlapping": lambda denoiser, size: Patched(denoiser, gaussian, size, time=200, patch=3),
    "patched, 3 draws": lambda denoiser, size: Patched(denoiser, gaussian, size, draws=3),
    "classifier": lambda denoiser, size: ClassifierCounterfactual(denoiser, small_classifier, steps=5, scale=9.0),
    "classifier, scale 0": lambda denoiser, size: ClassifierCounterfactual(
        denoiser, small_classifier, steps=5, scale=0
    ),
    "free": lambda denoiser, size: FreeCounterfactual(denoiser, LABEL, NULL, steps=5),
    "free, strength 1": lambda denoiser, size: FreeCounterfactual(denoiser, LABEL, NULL, steps=5, guidance=1.0),
    "free, strength 0": lambda denoiser, size: FreeCounterfactual(denoiser, LABEL, NULL, steps=5, guidance=0.0),
}
RANDOM = {name for name in MAKERS if name.startswith("pa")}
CALLS = {
    "partial noise": lambda dims: 6,
    "partial noise, 3 draws": lambda dims: 12,
    "patched": lambda dims: 2**dims,
    "patched, overlapping": lambda dims: {2: 2 * 3, 3: 2 * 2 * 2}[dims],
    "patched, 3 draws": lambda dims: 3 * 2**dims,
    "classifier": lambda dims: 10,
    "classifier, scale 0": lambda dims: 10,
    "free": lambda dims: 15,
    "free, strength 1": lambda dims: 10,
    "free, strength 0": lambda dims: 15,
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", MAKERS)
def test_a_map_depends_on_its_image_and_seed_alone(name, shape) -> None:
    images = 0.5 * normal(0, 3, *shape).float().clamp(-2, 2)
    denoiser = NetworkDenoiser(Small(shape[0], len(shape) - 1), LINEAR, "v")
    detector = MAKERS[name](denoiser, shape[1:])
    maps = detector.score(images, [7, 8, 9])
    assert maps.shape == (3, 1, *shape[1:]) and float(maps.min()) >= 0 and float(maps.std()) > 0
    assert not maps.requires_grad
    for i in (2, 0, 1):
        torch.testing.assert_close(detector.score(images[i : i + 1], [7 + i])[0], maps[i], rtol=0, atol=1e-5)
    torch.testing.assert_close(detector.score(images, [7, 8, 9]), maps, rtol=0, atol=0)
    other = (detector.score(images, [7, 18, 9]) - maps).abs().amax(dim=tuple(range(1, maps.ndim)))
    assert (other > 1e-3).tolist() == [False, name in RANDOM, False], "a seed is that of its image"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", MAKERS)
def test_evaluations_are_the_calls_for_each_image(name, shape) -> None:
    spy = Spy(NetworkDenoiser(Small(shape[0], len(shape) - 1), LINEAR, "v"))
    detector = MAKERS[name](spy, shape[1:])
    detector.score(torch.zeros(2, *shape), [1, 2])
    assert sum(len(x) for x in spy.inputs) == 2 * detector.evaluations
    assert detector.evaluations == CALLS[name](len(shape) - 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PartialNoise(NORMAL, gaussian, start=1001), "steps <= start <= 1000, got 25 steps from 1001"),
        (lambda: PartialNoise(NORMAL, gaussian, start=0), "got 25 steps from 0"),
        (lambda: PartialNoise(NORMAL, gaussian, steps=0), "got 0 steps from 250"),
        (lambda: PartialNoise(NORMAL, gaussian, draws=0), "at least one draw of noise is needed, got 0"),
        (lambda: Patched(NORMAL, gaussian, (8, 8), time=0), r"the time must lie in 1\.\.1000, got 0"),
        (lambda: Patched(NORMAL, gaussian, (8, 8), time=1001), r"the time must lie in 1\.\.1000, got 1001"),
        (lambda: Patched(NORMAL, gaussian, (8, 8), draws=0), "at least one draw of noise is needed, got 0"),
        (lambda: Patched(NORMAL, gaussian, (8, 6), patch=7), r"image of \(8, 6\) must have a side of 1 to 6, got 7"),
        (lambda: Patched(NORMAL, gaussian, (8, 6), patch=0), "must have a side of 1 to 6, got 0"),
        (
            lambda: Patched(NORMAL, gaussian, (8, 6)).score(torch.zeros(1, 1, 6, 8), [0]),
            r"made for images of \(8, 6\), got \(6, 8\)",
        ),
        (
            lambda: ClassifierCounterfactual(NORMAL, classifier, start=1001),
            "steps < start <= 1000, got 50 steps up to 1001",
        ),
        (lambda: ClassifierCounterfactual(NORMAL, classifier, steps=0), "got 0 steps up to 500"),
        (lambda: FreeCounterfactual(NORMAL, LABEL, NULL, start=-1), "got 50 steps up to -1"),
        (lambda: FreeCounterfactual(NORMAL, LABEL, NULL, start=9, steps=9), "got 9 steps up to 9"),
        (lambda: spread(LINEAR, 3, 2), "count <= start <= 1000, got 3 times from 2"),
        (
            lambda: PatchedDiffusion(NetworkDenoiser(nn.Identity(), LINEAR, "eps"), gaussian),
            "a restorer of patches predicts x0, not eps",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(make, message) -> None:
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_draws_of_patches_are_different() -> None:
    x = torch.full((500, 1, 1, 1), MEAN).double()
    one, four = (Patched(NORMAL, gaussian, (1, 1), draws=n).healthy(x, range(500)).std() for n in (1, 4))
    assert float(one / four) == pytest.approx(2, abs=0.3)


def test_predictions_of_partial_noise_and_patches_are_clipped() -> None:
    far, x = GaussianDenoiser(LINEAR, 3.0, STD), torch.full((1, 1, 4, 4), 0.9).double()
    for detector in (PartialNoise(far, no_noise), Patched(far, no_noise, (4, 4))):
        torch.testing.assert_close(detector.healthy(x, [0]), torch.ones_like(x), rtol=0, atol=0)
