"""Euler's and Heun's methods for rectified flow: their orders, straight paths, and equality with diffusers."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from torch import Tensor

from medseg_diffusion import build
from medseg_diffusion.diffusion.denoiser import Clipped, GaussianDenoiser, NetworkDenoiser
from medseg_diffusion.diffusion.noise import gaussian, generators
from medseg_diffusion.diffusion.prediction import Prediction
from medseg_diffusion.sampling.heun import Heun
from medseg_diffusion.sampling.loop import Sampler, sample, spaced, spread
from tests.helpers.diffusion import FLOW, normal
from tests.helpers.gaussian_walks import Spy
from tests.helpers.samplers import SAMPLERS, SCHEDULES, Wave

EULER = build.sampler("euler")
GRIDS = {
    "theirs": spaced(FLOW, 10, "linspace"),  # 1, 0.889, ..., 0.001, 0: what both schedulers take by themselves
    "even": spaced(FLOW, 8, "trailing"),
    "irregular": [1000, 990, 640, 333, 332, 60, 7, 1, 0],
}


def straight(x: Tensor, t: int) -> Tensor:
    """z = (1 - u) x0 + u eps, in which the path is straight, of x_t."""
    alpha, sigma = FLOW.scales(t, x)
    return x / (alpha + sigma)


def walked(sampler: Sampler, times: list[int], target: Any = "flow") -> list[tuple[int, Tensor]]:
    """The times and tensors of a walk from pure noise, the start included."""
    x = gaussian((2, 8, 8), generators([0])).double()
    seen = [(times[0], x)]
    sample(NetworkDenoiser(Wave(), FLOW, target), sampler, x, times, on_step=lambda s, x, _: seen.append((s, x)))
    return seen


def velocity(z: Tensor, t: int) -> Tensor:
    """What a scheduler is given: the network's output at z, which it sees as x_t."""
    alpha, sigma = FLOW.scales(t, z)
    out: Tensor = Wave()(z * (alpha + sigma), torch.tensor([t - 1]))
    return out


@pytest.mark.parametrize("grid", GRIDS)
def test_euler_equals_diffusers_step_by_step(grid) -> None:
    scheduler, times = FlowMatchEulerDiscreteScheduler(), GRIDS[grid]
    if grid == "theirs":
        scheduler.set_timesteps(10)
    else:
        scheduler.set_timesteps(sigmas=[t / 1000 for t in times[:-1]])
    torch.testing.assert_close(1000 * scheduler.sigmas, torch.tensor(times).float(), rtol=0, atol=1e-3)
    z = walked(EULER, times)[0][1]
    for (t, _), (s, ours) in pairwise(walked(EULER, times)):
        z = scheduler.step(velocity(z, t), scheduler.timesteps[scheduler.step_index or 0], z).prev_sample
        torch.testing.assert_close(straight(ours, s), z, rtol=0, atol=2e-5)


@pytest.mark.parametrize("grid", GRIDS)
def test_heun_equals_diffusers_step_by_step(grid) -> None:
    scheduler, times = FlowMatchHeunDiscreteScheduler(), GRIDS[grid]
    scheduler.set_timesteps(len(times) - 1)
    if grid != "theirs":  # they have no other grid: each level but the ends counts twice
        levels = torch.tensor(times) / 1000
        scheduler.sigmas = torch.cat([levels[:1], levels[1:-1].repeat_interleave(2), levels[-1:]])
        scheduler.timesteps = 1000 * scheduler.sigmas[:-1]
    seen, step = walked(Heun(), times), iter(scheduler.timesteps)
    z = seen[0][1]
    for (t, _), (s, ours) in pairwise(seen):
        z = scheduler.step(velocity(z, t), next(step), z).prev_sample
        if s > 0:
            z = scheduler.step(velocity(z, s), next(step), z).prev_sample
        torch.testing.assert_close(straight(ours, s), z, rtol=0, atol=2e-5)
    assert next(step, None) is None, "as many calls of the network"


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2)])
def test_the_error_falls_with_the_order_of_the_method(name, order) -> None:
    """Data N(0.3, 0.2^2): the exact solution of the equation maps x_T to 0.3 + 0.2 x_T."""
    start = torch.tensor([-2.0, -0.5, 1.0, 2.0], dtype=torch.float64).reshape(1, 1, 4)
    errors = []
    for count in (25, 50, 100):
        times = build.generator_times(FLOW, name, count)
        out = sample(GaussianDenoiser(FLOW, 0.3, 0.2), build.sampler(name), start, times)
        errors.append(float((out - (0.3 + 0.2 * start)).abs().max()))
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2**order, rel=0.2)
    assert errors[-1] < {1: 0.02, 2: 0.002}[order]


