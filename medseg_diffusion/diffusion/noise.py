"""Random draws of the forward process: times, noise, and the noised tensors that they give.

Every draw comes from an explicit generator, one for each batch element. The generators live on the CPU whatever the
device, so that an element's draws are the same in any batch, on CPU and on CUDA.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .schedule import NoiseSchedule, sent

TimeSource = Callable[[Sequence[torch.Generator]], Tensor]
"""Draws one training time per batch element, (B,) int64 in 1..T, each from its own generator."""


class NoiseSource(Protocol):
    """Returns noise (B, *shape) of mean 0 and unit variance, B = len(generators); `gaussian` is one."""

    def __call__(
        self, shape: Sequence[int], generators: Sequence[torch.Generator], like: Tensor | None = None
    ) -> Tensor: ...


def gaussian(shape: Sequence[int], generators: Sequence[torch.Generator], like: Tensor | None = None) -> Tensor:
    """Standard normal noise (B, *shape) with B = len(generators), on the device and in the dtype of ``like``.

    Drawn in float32 (float64 for a float64 ``like``) on the CPU, element by element.
    """
    wide = like is not None and like.dtype == torch.float64
    dtype = torch.float64 if wide else torch.float32
    noise = torch.stack([torch.randn(*shape, generator=g, dtype=dtype) for g in generators])
    return noise if like is None else sent(noise, like.device).to(like.dtype)


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator for each seed."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def uniform_times(last: int, generators: Sequence[torch.Generator], first: int = 1) -> Tensor:
    """One training time per batch element, uniform in first..last: (B,) int64, each from its own generator."""
    return torch.stack([torch.randint(first, last + 1, (), generator=g) for g in generators])


class LogitNormalTimes:
    """Training times at which log(sigma / alpha) is normal, N(mean, std^2): a `TimeSource`.

    On the rectified-flow schedule log(sigma / alpha) = logit(u) with u = t / T, so that u is logit-normal (Esser et al.
    2024, arXiv 2403.03206, eq. 19). On any schedule it is EDM's log-normal noise level (Karras et al. 2022, arXiv
    2206.00364, table 1). Time t stands for the levels from that of t - 1 to its own. Losses keep their weight of 1:
    the density of the times is their weight.

    Args:
        schedule: the noise schedule.
        mean: of log(sigma / alpha); the larger, the more noise.
        std: its standard deviation, positive.
        first: the first time that can be drawn, 1..last.
        last: the last one; None for T.

    Raises:
        ValueError: ``std`` is not positive, or the times from ``first`` to ``last`` are too unlikely to be drawn.
    """

    def __init__(
        self, schedule: NoiseSchedule, mean: float = 0.0, std: float = 1.0, first: int = 1, last: int | None = None
    ) -> None:
        if not std > 0:
            raise ValueError(f"the standard deviation of the times must be positive, got {std:g}")
        self.first = first
        last = schedule.num_steps if last is None else last
        levels = -schedule.half_log_snr()[first - 1 : last + 1]
        self.distribution = torch.special.ndtr((levels - mean) / std)
        if not float(self.distribution[-1] - self.distribution[0]) > 1e-6:
            raise ValueError(
                f"logit-normal times of mean {mean:g} and standard deviation {std:g} miss the times {first} to {last}, "
                f"where log(sigma / alpha) is {float(levels[1]):.3g} to {float(levels[-1]):.3g}"
            )

    def __call__(self, generators: Sequence[torch.Generator]) -> Tensor:
        """By the inverse of the distribution function of a uniform number from each generator."""
        uniform = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in generators])
        low, high = self.distribution[0], self.distribution[-1]
        index = torch.searchsorted(self.distribution, low + uniform * (high - low), right=True)
        return self.first - 1 + index.clamp(max=len(self.distribution) - 1)


@dataclass(frozen=True, eq=False)
class Noised:
    """Clean tensors and their noised versions, x_t = alpha_t x0 + sigma_t eps.

    Attributes:
        x0: (B, C, *S) clean tensors.
        eps: (B, C, *S) noise of mean 0 and unit variance.
        t: (B,) int64, the time of each element, 1..T.
        x_t: (B, C, *S) noised tensors.
    """

    x0: Tensor
    eps: Tensor
    t: Tensor
    x_t: Tensor

    @classmethod
    def from_noise(cls, schedule: NoiseSchedule, x0: Tensor, eps: Tensor, t: Tensor) -> Noised:
        """The noised tensors of this ``eps``."""
        return cls(x0, eps, t, schedule.add_noise(x0, eps, t))


def draw_noised(
    schedule: NoiseSchedule,
    x0: Tensor,
    generators: Sequence[torch.Generator],
    source: NoiseSource = gaussian,
    t: Tensor | None = None,
) -> Noised:
    """Noises each element of ``x0`` (B, C, *S) with draws from its own generator: first its time, then its noise.

    Args:
        schedule: the noise schedule.
        x0: the clean tensors.
        generators: one CPU generator for each batch element.
        source: of the noise.
        t: (B,) int64 in 1..T, for times that were drawn before; None draws uniform ones.
    """
    if t is None:
        t = uniform_times(schedule.num_steps, generators)
    return Noised.from_noise(schedule, x0, source(x0.shape[1:], generators, x0), sent(t, x0.device))


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2^63) from all parts, e.g. (seed, case name, sample index). By SHA-256: the same everywhere."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    digest = hashlib.sha256(text.encode(errors="surrogateescape")).digest()  # names of files need not be UTF-8
    return int.from_bytes(digest[:8], "big") >> 1
