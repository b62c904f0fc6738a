"""Sources of noise: always from explicit generators, one a batch element.

The generators live on the CPU whatever the device, so that an element's noise is the same in any batch, on CPU and
on CUDA.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class NoiseSource(Protocol):
    """Noise (B, *shape) of mean 0 and unit variance, B = len(generators), as `gaussian` gives it."""

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
    return noise if like is None else noise.to(device=like.device, dtype=like.dtype)


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator a seed."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2^63) from all parts, e.g. (seed, case name, sample index), by SHA-256: the same everywhere."""
    digest = hashlib.sha256("\x1f".join(f"{type(part).__name__}:{part}" for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
