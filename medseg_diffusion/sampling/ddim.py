"""Denoising diffusion implicit models (Song et al. 2020, arXiv 2010.02502)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from medseg_diffusion.diffusion.prediction import Prediction
from medseg_diffusion.diffusion.schedule import NoiseSchedule

from .loop import Noise, Predict


@dataclass(frozen=True)
class DDIM:
    """x_s = alpha_s x0 + sqrt(sigma_s^2 - tau^2) eps + tau z, tau = eta sqrt(posterior variance) (eq. 12 and 16).

    ``eta`` 0 is deterministic, 1 has the variance of ancestral sampling. With eta 0 the same rule also goes upwards,
    s > t, which inverts sampling (sec. 4.3).

    With eta 0 it is also Euler's step of rectified flow, z_s = z_t + (u_s - u_t) (eps - x0), in z = x / (alpha + sigma)
    and u = sigma / (alpha + sigma): both sides are (1 - u_s) x0 + u_s eps.
    """

    eta: float = 0.0

    def begin(self, predict: Predict) -> DDIM:
        return self

    def __call__(
        self, schedule: NoiseSchedule, prediction: Prediction, x_t: Tensor, t: int, s: int, noise: Noise
    ) -> Tensor:
        ab_t, ab_s = schedule.value(t), schedule.value(s)
        if self.eta == 0 or s == 0:
            return math.sqrt(ab_s) * prediction.x0 + math.sqrt(1 - ab_s) * prediction.eps
        if s > t:
            raise ValueError(f"inversion is deterministic: eta must be 0, got {self.eta}")
        tau = self.eta * math.sqrt((1 - ab_s) / (1 - ab_t) * (1 - ab_t / ab_s))
        direction = math.sqrt(max(1 - ab_s - tau**2, 0.0))
        return math.sqrt(ab_s) * prediction.x0 + direction * prediction.eps + tau * noise()
