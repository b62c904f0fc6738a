"""Random numbers, random fields and smoothing for synthetic images, all drawn from one generator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


class Draw:
    """Random numbers and fields from one generator."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=self.generator)

    def normal(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(tuple(shape), generator=self.generator)

    def chance(self, probability: float) -> bool:
        return float(torch.rand((), generator=self.generator)) < probability

    def integer(self, below: int) -> int:
        return int(torch.randint(below, (), generator=self.generator))

    def field(self, window: Sequence[int], spacing: float, nodes_mm: float) -> Tensor:
        """A smooth random field (*window): standard normal at nodes about ``nodes_mm`` apart, linear between them."""
        coarse = [max(2, round(n * spacing / nodes_mm) + 1) for n in window]
        small = self.normal((1, 1, *coarse))
        return F.interpolate(small, tuple(window), mode="trilinear", align_corners=True)[0, 0]


def blur(image: Tensor, sigma: float | Sequence[float]) -> Tensor:
    """Gaussian smoothing of (I, J, K) with ``sigma`` in voxels, for all axes or each. Edge voxels are repeated."""
    sigmas = [sigma] * 3 if isinstance(sigma, int | float) else list(sigma)
    result = image[None, None]
    for axis, width in enumerate(sigmas):
        reach = max(1, round(3 * width))
        kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / width) ** 2)
        shape = [1, 1, 1, 1, 1]
        shape[2 + axis] = -1
        pad = [0] * 6
        pad[2 * (2 - axis)] = pad[2 * (2 - axis) + 1] = reach
        result = F.conv3d(F.pad(result, pad, mode="replicate"), (kernel / kernel.sum()).reshape(shape))
    return result[0, 0]
