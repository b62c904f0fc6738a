"""Ancestral sampling against an independent implementation (diffusers)."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from medseg_diffusion.sampling.ddpm import DDPM
from tests.helpers.samplers import GRIDS, PREDICTION_TYPES, SCHEDULES, assert_same_walk, their


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
