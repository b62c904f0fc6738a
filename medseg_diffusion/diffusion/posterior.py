"""One reverse step: q(x_s | x_t, x0) of the forward process, the model's step, and the terms of the variational bound.

For s = t - 1 the posterior is that of equations 6 and 7 of Ho et al. 2020 (arXiv 2006.11239). The form below holds for
any pair s < t, so that fewer steps need no schedule of their own: with alpha_bar_{t|s} = alpha_bar_t / alpha_bar_s,

    mean     = [sqrt(alpha_bar_s) (1 - alpha_bar_{t|s}) x0 + sqrt(alpha_bar_{t|s}) (1 - alpha_bar_s) x_t]
               / (1 - alpha_bar_t)
    variance = (1 - alpha_bar_s) (1 - alpha_bar_{t|s}) / (1 - alpha_bar_t)      the smallest of a reverse step
    1 - alpha_bar_{t|s}                                                         the largest ("beta" of the pair)

A model's step p(x_s | x_t) has the posterior's mean at the predicted x0 and a variance between the two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .noise import Noised
from .prediction import Prediction
from .schedule import NoiseSchedule, expand

FixedVariance = Literal["posterior", "beta"]
"""The variance of a model that learned none: the smallest or the largest of its step."""

Decoder = Literal["discretised", "gaussian", "none"]
"""p(x0 | x_t) in the bound's last term: probability of 8-bit levels in [-1, 1], a density, or no last term."""


@dataclass(frozen=True, eq=False)
class Posterior:
    """q(x_s | x_t, x0): ``mean`` (B, C, *S); ``variance`` and ``max_variance`` (B, 1, ..., 1)."""

    mean: Tensor
    variance: Tensor
    max_variance: Tensor


def posterior(
    schedule: NoiseSchedule,
    x0: Tensor,
    x_t: Tensor,
    t: Tensor | int,
    s: Tensor | int,
    later: Tensor | int | None = None,
) -> Posterior:
    """Mean, smallest and largest variance of the step from ``t`` to ``s``, 0 <= s < t <= T; ``x0``, ``x_t`` (B, C, *S).

    Coefficients are computed in float64. If ``t`` and ``s`` are tensors their order is not checked, which would have to
    wait for the device.

    At s = 0 the mean is x0 and the smallest variance is 0. If ``later`` is given, the next visited time above t, the
    smallest variance at s = 0 is that of the step from ``later`` to t instead, as in Ho et al. (on the whole chain
    later = 2 and t = 1). Only the bound needs this: the last step of sampling adds no noise.
    """
    ab_t, ab_s = schedule.at(t), schedule.at(s)
    if isinstance(t, int) and isinstance(s, int) and s >= t:
        raise ValueError(f"the posterior goes to an earlier time: got t = {t}, s = {s}")
    pair = ab_t / ab_s
    mean = (
        expand(ab_s.sqrt() * (1 - pair) / (1 - ab_t), x_t) * x0
        + expand(pair.sqrt() * (1 - ab_s) / (1 - ab_t), x_t) * x_t
    )
    variance = (1 - ab_s) * (1 - pair) / (1 - ab_t)
    if later is not None:
        ab_later = schedule.at(later)
        floor = (1 - ab_t) * (1 - ab_later / ab_t) / (1 - ab_later)
        variance = torch.where(ab_s == 1, floor, variance)
    return Posterior(mean, expand(variance, x_t), expand(1 - pair, x_t))


def log_variance(q: Posterior, weight: Tensor | None, fixed: FixedVariance = "posterior") -> Tensor:
    """Log-variance of a model's step: w log largest + (1 - w) log smallest (Nichol & Dhariwal 2021, eq. 15).

    ``weight`` is `Prediction.var_weight`, (B, C, *S). If it is None, ``fixed`` chooses the variance: (B, 1, ..., 1).
    """
    if weight is None:
        return (q.variance if fixed == "posterior" else q.max_variance).log()
    return weight * q.max_variance.log() + (1 - weight) * q.variance.log()


def bound_term(
    schedule: NoiseSchedule,
    prediction: Prediction,
    noised: Noised,
    s: Tensor,
    later: Tensor,
    decoder: Decoder,
    fixed: FixedVariance = "posterior",
) -> Tensor:
    """One term of the variational bound for each batch element, in nats per entry: (B, C, *S).

    KL(q(x_s | x_t, x0) || p(x_s | x_t)) where s > 0, and -log p(x0 | x_t) where s = 0 (Ho et al. 2020, eq. 5).

    Args:
        schedule: the model's noise schedule.
        prediction: what the model predicts from ``noised``.
        noised: clean and noised tensors (B, C, *S) and their times t.
        s: (B,) int64, the next visited time below t; t - 1 on the whole chain.
        later: (B,) int64, the next visited time above t; used where s = 0.
        decoder: the distribution of the last term.
        fixed: variance of a model that learned none.
    """
    q = posterior(schedule, noised.x0, noised.x_t, noised.t, s, later)
    p = posterior(schedule, prediction.x0, noised.x_t, noised.t, s, later)
    log_var = log_variance(p, prediction.var_weight, fixed)
    kl = gaussian_kl(q.mean, q.variance.log(), p.mean, log_var)
    last = expand(schedule.at(s) == 1, noised.x0) > 0
    if decoder == "none":
        return torch.where(last, 0.0, kl)
    nll = discretised_nll if decoder == "discretised" else gaussian_nll
    return torch.where(last, nll(noised.x0, p.mean, log_var), kl)


def gaussian_kl(mean_q: Tensor, log_var_q: Tensor, mean_p: Tensor, log_var_p: Tensor) -> Tensor:
    """KL(N(mean_q, var_q) || N(mean_p, var_p)) in nats, element by element; the arguments broadcast."""
    log_ratio = log_var_q - log_var_p
    return 0.5 * (log_ratio.exp() - 1 - log_ratio + (mean_q - mean_p).square() * (-log_var_p).exp())


def gaussian_nll(x: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """-log density of N(mean, var) at ``x`` in nats, element by element."""
    return 0.5 * (math.log(2 * math.pi) + log_var + (x - mean).square() * (-log_var).exp())


def discretised_nll(x: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """-log probability in nats, element by element, of 8-bit levels under N(mean, var) (Ho et al. 2020, eq. 13).

    ``x`` holds the levels 0..255 mapped to [-1, 1]. A level's bin extends 1/255 to both sides; those of the levels
    0 and 255 extend to infinity.
    """
    inverse_std = (-0.5 * log_var).exp()
    # Mirrored to the lower tail, where the logarithm of the normal distribution function is exact at any distance.
    distance = -(x - mean).abs()
    inner, outer = (distance + 1 / 255) * inverse_std, (distance - 1 / 255) * inverse_std
    below_inner = torch.special.log_ndtr(inner)
    log_mass = below_inner + torch.log1p(-(torch.special.log_ndtr(outer) - below_inner).exp())
    log_mass = torch.where(x < -0.999, torch.special.log_ndtr((x - mean + 1 / 255) * inverse_std), log_mass)
    log_mass = torch.where(x > 0.999, torch.special.log_ndtr((mean - x + 1 / 255) * inverse_std), log_mass)
    return -log_mass
