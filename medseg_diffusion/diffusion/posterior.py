"""The reverse step that the forward process defines: q(x_s | x_t, x0) for any s < t.

For s = t - 1 these are equations 6 and 7 of Ho et al. 2020 (arXiv 2006.11239); the pair form makes respacing of a
trained chain unnecessary: with alpha_bar_{t|s} = alpha_bar_t / alpha_bar_s,

    mean     = [sqrt(alpha_bar_s) (1 - alpha_bar_{t|s}) x0 + sqrt(alpha_bar_{t|s}) (1 - alpha_bar_s) x_t]
               / (1 - alpha_bar_t)
    variance = (1 - alpha_bar_s) (1 - alpha_bar_{t|s}) / (1 - alpha_bar_t)      the smallest of a reverse step
    1 - alpha_bar_{t|s}                                                         the largest ("beta" of the pair)
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .schedule import NoiseSchedule, expand


@dataclass(frozen=True, eq=False)
class Posterior:
    """q(x_s | x_t, x0): ``mean`` (B, C, *S); ``variance`` and ``max_variance`` (B, 1, ..., 1)."""

    mean: Tensor
    variance: Tensor
    max_variance: Tensor


def posterior(schedule: NoiseSchedule, x0: Tensor, x_t: Tensor, t: Tensor | int, s: Tensor | int) -> Posterior:
    """Mean, smallest and largest variance of the step from ``t`` to ``s``, 0 <= s < t <= T; ``x0``, ``x_t`` (B, C, *S).

    Coefficients are computed in float64. At s = 0 the mean is x0 and the smallest variance 0.
    """
    ab_t, ab_s = schedule.at(t), schedule.at(s)
    if not bool((ab_s > ab_t).all()):
        raise ValueError(f"the posterior goes to an earlier time: got t = {t}, s = {s}")
    pair = ab_t / ab_s
    mean = (
        expand(ab_s.sqrt() * (1 - pair) / (1 - ab_t), x_t) * x0
        + expand(pair.sqrt() * (1 - ab_s) / (1 - ab_t), x_t) * x_t
    )
    return Posterior(mean, expand((1 - ab_s) * (1 - pair) / (1 - ab_t), x_t), expand(1 - pair, x_t))
