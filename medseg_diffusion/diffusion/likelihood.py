"""Likelihood of tensors under a denoiser: the variational bound, and maps of its terms.

-log p(x0) <= KL(q(x_T | x0) || N(0, I)) + sum over s > 0 of KL(q(x_s | x_t, x0) || p(x_s | x_t)) - log p(x0 | x_1)

(Ho et al. 2020, arXiv 2006.11239, eq. 5.) Every term takes one draw of noise and one call of the denoiser; calls are
batched over times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from .denoiser import Condition, Denoiser
from .noise import Noised, draw_noised
from .posterior import Decoder, FixedVariance, bound_term, gaussian_kl
from .prediction import Prediction
from .schedule import precise

Data = Literal["8-bit", "continuous"]

_Term = Callable[[Prediction, Noised, Tensor, Tensor], Tensor]
"""(prediction, noised, s, later) -> the reduced term of each element, (b, ...); ``s``, ``later`` as in `bound_term`."""


@dataclass(frozen=True, eq=False)
class VariationalBound:
    """The bound's terms for each batch element.

    Attributes:
        unit: "bits/dim" for the complete bound; or "nats/position without decoder term" for a part of it, which is
            comparable only between elements of the same model.
        prior: (B,) KL of x_T against the standard normal distribution.
        kl: (B, N) the terms of the visited times, in the order of ``times``, without that of the step to 0.
        decoder: (B,) -log p(x0 | x_1), or None.
        times: the N visited times of ``kl``.
    """

    unit: str
    prior: Tensor
    kl: Tensor
    decoder: Tensor | None
    times: list[int]

    @property
    def total(self) -> Tensor:
        """(B,) the sum of all terms."""
        total = self.prior + self.kl.sum(1)
        return total if self.decoder is None else total + self.decoder


@torch.no_grad()
def variational_bound(
    denoiser: Denoiser,
    x0: Tensor,
    generators: Sequence[torch.Generator],
    data: Data,
    cond: Condition | None = None,
    times: Sequence[int] | None = None,
    batch_size: int = 32,
    fixed_variance: FixedVariance = "posterior",
) -> VariationalBound:
    """The variational bound of each element of ``x0`` (B, C, *S). Terms are in float32 or wider, sums in float64.

    No command computes it: it is for those who compare models by likelihood, and an oracle for the bound that models
    with a learned variance are trained with (`medseg_diffusion.diffusion.objective.Bound`).

    Args:
        denoiser: the model, neither guided nor clipped.
        x0: the clean tensors.
        generators: one CPU generator per element.
        data: "8-bit" for the levels 0..255 mapped to [-1, 1], in bits per dimension; "continuous" for latents and
            float images, in nats per position and without the decoder's term, because a density has no bits.
        cond: the condition of each element.
        times: the visited times, decreasing from T to 0; None visits all.
        batch_size: number of noised tensors per call of the denoiser.
        fixed_variance: variance of a model that learned none.

    Raises:
        ValueError: ``data`` is "8-bit" but ``x0`` is not, or ``times`` do not decrease from T to 0.
    """
    last = denoiser.schedule.num_steps
    trajectory = list(range(last, -1, -1)) if times is None else list(times)
    if (
        len(trajectory) < 3
        or trajectory[0] != last
        or trajectory[-1] != 0
        or any(t <= s for t, s in pairwise(trajectory))
    ):
        raise ValueError(f"times must decrease from {last} to 0 in at least two steps, got {trajectory[:5]}...")
    if data == "8-bit":
        levels = (x0 + 1) * 127.5
        if float((levels - levels.round()).abs().max()) > 1e-2 or float(levels.min()) < -0.01 or levels.max() > 255.01:
            raise ValueError(
                "bits per dimension are defined for 8-bit levels mapped to [-1, 1], and this is none: "
                'use data="continuous" for nats per position'
            )
    decoder: Decoder = "discretised" if data == "8-bit" else "none"
    bits = data == "8-bit"
    per_unit = 1 / math.log(2) if bits else float(x0.shape[1])
    steps = list(zip(trajectory[:-1], trajectory[1:], [trajectory[0], *trajectory[:-2]], strict=True))

    def mean(nats: Tensor) -> Tensor:
        return per_unit * nats.to(precise(nats.device)).flatten(1).mean(1)

    def term(prediction: Prediction, noised: Noised, s: Tensor, later: Tensor) -> Tensor:
        return mean(bound_term(denoiser.schedule, prediction, noised, s, later, decoder, fixed_variance))

    terms = _terms(denoiser, x0, generators, cond, steps, batch_size, term)
    ab = denoiser.schedule.alpha_bar[-1].to(x0)
    prior = mean(gaussian_kl(ab.sqrt() * x0, (1 - ab).log(), torch.zeros_like(x0), torch.zeros_like(ab)))
    return VariationalBound(
        "bits/dim" if bits else "nats/position without decoder term",
        prior,
        terms[:, :-1],
        terms[:, -1] if bits else None,
        trajectory[:-2],
    )


@torch.no_grad()
def kl_maps(
    denoiser: Denoiser,
    x0: Tensor,
    generators: Sequence[torch.Generator],
    times: Sequence[int],
    cond: Condition | None = None,
    batch_size: int = 32,
    fixed_variance: FixedVariance = "posterior",
) -> Tensor:
    """KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)) at every position: (B, N, *S) nats, summed over channels.

    The values are large where the input is unlikely under the model (Pinaya et al. 2022, arXiv 2206.03461). Each of the
    N ``times``, in 2..T, has noise of its own. A map does not depend on ``batch_size`` or on the other elements of the
    batch.
    """
    last = denoiser.schedule.num_steps
    if not times or not all(2 <= t <= last for t in times):
        raise ValueError(f"KL maps exist for times in 2..{last}, got {list(times)}")
    steps = [(t, t - 1, min(t + 1, last)) for t in times]

    def term(prediction: Prediction, noised: Noised, s: Tensor, later: Tensor) -> Tensor:
        return bound_term(denoiser.schedule, prediction, noised, s, later, "none", fixed_variance).sum(1)

    return _terms(denoiser, x0, generators, cond, steps, batch_size, term)


def _terms(
    denoiser: Denoiser,
    x0: Tensor,
    generators: Sequence[torch.Generator],
    cond: Condition | None,
    steps: Sequence[tuple[int, int, int]],
    batch_size: int,
    term: _Term,
) -> Tensor:
    """Evaluates ``term`` for every element at each of the N steps (t, s, later): (B, N, ...)."""
    if len(generators) != len(x0):
        raise ValueError(f"needs one generator for each element: got {len(generators)} for {len(x0)} elements")
    pairs = [(b, step) for b in range(len(x0)) for step in steps]
    batches = []
    for first in range(0, len(pairs), batch_size):
        chunk = pairs[first : first + batch_size]
        index = torch.tensor([b for b, _ in chunk], device=x0.device)
        t, s, later = torch.tensor([step for _, step in chunk], device=x0.device).unbind(1)
        noised = draw_noised(denoiser.schedule, x0[index], [generators[b] for b, _ in chunk], t=t)
        own = None if cond is None else {name: value[index] for name, value in cond.items()}
        batches.append(term(denoiser(noised.x_t, t, own), noised, s, later))
    terms = torch.cat(batches)
    return terms.reshape(len(x0), len(steps), *terms.shape[1:])
