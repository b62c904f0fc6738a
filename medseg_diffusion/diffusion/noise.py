"""Random draws of the forward process: times, noise, and the noised tensors that they give.

Every draw comes from an explicit generator, one for each batch element. The generators live on the CPU whatever the
device, so that an element's draws are the same in any batch, on CPU and on CUDA.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .schedule import NoiseSchedule, sent


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
    digest = hashlib.sha256("\x1f".join(f"{type(part).__name__}:{part}" for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
