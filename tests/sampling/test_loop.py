"""Samplers against closed forms, published numbers and an independent implementation (diffusers).

For Gaussian data the exact denoiser is affine in x_t, and so is every step of every sampler. The mean and variance of
what a sampler returns therefore follow from a recursion of 3 x 3 matrices, which these tests derive from the papers'
formulas without using the package.
"""

from __future__ import annotations

import hashlib
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from medseg_diffusion.diffusion.denoiser import GaussianDenoiser, NetworkDenoiser
from medseg_diffusion.diffusion.noise import derive_seed, gaussian, generators
from medseg_diffusion.diffusion.prediction import Prediction
from medseg_diffusion.diffusion.schedule import NoiseSchedule, cosine, linear, scaled_linear, sigmoid
from medseg_diffusion.networks.unet import UNet
from medseg_diffusion.sampling.ddim import DDIM
from medseg_diffusion.sampling.ddpm import DDPM
from medseg_diffusion.sampling.dpm_solver import DPMSolver
from medseg_diffusion.sampling.loop import Sampler, sample, spaced

SCHEDULES = {"linear": linear(1000), "linear-100": linear(100), "cosine": cosine(1000), "scaled": scaled_linear(1000)}
SAMPLERS: dict[str, Sampler] = {
    "ddpm": DDPM(),
    "ddpm-beta": DDPM("beta"),
    "ddim": DDIM(),
    "ddim-0.5": DDIM(0.5),
    "ddim-1": DDIM(1.0),
    "dpm++": DPMSolver(),
}
SPACINGS = ["log-snr", "trailing", "leading", "linspace"]


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
        elif name.startswith("ddim"):
            # Song et al. 2020, eq. 12 and 16.
            eta = float(name.partition("-")[2] or 0)
            added = eta**2 * sigma_s**2 / sigma_t**2 * (1 - alpha_t**2 / alpha_s**2)
            new = alpha_s * x0 + math.sqrt(sigma_s**2 - added) * eps
        else:
            # Lu et al. 2022 (DPM-Solver++), algorithm 2.
            h = math.log(alpha_s / sigma_s) - math.log(alpha_t / sigma_t)
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


# ---- closed forms ----------------------------------------------------------------------------------------------------


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
@pytest.mark.parametrize("name", ["ddim", "dpm++"])
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
@pytest.mark.parametrize("name", ["ddim", "dpm++"])
def test_more_steps_come_closer_to_the_data(name) -> None:
    schedule = SCHEDULES["linear"]
    errors = [abs(closed_form(name, schedule, spaced(schedule, n), 0.3, 0.2).std - 0.2) for n in (5, 20, 200)]
    assert errors[0] > errors[1] > errors[2]
    assert_moments(walk(name, schedule, spaced(schedule, 200), 0.3, 0.2), Moments(0.3, 0.2, 0), errors=20)


# ---- an independent implementation -----------------------------------------------------------------------------------

PREDICTION_TYPES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
GRIDS = {
    "leading": spaced(SCHEDULES["linear"], 20, "leading"),
    "log-snr": spaced(SCHEDULES["linear"], 12),
    "irregular": [1000, 990, 640, 333, 332, 60, 7, 1, 0],
}


class Wave(nn.Module):
    """A bounded network that is nonlinear in x_t and depends on time."""

    def forward(self, x: Tensor, timesteps: Tensor, cond: object = None) -> Tensor:
        return torch.sin(3 * x + 0.01 * timesteps[0]) + 0.1 * x.tanh().mean()


def their(kind: Any, schedule: NoiseSchedule, target: str, **options: Any) -> Any:
    """A diffusers scheduler whose table is ours: their index i is our time i + 1."""
    scheduler = kind(num_train_timesteps=1000, prediction_type=PREDICTION_TYPES[target], **options)
    scheduler.alphas_cumprod = schedule.alpha_bar[1:].clone()
    scheduler.one = torch.ones((), dtype=torch.float64)
    scheduler.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    return scheduler


