"""Heun's second-order method for the ordinary differential equation of rectified flow."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from medseg_diffusion.diffusion.prediction import Prediction
from medseg_diffusion.diffusion.schedule import NoiseSchedule

from .loop import Noise, Predict, Step


@dataclass(frozen=True)
class Heun:
    """z_s = z_t + (u_s - u_t) (w_t + w_s) / 2, where w_s is the velocity at Euler's z_s.

    The equation is dz/du = w = eps - x0 (Liu et al. 2022, arXiv 2209.03003), in the coordinates z = x / (alpha + sigma)
    and u = sigma / (alpha + sigma), which any schedule has. Euler's step is that of DDIM. Every step calls the denoiser
    twice, but for the step to t = 0, which is Euler's: there the velocity is undefined (Karras et al. 2022, arXiv
    2206.00364, algorithm 1).
    """

    def begin(self, predict: Predict) -> Step:
        return _Trajectory(predict)


class _Trajectory:
    """The step of one trajectory, with the denoiser for the second prediction."""

    def __init__(self, predict: Predict) -> None:
        self.predict = predict

    def __call__(
        self, schedule: NoiseSchedule, prediction: Prediction, x_t: Tensor, t: int, s: int, noise: Noise
    ) -> Tensor:
        if s == 0:
            return prediction.x0
        (alpha_t, sigma_t), (alpha_s, sigma_s) = (
            (math.sqrt(ab), math.sqrt(1 - ab)) for ab in (schedule.value(t), schedule.value(s))
        )
        there = self.predict(alpha_s * prediction.x0 + sigma_s * prediction.eps, s)
        velocity = (prediction.eps - prediction.x0 + there.eps - there.x0) / 2
        duration = sigma_s / (alpha_s + sigma_s) - sigma_t / (alpha_t + sigma_t)
        return (alpha_s + sigma_s) * (x_t / (alpha_t + sigma_t) + duration * velocity)
