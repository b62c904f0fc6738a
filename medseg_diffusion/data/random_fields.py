"""Random numbers, random fields, smoothing and resampling for synthetic images.

Smoothing and linear resampling along an axis are products with a matrix, which is faster than a convolution with one
channel on a CPU, and the same operation on every device.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


class Draw:
    """Random numbers from one generator on the CPU, and whole images of noise from one on the device.

    Args:
        generator: source of everything that is drawn.
        device: where images and fields are made. The noise of a GPU is another one than that of a CPU.
    """

    def __init__(self, generator: torch.Generator, device: torch.device | str = "cpu") -> None:
        self.generator = generator
        self.device = torch.device(device)
        self.of_device = generator
        if self.device.type != "cpu":
            self.of_device = torch.Generator(self.device).manual_seed(self.integer(2**31))

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """On the CPU."""
        return low + (high - low) * torch.rand(shape, generator=self.generator)

    def chance(self, probability: float) -> bool:
        return float(torch.rand((), generator=self.generator)) < probability

    def integer(self, below: int) -> int:
        return int(torch.randint(below, (), generator=self.generator))

    def gauss(self) -> float:
        """A standard normal number."""
        return float(torch.randn((), generator=self.generator))

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers, on the device."""
        return torch.randn(tuple(shape), generator=self.of_device, device=self.device)

    def field(self, window: Sequence[int], spacing: float, nodes_mm: float) -> Tensor:
        """A smooth random field (*window): standard normal at nodes about ``nodes_mm`` apart, linear between them."""
        coarse = [max(2, round(n * spacing / nodes_mm) + 1) for n in window]
        weights = [linear_weights(m, n, corners=True) for m, n in zip(coarse, window, strict=True)]
        return along_axes(self.normal(coarse), weights)


def blur(image: Tensor, sigma: float | Sequence[float]) -> Tensor:
    """Gaussian smoothing of (I, J, K) with ``sigma`` in voxels, for all axes or each. Edge voxels are repeated."""
    sigmas = [sigma] * 3 if isinstance(sigma, int | float) else list(sigma)
    return along_axes(image, [gaussian_weights(n, width) for n, width in zip(image.shape, sigmas, strict=True)])


def resized(image: Tensor, size: Sequence[int]) -> Tensor:
    """(I, J, K) resampled linearly to ``size``; the outer borders of both grids coincide."""
    weights = [linear_weights(m, n, corners=False) for m, n in zip(image.shape, size, strict=True)]
    return along_axes(image, weights)


def along_axes(image: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Products of (I, J, K) with a matrix (new size, old size) along each axis."""
    first, second, third = (matrix.to(image) for matrix in weights)
    image = (first @ image.reshape(image.shape[0], -1)).reshape(-1, *image.shape[1:])
    return second @ image @ third.T


def gaussian_weights(size: int, sigma: float) -> Tensor:
    """(size, size) of a Gaussian of ``sigma`` voxels, cut off at three of them."""
    reach = max(1, round(3 * sigma))
    steps = torch.arange(-reach, reach + 1)
    kernel = torch.exp(-0.5 * (steps / sigma) ** 2)
    columns = (torch.arange(size)[:, None] + steps).clamp(0, size - 1)
    return torch.zeros(size, size).scatter_add_(1, columns, (kernel / kernel.sum()).expand(size, -1))


@lru_cache(maxsize=256)
def linear_weights(old: int, new: int, corners: bool) -> Tensor:
    """(new, old) of linear interpolation; either the outer samples coincide (``corners``), or the outer borders."""
    if corners:
        position = torch.linspace(0, old - 1, new)
    else:
        position = ((torch.arange(new) + 0.5) * old / new - 0.5).clamp(0, old - 1)
    lower = position.floor().long().clamp(max=max(0, old - 2))
    upper = (lower + 1).clamp(max=old - 1)
    weights = torch.zeros(new, old).scatter_add_(1, lower[:, None], (1 - (position - lower))[:, None])
    return weights.scatter_add_(1, upper[:, None], (position - lower)[:, None])
