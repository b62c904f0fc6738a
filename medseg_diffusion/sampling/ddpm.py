"""Ancestral sampling (Ho et al. 2020, arXiv 2006.11239, algorithm 2) over any subset of the times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from medseg_diffusion.diffusion.posterior import FixedVariance, log_variance, posterior
from medseg_diffusion.diffusion.prediction import Prediction
from medseg_diffusion.diffusion.schedule import NoiseSchedule

from .loop import Noise, Predict


@dataclass(frozen=True)
class DDPM:
    """x_s ~ N(posterior mean at the predicted x0, variance).

    A learned variance is exp(w log max + (1 - w) log min) (Nichol & Dhariwal 2021, eq. 15), with the bounds of the pair
    (t, s). If the model learned none, ``variance`` chooses the posterior's or the largest.

    ``gradient`` is for classifier guidance: its value g at (x_t, t) shifts the mean by variance times g (Dhariwal &
    Nichol 2021, algorithm 1). The denoiser must then not be guided itself, and may be clipped. This is the published
    form, an oracle for `medseg_diffusion.diffusion.guidance.ClassifierGuided`, which the commands use because it fits
    every sampler.
    """

    variance: FixedVariance = "posterior"
    gradient: Callable[[Tensor, Tensor], Tensor] | None = None

    def begin(self, predict: Predict) -> DDPM:
        return self

    def __call__(
        self, schedule: NoiseSchedule, prediction: Prediction, x_t: Tensor, t: int, s: int, noise: Noise
    ) -> Tensor:
        q = posterior(schedule, prediction.x0, x_t, t, s)
        if s == 0:
            return q.mean
        log_var = log_variance(q, prediction.var_weight, self.variance)
        mean = q.mean
        if self.gradient is not None:
            times = torch.full((len(x_t),), t, dtype=torch.int64, device=x_t.device)
            mean = mean + log_var.exp() * self.gradient(x_t, times)
        return mean + (0.5 * log_var).exp() * noise()
