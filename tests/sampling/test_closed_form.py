"""Every sampler follows its closed form on Gaussian data.

For Gaussian data the exact denoiser is affine in x_t, and so is every step of every sampler. The mean and variance of
what a sampler returns therefore follow from a recursion of 3 x 3 matrices, which these tests derive from the papers'
formulas without using the package.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medseg_diffusion.diffusion.denoiser import GaussianDenoiser
from medseg_diffusion.diffusion.noise import derive_seed, gaussian, generators
from medseg_diffusion.diffusion.schedule import NoiseSchedule
from medseg_diffusion.sampling.loop import sample, spaced
from tests.helpers.samplers import SAMPLERS, SCHEDULES, SPACINGS


@dataclass(frozen=True)
class Moments:
    """Mean and standard deviation of one element at the end of a walk, and its slope in the starting noise."""

    mean: float
    std: float
    slope: float


def closed_form(name: str, schedule: NoiseSchedule, times: list[int], mean: float, std: float) -> Moments:
    """The recursion: the state is (x, x0 predicted one step earlier, 1), started at x ~ N(0, 1)."""
    ab = schedule.alpha_bar.tolist()
    x, previous, one = np.eye(3)  # each quantity is a row: its linear form in the state
    centre, covariance, slope = np.array([0.0, 0.0, 1.0]), np.diag([1.0, 0.0, 0.0]), np.array([1.0, 0.0, 0.0])
    h_previous = None
    for t, s in pairwise(times):
        alpha_t, sigma_t, alpha_s, sigma_s = (math.sqrt(v) for v in (ab[t], 1 - ab[t], ab[s], 1 - ab[s]))
        # Linear regression of x0 on x_t: cov / var times the deviation from the mean of x_t.
        regression = alpha_t * std**2 / (alpha_t**2 * std**2 + sigma_t**2)
        x0 = mean * one + regression * (x - alpha_t * mean * one)
        eps = (x - alpha_t * x0) / sigma_t
        added = 0.0
        if s == 0:
            new = x0
        elif name.startswith("ddpm"):
            # Bayes: precision of x_s given x0 plus that of x_s seen through x_t = root x_s + noise.
            root = alpha_t / alpha_s
            beta = 1 - root**2
            variance = 1 / (1 / sigma_s**2 + root**2 / beta)
            new = variance * (alpha_s / sigma_s**2 * x0 + root / beta * x)
            added = beta if name == "ddpm-beta" else variance
        elif name == "heun":
            # Liu et al. 2022: z = (1 - u) x0 + u eps has the velocity eps - x0; Heun's method in z and u.
            (z, u), size = ((x / (alpha_t + sigma_t), sigma_t / (alpha_t + sigma_t)), alpha_s + sigma_s)
            u_s = sigma_s / size
            first = velocity(z, u, mean, std, one)
            second = velocity(z + (u_s - u) * first, u_s, mean, std, one)
            new = size * (z + (u_s - u) * (first + second) / 2)
        elif name.startswith("ddim"):
            # Song et al. 2020, eq. 12 and 16.
            eta = float(name.partition("-")[2] or 0)
            added = eta**2 * sigma_s**2 / sigma_t**2 * (1 - alpha_t**2 / alpha_s**2)
            new = alpha_s * x0 + math.sqrt(sigma_s**2 - added) * eps
        else:
            # Lu et al. 2022 (DPM-Solver++), algorithm 2.
            h = math.log(alpha_s / sigma_s) - (math.log(alpha_t / sigma_t) if alpha_t else -math.inf)
            data = x0
            if h_previous is not None:
                r = h_previous / h
                data = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * previous
            h_previous = h
            new = sigma_s / sigma_t * x - alpha_s * (math.exp(-h) - 1) * data
        step = np.stack([new, x0, one])
        centre, slope = step @ centre, step @ slope
        covariance = step @ covariance @ step.T + np.diag([added, 0.0, 0.0])
    return Moments(float(centre[0]), math.sqrt(float(covariance[0, 0])), float(slope[0]))


def velocity(z: np.ndarray, u: float, mean: float, std: float, one: np.ndarray) -> np.ndarray:
    """E[eps - x0 | z] of z = (1 - u) x0 + u eps, a linear form in the state."""
    spread = (1 - u) ** 2 * std**2 + u**2
    x0 = mean * one + (1 - u) * std**2 / spread * (z - (1 - u) * mean * one)
    return (z - (1 - u) * x0) / u - x0


def walk(name: str, schedule: NoiseSchedule, times: list[int], mean: float, std: float, count: int = 20000) -> Tensor:
    denoiser = GaussianDenoiser(schedule, mean, std)
    own = generators([derive_seed(name, len(times), times[0])])
    x = gaussian((1, count), own).double()
    return sample(denoiser, SAMPLERS[name], x, times, generators=own)


def assert_moments(found: Tensor, expected: Moments, errors: float = 5.0) -> None:
    """Within so many standard errors of a Gaussian's mean and standard deviation."""
    n = found.numel()
    assert float(found.mean()) == pytest.approx(expected.mean, abs=errors * expected.std / math.sqrt(n))
    assert float(found.std()) == pytest.approx(expected.std, abs=errors * expected.std / math.sqrt(2 * n))


