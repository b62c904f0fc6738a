"""DPM-Solver++ against an independent implementation (diffusers)."""

from __future__ import annotations

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from medseg_diffusion.diffusion.denoiser import NetworkDenoiser
from medseg_diffusion.diffusion.noise import gaussian, generators
from medseg_diffusion.sampling.dpm_solver import DPMSolver
from medseg_diffusion.sampling.loop import sample
from tests.helpers.samplers import GRIDS, PREDICTION_TYPES, SCHEDULES, Wave, assert_same_walk, their


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


def test_multistep_history_does_not_outlive_a_walk() -> None:
    sampler, x = DPMSolver(), gaussian((1, 5, 5), generators([0]))
    denoiser = NetworkDenoiser(Wave(), SCHEDULES["linear"], "x0")
    first = sample(denoiser, sampler, x, [1000, 500, 100, 0])
    sample(denoiser, sampler, x, [800, 30])
    assert torch.equal(sample(denoiser, sampler, x, [1000, 500, 100, 0]), first)