def test_mean_and_variance_of_ten_steps_are_those_of_the_data() -> None:
    """Where DDIM on its own times has a spread of 0.105 instead of 0.2 (`test_closed_form`)."""
    x = gaussian((1, 40000), generators([1])).double()
    found = sample(GaussianDenoiser(FLOW, 0.3, 0.2), Heun(), x, build.generator_times(FLOW, "heun", 10))
    assert float(found.mean()) == pytest.approx(0.3, abs=0.01)
    assert float(found.std()) == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize("sampler", [EULER, Heun()], ids=["euler", "heun"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_path_to_one_point_is_straight_and_one_step_is_exact(schedule, sampler) -> None:
    table, x0, eps = SCHEDULES[schedule], normal(1, 2, 1, 5, 5), normal(2, 2, 1, 5, 5)
    last = table.num_steps
    x = table.add_noise(x0, eps, last)
    for t in (last // 2, 1, 0):
        there = sample(GaussianDenoiser(table, x0, 0.0), sampler, x, [last, t])
        torch.testing.assert_close(there, table.add_noise(x0, eps, t), rtol=0, atol=1e-8)


@pytest.mark.parametrize("schedule", ["linear", "rectified-flow"])
def test_an_euler_step_of_the_flow_is_ddims(schedule) -> None:
    """z_s = z_t + (u_s - u_t) (eps - x0), the published update, in x; on any schedule."""
    table, seen = SCHEDULES[schedule], []
    x = gaussian((1, 6, 6), generators([3])).double()
    times = [1000, 700, 250, 3]
    denoiser = NetworkDenoiser(Wave(), table, "v")
    sample(denoiser, EULER, x, times, on_step=lambda s, x, p: seen.append((x, p)))
    for (t, s), (after, prediction) in zip(pairwise(times), seen, strict=True):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = table.scales(t, x), table.scales(s, x)
        duration = sigma_s / (alpha_s + sigma_s) - sigma_t / (alpha_t + sigma_t)
        z = x / (alpha_t + sigma_t) + duration * (prediction.eps - prediction.x0)
        torch.testing.assert_close(after, (alpha_s + sigma_s) * z, rtol=0, atol=1e-12)
        x = after


@pytest.mark.parametrize("name", build.SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_calls_of_the_denoiser_are_counted(name, steps) -> None:
    spy = Spy(GaussianDenoiser(FLOW, 0.1, 0.5))
    times = build.generator_times(FLOW, name, steps)
    assert times[0] == 1000 and len(times) == steps + 1
    sample(spy, build.sampler(name), normal(4, 1, 1, 3, 3), times, generators=generators([0]))
    assert len(spy.times) == build.evaluations(name, steps)


def test_steps_of_rectified_flow_have_equal_lengths() -> None:
    for name in ("euler", "heun"):
        assert build.generator_times(FLOW, name, 4) == [1000, 750, 500, 250, 0]
    assert build.generator_times(FLOW, "ddim", 4) == [1000, 667, 334, 1, 0]


@pytest.mark.filterwarnings("ignore:.*distinct times remain")
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_starts_at_pure_noise_and_reaches_the_data(name) -> None:
    """x_T has no signal at all here: no step may divide by it."""
    own = generators(range(3))
    x = gaussian((1, 80, 80), own).double()
    times = spaced(FLOW, 200)
    assert times[0] == 1000
    for denoiser in (GaussianDenoiser(FLOW, 0.3, 0.2), Clipped(GaussianDenoiser(FLOW, 0.3, 0.2), -3, 3)):
        found = sample(denoiser, SAMPLERS[name], x, times, generators=own)
        assert float(found.mean()) == pytest.approx(0.3, abs=0.02)
        assert float(found.std()) == pytest.approx(0.2, abs=0.03)


def test_heun_walks_up_to_the_noise_and_back() -> None:
    """The second order makes the way back end at the image itself, with few steps; x_1 is taken as clean."""
    x = 0.3 + 0.2 * normal(5, 1, 1, 20, 20)
    denoiser, times = GaussianDenoiser(FLOW, 0.3, 0.2), list(range(1, 1000, 27))
    code = sample(denoiser, Heun(), x, [*times, 1000])
    assert float(code.std()) == pytest.approx(1, abs=0.06)
    torch.testing.assert_close(sample(denoiser, Heun(), code, [1000, *times[::-1]]), x, rtol=0, atol=2e-3)


def test_heun_clips_both_predictions() -> None:
    class Far:
        schedule = FLOW

        def __call__(self, x_t: Tensor, t: Tensor, cond: object = None) -> Prediction:
            return NetworkDenoiser(Wave(), FLOW, "flow")(10 * x_t, t)

    x = gaussian((1, 8, 8), generators([6])).double()
    seen: list[Prediction] = []

    class Noting:
        schedule = FLOW

        def __call__(self, x_t: Tensor, t: Tensor, cond: object = None) -> Prediction:
            seen.append(Clipped(Far())(x_t, t))
            return seen[-1]

    out = sample(Noting(), Heun(), x, [1000, 600, 200, 0])
    assert len(seen) == 5 and all(float(one.x0.abs().max()) <= 1 for one in seen)
    assert float(out.abs().max()) <= 1


def test_evenly_spread_times_exist_up_to_pure_noise() -> None:
    times = spread(FLOW, 20, 1000)
    assert len(times) == 20 and times[0] == 1000 and times[-1] == 1 and all(t > s for t, s in pairwise(times))
