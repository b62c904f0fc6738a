"""Denoisers: (x_t, t, condition) -> Prediction. Samplers, guidance and methods use models only in this way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from .prediction import Prediction, Target, read_output
from .schedule import NoiseSchedule

Condition = Mapping[str, Tensor]
"""Inputs that condition the network, by name: "concat" (B, C', *S), "stem" (B, C', *S), "label" (B,), ..."""

Head = Literal["linear", "softmax", "sigmoid"]
"""How the network's output is read: as the target, or as class logits of probabilities p with x0 = scale (2 p - 1)."""


class Denoiser(Protocol):
    """Predicts the clean tensor behind ``x_t`` (B, C, *S) at the times ``t`` (B,) int64 in 1..T."""

    @property
    def schedule(self) -> NoiseSchedule: ...

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition | None = None) -> Prediction: ...


class NetworkDenoiser(nn.Module):
    """A network with the schedule and the target that it was trained for.

    The network is called as ``network(x_t, timesteps, cond)`` with timesteps = t - 1, because public weights were
    trained on 0..T-1. Its output is converted to the dtype of ``x_t`` before any algebra, so that autocast does not
    affect the schedule.

    Args:
        network: maps (B, C, *S) to (B, C, *S), or to 2 C channels if ``learned_variance``.
        schedule: the noise schedule of the training.
        target: what the network predicts.
        learned_variance: the second half of the channels is the variance interpolation, nominally in [-1, 1].
        head: "softmax" or "sigmoid" reads the output as logits over the channels; the target is then x0.
        scale: of x0: masks lie in [-scale, scale], and a smaller scale makes every noise level harder. If the network
            predicts x0 or classes, its output is multiplied by it.
        normalised: the network sees x_t divided by its standard deviation (Chen 2023, arXiv 2301.10972, sec. 2.2).
            That falls to ``scale`` near t = 1: a mask of scale 0.05 would be almost invisible otherwise.

    Raises:
        ValueError: a classifying head with another target than x0, or with a learned variance; or target eps where the
            schedule ends in pure noise, from which eps gives no x0.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: NoiseSchedule,
        target: Target = "eps",
        learned_variance: bool = False,
        head: Head = "linear",
        scale: float = 1.0,
        normalised: bool = True,
    ) -> None:
        super().__init__()
        if head != "linear" and (target != "x0" or learned_variance):
            raise ValueError(f"head {head!r} emits class logits: it needs target 'x0' and no learned variance")
        if target == "eps" and schedule.ends_in_noise:
            raise ValueError("target 'eps' gives no x0 at the last time of this schedule, which is pure noise")
        self.network = network
        self.schedule = schedule
        self.target: Target = target
        self.learned_variance = learned_variance
        self.head: Head = head
        self.scale = scale
        self.normalised = normalised

    def forward(self, x_t: Tensor, t: Tensor, cond: Condition | None = None) -> Prediction:
        alpha, sigma = self.schedule.scales(t, x_t)
        seen = x_t
        if self.normalised and self.scale != 1:
            seen = x_t / (alpha.square() * self.scale**2 + sigma.square()).sqrt()
        out = self.network(seen, t - 1, cond).to(x_t.dtype)
        var_weight = None
        if self.learned_variance:
            out, v = out.chunk(2, dim=1)
            var_weight = (v + 1) / 2
        if self.head == "linear":
            if self.target == "x0":
                out = self.scale * out
            x0, eps = read_output(self.target, out, x_t, alpha, sigma)
            return Prediction(x0, eps, var_weight)
        probabilities = out.softmax(dim=1) if self.head == "softmax" else out.sigmoid()
        x0, eps = read_output("x0", self.scale * (2 * probabilities - 1), x_t, alpha, sigma)
        return Prediction(x0, eps, logits=out)


@dataclass(frozen=True, eq=False)
class Clipped:
    """A denoiser whose x0 is clipped to [low, high], with eps recomputed to match (as in guided diffusion).

    It goes around guidance, which works on the unclipped prediction. Guided diffusion's code clips inside it instead,
    and leaves what the gradient adds (`models.generator.Generator.sample`). Not for latents, inversion or likelihoods.
    """

    denoiser: Denoiser
    low: float = -1.0
    high: float = 1.0

    @property
    def schedule(self) -> NoiseSchedule:
        return self.denoiser.schedule

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition | None = None) -> Prediction:
        prediction = self.denoiser(x_t, t, cond)
        alpha, sigma = self.schedule.scales(t, x_t)
        x0, eps = read_output("x0", prediction.x0.clamp(self.low, self.high), x_t, alpha, sigma)
        return replace(prediction, x0=x0, eps=eps)


@dataclass(frozen=True, eq=False)
class GaussianDenoiser:
    """The exact denoiser of data x0 ~ N(mean, std^2) with independent elements, a reference for tests.

    E[x0 | x_t] = (sigma^2 mean + alpha std^2 x_t) / (alpha^2 std^2 + sigma^2). ``mean`` and ``std`` are floats or
    tensors that broadcast with x_t.
    """

    schedule: NoiseSchedule
    mean: float | Tensor = 0.0
    std: float | Tensor = 1.0

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition | None = None) -> Prediction:
        alpha, sigma = self.schedule.scales(t, x_t)
        variance = torch.as_tensor(self.std, dtype=x_t.dtype, device=x_t.device) ** 2
        total = alpha**2 * variance + sigma**2
        x0 = (sigma**2 * self.mean + alpha * variance * x_t) / total
        return Prediction(x0, sigma * (x_t - alpha * self.mean) / total)
