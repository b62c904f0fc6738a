"""DPM-Solver++(2M): the second-order multistep solver in data prediction (Lu et al. 2022, arXiv 2211.01095)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from medseg_diffusion.diffusion.prediction import Prediction
from medseg_diffusion.diffusion.schedule import NoiseSchedule

from .loop import Noise, Predict, Step


@dataclass(frozen=True)
class DPMSolver:
    """x_s = (sigma_s / sigma_t) x_t - alpha_s (exp(-h) - 1) D, h = lambda_s - lambda_t (algorithm 2).

    D extrapolates the last two predictions of x0: D = x0 + (x0 - x0_previous) / (2 r), r = h_previous / h. The first
    step and the step to t = 0, where lambda is infinite, are of first order (D = x0). Where the schedule ends in pure
    noise, lambda_T is infinite as well, and so is the first h: the second step is then of first order, too.
    """

    def begin(self, predict: Predict) -> Step:
        return _Trajectory()


class _Trajectory:
    """The step of one trajectory, with the previous prediction of x0 and the previous h."""

    def __init__(self) -> None:
        self.x0: Tensor | None = None
        self.h = 0.0

    def __call__(
        self, schedule: NoiseSchedule, prediction: Prediction, x_t: Tensor, t: int, s: int, noise: Noise
    ) -> Tensor:
        ab_t, ab_s = schedule.value(t), schedule.value(s)
        if s == 0:
            return prediction.x0
        h = math.inf if ab_t == 0 else 0.5 * (math.log(ab_s / (1 - ab_s)) - math.log(ab_t / (1 - ab_t)))
        data = prediction.x0
        if self.x0 is not None:
            data = data + (h / (2 * self.h)) * (data - self.x0)
        self.x0, self.h = prediction.x0, h
        return math.sqrt((1 - ab_s) / (1 - ab_t)) * x_t - math.sqrt(ab_s) * math.expm1(-h) * data
