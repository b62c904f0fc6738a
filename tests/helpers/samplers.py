"""Samplers and schedules, and diffusers' schedulers on the same tables."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from medseg_diffusion.diffusion.denoiser import NetworkDenoiser
from medseg_diffusion.diffusion.noise import gaussian, generators
from medseg_diffusion.diffusion.prediction import Prediction
from medseg_diffusion.diffusion.schedule import NoiseSchedule, cosine, linear, rectified_flow, scaled_linear
from medseg_diffusion.sampling.ddim import DDIM
from medseg_diffusion.sampling.ddpm import DDPM
from medseg_diffusion.sampling.dpm_solver import DPMSolver
from medseg_diffusion.sampling.heun import Heun
from medseg_diffusion.sampling.loop import Sampler, spaced

SCHEDULES = {
    "linear": linear(1000),
    "linear-100": linear(100),
    "cosine": cosine(1000),
    "scaled": scaled_linear(1000),
    "rectified-flow": rectified_flow(1000),
}
SAMPLERS: dict[str, Sampler] = {
    "ddpm": DDPM(),
    "ddpm-beta": DDPM("beta"),
    "ddim": DDIM(),
    "ddim-0.5": DDIM(0.5),
    "ddim-1": DDIM(1.0),
    "dpm++": DPMSolver(),
    "heun": Heun(),
}
SPACINGS = ["log-snr", "trailing", "leading", "linspace"]


PREDICTION_TYPES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
GRIDS = {
    "leading": spaced(SCHEDULES["linear"], 20, "leading"),
    "log-snr": spaced(SCHEDULES["linear"], 12),
    "irregular": [1000, 990, 640, 333, 332, 60, 7, 1, 0],
}


def predict_once(x_t: Tensor, t: int) -> Prediction:
    """For the steps of samplers that need no prediction but the one they are given."""
    raise AssertionError("a second prediction")


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
    step = sampler.begin(predict_once)
    for t, s in pairwise(times):
        prediction = denoiser(x, torch.tensor([t]))
        ours = step(schedule, prediction, x, t, s, partial(gaussian, x.shape[1:], [own], like=x))
        theirs = their_step(denoiser.network(x, torch.tensor([t - 1])), t, s, x, other)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        x = ours