def assert_same_walk(
    schedule: NoiseSchedule,
    sampler: Sampler,
    target: Any,
    times: list[int],
    their_step: Callable[[Tensor, int, int, Tensor, torch.Generator], Tensor],
) -> None:
    """Steps both from the same x_t, down our walk, with the same noise."""
    denoiser = NetworkDenoiser(Wave(), schedule, target)
    own, other = generators([1, 1])
    x = gaussian((2, 8, 8), generators([0])).double()
    step = sampler.begin()
    for t, s in pairwise(times):
        prediction = denoiser(x, torch.tensor([t]))
        ours = step(schedule, prediction, x, t, s, partial(gaussian, x.shape[1:], [own], like=x))
        theirs = their_step(denoiser.network(x, torch.tensor([t - 1])), t, s, x, other)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        x = ours


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("target", PREDICTION_TYPES)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(("variance", "theirs"), [("posterior", "fixed_small"), ("beta", "fixed_large")])
def test_ancestral_sampling_equals_diffusers(variance, theirs, schedule, target, grid) -> None:
    table, times = SCHEDULES[schedule], GRIDS[grid]
    scheduler = their(DDPMScheduler, table, target, clip_sample=False, variance_type=theirs)
    scheduler.set_timesteps(timesteps=[t - 1 for t in times[:-1]])

    def step(out: Tensor, t: int, s: int, x: Tensor, generator: torch.Generator) -> Tensor:
        return scheduler.step(out, t - 1, x, generator=generator).prev_sample

    assert_same_walk(table, DDPM(variance), target, times, step)


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


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("target", PREDICTION_TYPES)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_dpm_solver_equals_diffusers(schedule, target, grid) -> None:
    table, times = SCHEDULES[schedule], GRIDS[grid]
    scheduler = their(
        DPMSolverMultistepScheduler,
        table,
        target,
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        lower_order_final=True,
        final_sigmas_type="zero",
    )
    scheduler.alphas_cumprod = table.alpha_bar[1:].numpy()
    scheduler.set_timesteps(timesteps=[t - 1 for t in times[:-1]])
    ab = table.alpha_bar[times]
    scheduler.sigmas = ((1 - ab) / ab).sqrt()  # theirs are rounded to float32

    def step(out: Tensor, t: int, s: int, x: Tensor, generator: torch.Generator) -> Tensor:
        return scheduler.step(out, t - 1, x).prev_sample.double()

    assert_same_walk(table, DPMSolver(), target, times, step)


# ---- times -----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(
    num_steps=st.integers(21, 1000),
    count=st.integers(1, 60),
    how=st.sampled_from(SPACINGS),
    kind=st.sampled_from([linear, cosine, sigmoid]),
    share=st.floats(0.05, 1),
)
def test_times_decrease_to_the_clean_one(num_steps, count, how, kind, share) -> None:
    schedule, start = kind(num_steps), max(1, round(share * num_steps))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        times = spaced(schedule, count, how, start)
    assert times[-1] == 0 and len(times) <= count + 1
    assert all(t > s for t, s in pairwise(times))
    assert times[0] <= start
    if how != "leading":
        assert times[0] == start


def test_the_spacings_by_hand() -> None:
    schedule = linear(100)
    assert spaced(schedule, 4, "trailing") == [100, 75, 50, 25, 0]
    assert spaced(schedule, 4, "leading") == [76, 51, 26, 1, 0]
    assert spaced(schedule, 4, "linspace") == [100, 67, 34, 1, 0]
    assert spaced(schedule, 1) == [100, 0]
    for how in SPACINGS:
        assert spaced(schedule, 100, how) == list(range(100, -1, -1)), "as many calls as times visit every one"
        assert spaced(schedule, 40, how, start=40) == list(range(40, -1, -1))
    assert spaced(schedule, 4, "trailing", start=40) == [40, 30, 20, 10, 0]


def test_log_snr_times_are_even_in_log_snr() -> None:
    schedule = linear(1000)
    times = spaced(schedule, 8)
    gaps = schedule.half_log_snr()[times[:-1]].diff()
    even = (schedule.half_log_snr()[1] - schedule.half_log_snr()[1000]) / 7
    torch.testing.assert_close(gaps, even.expand(7), rtol=0.15, atol=0)


@pytest.mark.parametrize(("how", "count"), [("log-snr", 45), ("trailing", 60), ("linspace", 60), ("leading", 60)])
def test_times_that_coincide_are_removed_with_a_warning_that_counts_them(how, count) -> None:
    with pytest.warns(UserWarning, match=rf"{count} steps asked for, but only \d+ distinct") as caught:
        times = spaced(linear(50), count, how)
    [warning] = caught
    assert f"only {len(times) - 1} distinct" in str(warning.message)
    assert len(set(times)) == len(times)


