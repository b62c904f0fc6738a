"""Training objectives of a denoiser, and how its training times are drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .prediction import Prediction, Target, target_of
from .schedule import NoiseSchedule, expand

Weighting = Literal["none", "min-snr"]


@dataclass(frozen=True)
class Simple:
    """L_simple = E ||target - prediction||^2 (Ho et al. 2020, eq. 14), optionally with the min-SNR-gamma weight.

    Min-SNR (Hang et al. 2023, arXiv 2303.09556, eq. 8) weighs the error of x0 by min(SNR, gamma); in the other
    parameterisations that is min(SNR, gamma) / SNR for eps and min(SNR, gamma) / (SNR + 1) for v.
    """

    weighting: Weighting = "none"
    gamma: float = 5.0

    def __call__(
        self, schedule: NoiseSchedule, target: Target, prediction: Prediction, x0: Tensor, eps: Tensor, t: Tensor
    ) -> Tensor:
        """Loss per batch element (B,), the mean over channels and positions; ``x0`` and ``eps`` are (B, C, *S)."""
        alpha, sigma = schedule.scales(t, x0)
        wanted = target_of(target, x0, eps, alpha, sigma)
        given = target_of(target, prediction.x0, prediction.eps, alpha, sigma)
        error = (wanted - given).square().flatten(1).mean(1)
        if self.weighting == "none":
            return error
        snr = schedule.snr(t)
        weight = snr.clamp(max=self.gamma)
        if target == "eps":
            weight = weight / snr
        elif target == "v":
            weight = weight / (snr + 1)
        return expand(weight, error) * error


def uniform_times(num_steps: int, generators: list[torch.Generator]) -> Tensor:
    """One training time per batch element, uniform in 1..T: (B,) int64, each from its own generator."""
    return torch.stack([torch.randint(1, num_steps + 1, (), generator=g) for g in generators])
