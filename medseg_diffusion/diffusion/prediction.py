"""What a network predicts, and the algebra of epsilon, x0, v and the flow.

With x_t = alpha x0 + sigma eps and alpha^2 + sigma^2 = 1 (`schedule`), each of

    eps                                          Ho et al. 2020, arXiv 2006.11239
    x0  = (x_t - sigma eps) / alpha
    v   = alpha eps - sigma x0                   Salimans & Ho 2022, arXiv 2202.00512
    flow = eps - x0                              Liu et al. 2022, arXiv 2209.03003

determines the others, given x_t. The flow is the velocity dz/du of the straight path z = (1 - u) x0 + u eps. On every
schedule z = x_t / (alpha + sigma) lies on this path, at u = sigma / (alpha + sigma) (`schedule.rectified_flow`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Target = Literal["eps", "x0", "v", "flow"]


@dataclass(frozen=True, eq=False)
class Prediction:
    """A denoiser's output at (x_t, t): the clean tensor and the noise of one prediction, not clipped.

    Attributes:
        x0: (B, C, *S) predicted clean tensor.
        eps: (B, C, *S) predicted noise.
        var_weight: (B, C, *S) or None. Nominally in [0, 1] and never clamped: 0 is the smallest, 1 the largest
            variance of the reverse step (Nichol & Dhariwal 2021, eq. 15).
        logits: (B, K, *S) or None. Output of a classifying head before its softmax or sigmoid.
    """

    x0: Tensor
    eps: Tensor
    var_weight: Tensor | None = None
    logits: Tensor | None = None


def read_output(target: Target, out: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Converts the output ``out`` (B, C, *S) of a network that was trained to predict ``target`` into (x0, eps).

    ``alpha`` and ``sigma`` are (B, 1, ..., 1). At t = 0 sigma is 0 and eps cannot be recovered from x0: the denoiser
    is never called there. Where alpha is 0, x_t is noise alone and "eps" gives no x0 (`NoiseSchedule.ends_in_noise`).
    """
    if target == "eps":
        return (x_t - sigma * out) / alpha, out
    if target == "x0":
        return out, (x_t - alpha * out) / sigma
    if target == "flow":
        return (x_t - sigma * out) / (alpha + sigma), (x_t + alpha * out) / (alpha + sigma)
    return alpha * x_t - sigma * out, sigma * x_t + alpha * out


def target_of(target: Target, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The correct output of a network that predicts ``target``, (B, C, *S): the inverse of `read_output`."""
    if target == "eps":
        return eps
    if target == "x0":
        return x0
    if target == "flow":
        return eps - x0
    return alpha * eps - sigma * x0