@pytest.mark.parametrize(
    ("count", "start", "message"), [(0, None, "at least one step"), (5, 0, "in 1..100"), (5, 101, "in 1..100")]
)
def test_impossible_times_are_refused(count, start, message) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        spaced(linear(100), count, "trailing", start)


# ---- the walk --------------------------------------------------------------------------------------------------------


def test_the_last_step_returns_the_predicted_image() -> None:
    """At t = 0 there is no noise left to extrapolate through: every sampler returns x0, without noise."""
    schedule = SCHEDULES["linear"]
    for name, sampler in SAMPLERS.items():
        seen: list[tuple[int, Tensor, Prediction]] = []
        x = gaussian((1, 6, 6), generators([0, 1]))
        out = sample(
            NetworkDenoiser(Wave(), schedule, "v"),
            sampler,
            x,
            [900, 400, 40, 0],
            generators=generators([2, 3]),
            on_step=lambda *step: seen.append(step),  # noqa: B023
        )
        assert [s for s, _, _ in seen] == [400, 40, 0], name
        torch.testing.assert_close(out, seen[-1][2].x0, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(out, seen[-1][1], rtol=0, atol=0)
        assert not torch.equal(seen[0][1], seen[0][2].x0)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("spatial", [(9, 7), (5, 4, 3)], ids=["2D", "3D"])
def test_an_element_is_the_same_in_any_batch(name, spatial) -> None:
    schedule = SCHEDULES["cosine"]

    def run(seeds: list[int]) -> Tensor:
        own = generators(seeds)
        x = gaussian((2, *spatial), own)
        return sample(GaussianDenoiser(schedule, 0.1, 0.5), SAMPLERS[name], x, spaced(schedule, 6), generators=own)

    together = run([11, 12, 13, 14])
    assert torch.equal(together[2:3], run([13]))
    assert torch.equal(together[[3, 0]], run([14, 11]))
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_network_gives_an_element_the_same_result_in_any_batch(name) -> None:
    """Kernels may sum in another order for another batch; the noise may not differ at all."""
    torch.manual_seed(0)
    network = UNet(2, 1, 1, channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_factors=(2,))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    denoiser = NetworkDenoiser(network.eval(), SCHEDULES["cosine"], "v")

    def run(seeds: list[int]) -> Tensor:
        own = generators(seeds)
        x = gaussian((1, 16, 16), own)
        return sample(denoiser, SAMPLERS[name], x, spaced(SCHEDULES["cosine"], 8), generators=own)

    together = run([11, 12, 13, 14, 15])
    torch.testing.assert_close(run([13]), together[2:3], rtol=0, atol=1e-4)
    torch.testing.assert_close(run([15, 11]), together[[4, 0]], rtol=0, atol=1e-4)


def test_half_precision_leaves_the_schedule_alone() -> None:
    """A table rounded to bfloat16 has alpha_bar = 1 for many times: sigma is then 0 and eps infinite."""
    schedule = linear(1000)
    before = schedule.alpha_bar.clone()
    network = UNet(2, 1, 1, channels=32, channel_mult=(1,), num_res_blocks=1)
    denoiser = NetworkDenoiser(network, schedule, "v").to(torch.bfloat16)
    own = generators([0, 1])
    with torch.autocast("cpu", torch.bfloat16):
        for sampler in SAMPLERS.values():
            out = sample(denoiser, sampler, gaussian((1, 8, 8), own), [1000, 500, 2, 1, 0], generators=own)
            assert out.dtype == torch.float32 and out.isfinite().all()
    assert next(network.parameters()).dtype == torch.bfloat16
    assert denoiser.schedule.alpha_bar.dtype == torch.float64
    assert torch.equal(denoiser.schedule.alpha_bar, before)
    alpha, sigma = denoiser.schedule.scales(1, torch.zeros(1, 1, 8, 8, dtype=torch.float32))
    torch.testing.assert_close((alpha**2 + sigma**2).flatten(), torch.ones(1), rtol=0, atol=1e-6)
    assert float(sigma) == pytest.approx(math.sqrt(1e-4), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_walk_keeps_the_type_of_its_start(dtype) -> None:
    for name, sampler in SAMPLERS.items():
        own = generators([0])
        x = torch.zeros(1, 1, 4, 4, dtype=dtype)
        out = sample(GaussianDenoiser(SCHEDULES["linear"]), sampler, x, [500, 100, 0], generators=own)
        assert out.dtype == dtype, name


def test_multistep_history_does_not_outlive_a_walk() -> None:
    sampler, x = DPMSolver(), gaussian((1, 5, 5), generators([0]))
    denoiser = NetworkDenoiser(Wave(), SCHEDULES["linear"], "x0")
    first = sample(denoiser, sampler, x, [1000, 500, 100, 0])
    sample(denoiser, sampler, x, [800, 30])
    assert torch.equal(sample(denoiser, sampler, x, [1000, 500, 100, 0]), first)


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("name", ["ddpm", "ddpm-beta", "ddim-0.5"])
def test_a_stochastic_sampler_needs_a_generator_for_every_element(name, count) -> None:
    denoiser, x, own = GaussianDenoiser(SCHEDULES["linear"]), torch.zeros(2, 1, 3, 3), generators(range(count))
    with pytest.raises(ValueError, match=f"2 generators are needed, got {count}"):
        sample(denoiser, SAMPLERS[name], x, [500, 100, 0], generators=own)


@pytest.mark.parametrize("times", [[], [500], [500, 500, 0], [500, 600, 0], [0, 5, 3]])
def test_times_that_go_to_and_fro_are_refused(times) -> None:
    with pytest.raises(ValueError, match="strictly monotone and at least two"):
        sample(GaussianDenoiser(SCHEDULES["linear"]), DDIM(), torch.zeros(1, 1, 2, 2), times)


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


def test_the_condition_reaches_every_call_unchanged() -> None:
    calls: list[object] = []

    class Recorder(Wave):
        def forward(self, x: Tensor, timesteps: Tensor, cond: object = None) -> Tensor:
            calls.append(cond)
            return super().forward(x, timesteps)

    cond = {"concat": torch.ones(1, 1, 2, 2)}
    sample(NetworkDenoiser(Recorder(), SCHEDULES["linear"], "x0"), DDIM(), torch.zeros(1, 1, 2, 2), [9, 5, 0], cond)
    assert len(calls) == 2 and all(call is cond for call in calls)


def test_no_gradients_are_kept_while_sampling() -> None:
    network = nn.Conv2d(1, 1, 1)

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor, timesteps: Tensor, cond: object = None) -> Tensor:
            return self.network(x)

    denoiser = NetworkDenoiser(Wrapped(), SCHEDULES["linear"], "x0")
    assert not sample(denoiser, DDIM(), torch.zeros(1, 1, 2, 2), [9, 5, 0]).requires_grad


# ---- noise -----------------------------------------------------------------------------------------------------------


def test_seeds_depend_on_every_part_and_on_nothing_else() -> None:
    assert derive_seed(0, "case", 1) == derive_seed(0, "case", 1)
    parts: list[tuple[int | str, ...]] = [
        (0, "case", 1),
        (1, "case", 1),
        (0, "case", 2),
        (0, "case1"),
        (0, "case", "1"),
        ("0", "case", 1),
    ]
    assert len({derive_seed(*p) for p in parts}) == len(parts)
    assert all(0 <= derive_seed(*p) < 2**63 for p in parts)
    # The value is a contract: another one would change every result that was ever published with a seed.
    text = "int:0\x1fstr:case\x1fint:1"
    assert derive_seed(0, "case", 1) == int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) // 2


def test_noise_is_standard_normal_and_belongs_to_its_element() -> None:
    noise = gaussian((3, 100, 100), generators([5, 6]))
    assert noise.shape == (2, 3, 100, 100) and noise.dtype == torch.float32
    assert float(noise.mean()) == pytest.approx(0, abs=0.02)
    assert float(noise.std()) == pytest.approx(1, abs=0.02)
    assert torch.equal(gaussian((3, 100, 100), generators([6]))[0], noise[1])
    assert gaussian((2, 2), generators([0]), like=torch.zeros(1, dtype=torch.float64)).dtype == torch.float64


def test_log_snr_wastes_no_steps_in_pure_noise() -> None:
    """The clipped last betas of the cosine schedule stretch lambda to -10; no more than the first step lies there."""
    schedule = SCHEDULES["cosine"]
    times = spaced(schedule, 10)
    assert times[0] == schedule.num_steps
    below = [t for t in times[:-1] if float(schedule.half_log_snr()[t]) < -5.2]
    assert below == [schedule.num_steps]
