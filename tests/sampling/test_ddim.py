"""DDIM against an independent implementation (diffusers), and its inversion."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from medseg_diffusion.diffusion.denoiser import GaussianDenoiser
from medseg_diffusion.diffusion.noise import gaussian, generators
from medseg_diffusion.diffusion.prediction import Prediction
from medseg_diffusion.sampling.ddim import DDIM
from medseg_diffusion.sampling.ddpm import DDPM
from medseg_diffusion.sampling.loop import sample, spaced
from tests.helpers.diffusion import LINEAR, normal
from tests.helpers.samplers import GRIDS, PREDICTION_TYPES, SCHEDULES, assert_same_walk, their


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("target", PREDICTION_TYPES)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_ddim_equals_diffusers(schedule, target, eta, grid) -> None:
    table, times = SCHEDULES[schedule], GRIDS[grid]
    scheduler = their(DDIMScheduler, table, target, clip_sample=False)

    def step(out: Tensor, t: int, s: int, x: Tensor, generator: torch.Generator) -> Tensor:
        # They step to t - T // N: with N = 1 and T the distance, that is s on any grid.
        scheduler.num_inference_steps = 1
        scheduler.register_to_config(num_train_timesteps=t - s)
        noise = gaussian(x.shape[1:], [generator], like=x) if eta > 0 and s > 0 else None
        return scheduler.step(out, t - 1, x, eta=eta if noise is not None else 0.0, variance_noise=noise).prev_sample

    assert_same_walk(table, DDIM(eta), target, times, step)


def test_ddim_on_diffusers_own_grid() -> None:
    """Their timesteps of 20 steps, plus 1, are our "leading" times."""
    scheduler = their(DDIMScheduler, SCHEDULES["linear"], "v", clip_sample=False)
    scheduler.set_timesteps(20)
    assert [int(t) + 1 for t in scheduler.timesteps] == GRIDS["leading"][:-1]

    def step(out: Tensor, t: int, s: int, x: Tensor, generator: torch.Generator) -> Tensor:
        return scheduler.step(out, t - 1, x).prev_sample

    assert_same_walk(SCHEDULES["linear"], DDIM(), "v", GRIDS["leading"], step)


def test_ddim_up_and_down_again_returns_the_image() -> None:
    """Encoding makes standard noise of the data; decoding undoes it, the better the finer the grid (first order)."""
    schedule = SCHEDULES["linear"]
    denoiser = GaussianDenoiser(schedule, 0.3, 0.2)
    x = 0.3 + 0.2 * gaussian((1, 100, 100), generators([0])).double()
    errors = []
    for stride in (1, 3):
        times = list(range(1, 1001, stride))
        code = sample(denoiser, DDIM(), x, times)
        assert float(code.mean()) == pytest.approx(0, abs=0.05)
        assert float(code.std()) == pytest.approx(1, abs=0.05)
        back = sample(denoiser, DDIM(), code, times[::-1])
        errors.append(float((back - x).abs().max()))
    assert errors[0] < 0.012, "0.2 is one standard deviation of the data"
    assert errors[1] == pytest.approx(3 * errors[0], rel=0.1)


def test_only_deterministic_ddim_walks_upwards() -> None:
    x, own = torch.zeros(1, 1, 2, 2), generators([0])
    with pytest.raises(ValueError, match=r"eta must be 0, got 1\.0"):
        sample(GaussianDenoiser(SCHEDULES["linear"]), DDIM(1.0), x, [100, 200], generators=own)
    with pytest.raises(ValueError, match="earlier time"):
        sample(GaussianDenoiser(SCHEDULES["linear"]), DDPM(), x, [100, 200], generators=own)


class NeverAtZero:
    """Fails when called outside 1..T."""

    def __init__(self, denoiser: GaussianDenoiser) -> None:
        self.denoiser, self.schedule = denoiser, denoiser.schedule

    def __call__(self, x_t: Tensor, t: Tensor, cond: object = None) -> Prediction:
        assert int(t.min()) >= 1 and int(t.max()) <= self.schedule.num_steps
        return self.denoiser(x_t, t)


def round_trip(count: int, mean: float, std: float, x: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """The noise and the image again: the clean image is taken for x_1, and both ways walk one grid."""
    denoiser = NeverAtZero(GaussianDenoiser(LINEAR, mean, std))
    times = spaced(LINEAR, count, "linspace")[:-1]
    assert times[-1] == 1
    noise = sample(denoiser, DDIM(), x, times[::-1])
    return noise, sample(denoiser, DDIM(), noise, times), times


def affine(mean: float, std: float, t: int, s: int) -> tuple[float, float]:
    """x_s = a x_t + b of a deterministic DDIM step with the exact denoiser."""
    ab_t, ab_s = float(LINEAR.alpha_bar[t]), float(LINEAR.alpha_bar[s])
    total = ab_t * std**2 + 1 - ab_t
    slope0, offset0 = ab_t**0.5 * std**2 / total, (1 - ab_t) * mean / total
    slope_e, offset_e = (1 - ab_t) ** 0.5 / total, -((1 - ab_t) ** 0.5) * ab_t**0.5 * mean / total
    a = ab_s**0.5 * slope0 + (1 - ab_s) ** 0.5 * slope_e
    return a, ab_s**0.5 * offset0 + (1 - ab_s) ** 0.5 * offset_e


@pytest.mark.parametrize("count", [10, 50, 200])
def test_inversion_and_sampling_are_the_product_of_their_affine_steps(count) -> None:
    mean, std = 0.3, 0.2
    x = mean + std * normal(12, 2, 1, 3, 3)
    noise, again, times = round_trip(count, mean, std, x)
    slope, offset = 1.0, 0.0
    for walk, found in ((times[::-1], noise), (times, again)):
        for t, s in pairwise(walk):
            a, b = affine(mean, std, t, s)
            slope, offset = a * slope, a * offset + b
        torch.testing.assert_close(found, slope * x + offset, rtol=0, atol=1e-10)


def test_the_round_trips_error_halves_when_the_steps_double() -> None:
    x = 0.3 + 0.2 * normal(13, 1, 1, 20, 20)
    errors = [float((round_trip(count, 0.3, 0.2, x)[1] - x).abs().mean()) for count in (250, 500, 1000)]
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2, abs=0.35)
    assert float((round_trip(1000, 0.3, 0.2, x)[1] - x).abs().max()) < 0.02
