"""Ancestral sampling (Ho et al. 2020, arXiv 2006.11239, algorithm 2) over any subset of the times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from medseg_diffusion.diffusion.posterior import posterior
from medseg_diffusion.diffusion.prediction import Prediction
from medseg_diffusion.diffusion.schedule import NoiseSchedule

from .loop import Noise


@dataclass(frozen=True)
class DDPM:
    """x_s ~ N(posterior mean at the predicted x0, variance).

    A model with a learned variance uses it, exp(w log max + (1 - w) log min) (Nichol & Dhariwal 2021, eq. 15), both
    bounds being those of the pair (t, s). Otherwise ``variance`` chooses between the posterior's and the largest.
    """

    variance: Literal["posterior", "beta"] = "posterior"

    def begin(self) -> DDPM:
        return self

    def __call__(
        self, schedule: NoiseSchedule, prediction: Prediction, x_t: Tensor, t: int, s: int, noise: Noise
    ) -> Tensor:
        q = posterior(schedule, prediction.x0, x_t, t, s)
        if s == 0:
            return q.mean
        if prediction.var_weight is not None:
            w = prediction.var_weight
            std = (0.5 * (w * q.max_variance.log() + (1 - w) * q.variance.log())).exp()
        else:
            std = (q.variance if self.variance == "posterior" else q.max_variance).sqrt()
        return q.mean + std * noise()
