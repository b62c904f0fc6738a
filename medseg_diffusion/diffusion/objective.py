"""Training objectives of a denoiser, and how its training times are drawn."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from .noise import Noised
from .posterior import Decoder, bound_term
from .prediction import Prediction, Target, target_of
from .schedule import NoiseSchedule, expand, sent

Weighting = Literal["none", "min-snr"]


class Objective(Protocol):
    """Loss per batch element (B,) of the prediction that a denoiser made from ``noised``."""

    def __call__(self, schedule: NoiseSchedule, target: Target, prediction: Prediction, noised: Noised) -> Tensor: ...


@dataclass(frozen=True)
class Simple:
    """L_simple = E ||target - prediction||^2 (Ho et al. 2020, eq. 14), optionally with the min-SNR-gamma weight.

    Min-SNR (Hang et al. 2023, arXiv 2303.09556, eq. 8) weighs the error of x0 by min(SNR, gamma); in the other
    parameterisations that is min(SNR, gamma) / SNR for eps, min(SNR, gamma) / (SNR + 1) for v and
    min(SNR, gamma) / (sqrt(SNR) + 1)^2 for the flow. The SNR is that of x0 with unit variance, also for scaled masks.
    """

    weighting: Weighting = "none"
    gamma: float = 5.0

    def __call__(self, schedule: NoiseSchedule, target: Target, prediction: Prediction, noised: Noised) -> Tensor:
        """Loss per batch element (B,), the mean over channels and positions."""
        alpha, sigma = schedule.scales(noised.t, noised.x0)
        true = target_of(target, noised.x0, noised.eps, alpha, sigma)
        predicted = target_of(target, prediction.x0, prediction.eps, alpha, sigma)
        error = (true - predicted).square().flatten(1).mean(1)
        if self.weighting == "none":
            return error
        snr = schedule.snr(noised.t)
        weight = snr.clamp(max=self.gamma)
        if target == "eps":
            weight = weight / snr
        elif target == "v":
            weight = weight / (snr + 1)
        elif target == "flow":
            weight = weight / (snr.sqrt() + 1) ** 2
        return expand(weight, error) * error


@dataclass(frozen=True)
class Bound:
    """L_vlb in bits per entry (Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 4 to 7).

    It is T times the term of the variational bound at t, so that the mean over t is the sum of all terms. The prior's
    term is left out, because it has no parameters.

    Attributes:
        decoder: "discretised" for 8-bit data in [-1, 1], "gaussian" for latents, masks and other floats.
    """

    decoder: Decoder = "discretised"

    def __call__(self, schedule: NoiseSchedule, target: Target, prediction: Prediction, noised: Noised) -> Tensor:
        later = (noised.t + 1).clamp(max=schedule.num_steps)
        nats = bound_term(schedule, prediction, noised, noised.t - 1, later, self.decoder)
        return schedule.num_steps / math.log(2) * nats.flatten(1).mean(1)


@dataclass(frozen=True)
class Hybrid:
    """L_hybrid = L_simple + 0.001 L_vlb (Nichol & Dhariwal 2021, eq. 16).

    The mean is detached in L_vlb, which thus trains only the variance: otherwise it would dominate L_simple.
    """

    simple: Simple = Simple()
    bound: Bound = Bound()
    weight: float = 0.001

    def __call__(self, schedule: NoiseSchedule, target: Target, prediction: Prediction, noised: Noised) -> Tensor:
        if prediction.var_weight is None:
            raise ValueError("the hybrid objective trains a variance, but this model does not learn one")
        mean_detached = replace(prediction, x0=prediction.x0.detach(), eps=prediction.eps.detach())
        bound = self.bound(schedule, target, mean_detached, noised)
        return self.simple(schedule, target, prediction, noised) + self.weight * bound


class ImportanceTimes(nn.Module):
    """Draws times in proportion to sqrt(E[L_t^2]), for the pure bound (Nichol & Dhariwal 2021, eq. 18).

    E is the mean over the last ``history`` losses of each t. Times are uniform until every t has that many losses, and
    always in a share ``uniform`` of the draws. The weights 1 / (T p_t) keep the expectation of the loss. The history is
    part of the module's state, and so of a resume file.
    """

    losses: Tensor
    counts: Tensor

    def __init__(self, num_steps: int, history: int = 10, uniform: float = 0.001) -> None:
        super().__init__()
        self.uniform = uniform
        self.register_buffer("losses", torch.zeros(num_steps, history, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(num_steps, dtype=torch.int64))

    def probabilities(self) -> Tensor:
        """p_t of the times 1..T, float64 (T,)."""
        num_steps, history = self.losses.shape
        even = torch.full_like(self.losses[:, 0], 1 / num_steps)
        size = self.losses.square().mean(1).sqrt()
        known = (self.counts.min() >= history) & (size.sum() > 0)
        return torch.where(known, (1 - self.uniform) * size / size.sum() + self.uniform * even, even)

    def draw(self, generators: list[torch.Generator]) -> tuple[Tensor, Tensor]:
        """One time per generator, (B,) int64 in 1..T, and the weights (B,) float64 of their losses, on the device.

        By the inverse of the distribution function of a uniform number from the generator.
        """
        p = self.probabilities()
        uniform = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in generators])
        t = torch.searchsorted(p.cumsum(0), sent(uniform, p.device), right=True).clamp(max=len(p) - 1)
        return t + 1, 1 / (len(p) * p[t])

    @torch.no_grad()
    def update(self, t: Tensor, losses: Tensor) -> None:
        """Records the unweighted losses (B,) of the times ``t`` (B,), gathered from all processes.

        Losses that are not finite are left out: they belong to a step that changes nothing.
        """
        num_steps, history = self.losses.shape
        finite, losses, rows = losses.isfinite(), losses.double(), t - 1
        same = (rows[:, None] == rows) & finite
        before, all_of_them = same.tril(-1).sum(1), same.sum(1)
        slots = (self.counts[rows] + before) % history
        # What a later loss of the same batch overwrites goes to a row that is thrown away: two writes to one place
        # have no order.
        rows_or_none = torch.where(finite & (before >= all_of_them - history), rows, num_steps)
        padded = torch.cat([self.losses, self.losses.new_zeros(1, history)])
        self.losses.copy_(padded.index_put_((rows_or_none, slots), losses)[:-1])
        self.counts.scatter_add_(0, rows, finite.to(self.counts.dtype))