@pytest.mark.filterwarnings("ignore:.*distinct times remain")  # a property of the grids, tested below
@pytest.mark.parametrize("how", SPACINGS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_mean_and_spread_follow_the_closed_form(name, schedule, how) -> None:
    for count, mean, std in ((4, -0.5, 1.0), (12, 0.3, 0.2)):
        times = spaced(SCHEDULES[schedule], count, how)
        expected = closed_form(name, SCHEDULES[schedule], times, mean, std)
        assert_moments(walk(name, SCHEDULES[schedule], times, mean, std), expected)


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(sorted(SAMPLERS)),
    schedule=st.sampled_from(sorted(SCHEDULES)),
    kept=st.sets(st.integers(1, 100), min_size=1, max_size=12),
    mean=st.floats(-1, 1, allow_subnormal=False),
    std=st.floats(0.05, 2),
    end=st.booleans(),
)
def test_any_decreasing_times_follow_the_closed_form(name, schedule, kept, mean, std, end) -> None:
    """Irregular grids, late starts, and walks that stop before the clean time."""
    times = [*sorted(kept, reverse=True), *([0] if end or len(kept) < 2 else [])]
    expected = closed_form(name, SCHEDULES[schedule], times, mean, std)
    assert_moments(walk(name, SCHEDULES[schedule], times, mean, std, 5000), expected, errors=6)


@pytest.mark.filterwarnings("ignore:.*distinct times remain")  # a property of the grids, tested below
@pytest.mark.parametrize("how", SPACINGS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["ddim", "dpm++", "heun"])
def test_deterministic_samplers_are_the_closed_form_exactly(name, schedule, how) -> None:
    """Without noise the result is one affine map of the start: no Monte-Carlo error hides a small mistake."""
    times = spaced(SCHEDULES[schedule], 15, how)
    expected = closed_form(name, SCHEDULES[schedule], times, 0.3, 0.2)
    start = torch.tensor([0.0, 1.0, -2.0], dtype=torch.float64).reshape(1, 1, 3)
    found = sample(GaussianDenoiser(SCHEDULES[schedule], 0.3, 0.2), SAMPLERS[name], start, times)
    torch.testing.assert_close(found, expected.mean + expected.slope * start, rtol=1e-9, atol=1e-9)


def table_times(count: int) -> list[int]:
    """Multiples of T // N, plus 1: the times of the published table."""
    return [i * (1000 // count) + 1 for i in reversed(range(count))] + [0]


@pytest.mark.filterwarnings("ignore:.*distinct times remain")  # a property of the grids, tested below
@pytest.mark.parametrize(
    ("name", "how", "stds"),
    [
        ("ddim", "leading", {10: 0.105, 20: 0.145, 50: 0.176, 200: 0.194}),
        ("ddpm", "leading", {10: 0.093, 20: 0.128, 50: 0.158, 200: 0.184}),
        ("dpm++", "leading", {10: 0.214, 20: 0.250, 50: 0.231, 200: 0.202}),
        ("dpm++", "log-snr", {10: 0.204, 20: 0.202, 50: 0.201, 200: 0.200}),
    ],
    ids=["ddim", "ddpm", "dpm++", "dpm++-log-snr"],
)
def test_the_spread_by_number_of_steps_is_the_established_table(name, how, stds) -> None:
    """Data of mean 0.3 and standard deviation 0.2, linear schedule of 1000: a wrong step shows here at once."""
    schedule = SCHEDULES["linear"]
    for count, std in stds.items():
        times = spaced(schedule, count, how)
        if how == "leading":
            assert times == table_times(count)
        else:
            assert times[-2:] == [1, 0]
        found = walk(name, schedule, times, 0.3, 0.2)
        assert float(found.std()) == pytest.approx(std, abs=0.004)
        assert float(found.mean()) == pytest.approx(0.3, abs=0.006)
        assert closed_form(name, schedule, times, 0.3, 0.2).std == pytest.approx(std, abs=0.002)


@pytest.mark.filterwarnings("ignore:.*distinct times remain")  # a property of the grids, tested below
@pytest.mark.parametrize("name", ["ddim", "dpm++", "heun"])
def test_more_steps_come_closer_to_the_data(name) -> None:
    schedule = SCHEDULES["linear"]
    errors = [abs(closed_form(name, schedule, spaced(schedule, n), 0.3, 0.2).std - 0.2) for n in (5, 20, 200)]
    assert errors[0] > errors[1] > errors[2]
    assert_moments(walk(name, schedule, spaced(schedule, 200), 0.3, 0.2), Moments(0.3, 0.2, 0), errors=20)
