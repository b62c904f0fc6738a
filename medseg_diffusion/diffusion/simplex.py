"""Simplex noise (Perlin 2001): smooth noise, whose blobs hide larger parts of an image than independent pixels do.

AnoDDPM (Wyatt et al. 2022, CVPR workshops) noises images with sums of octaves of 3D simplex noise. Each image gets a
slice at a random depth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .schedule import sent

_PERIOD = 256  # of the lattice, in cells; a power of 2
_GRADIENTS = torch.tensor(
    [[x, y, 0] for x in (1, -1) for y in (1, -1)]
    + [[x, 0, z] for x in (1, -1) for z in (1, -1)]
    + [[0, y, z] for y in (1, -1) for z in (1, -1)],
    dtype=torch.float64,
)  # from the centre of a cube to the middles of its edges
_RADIUS2 = 0.5  # squared radius of a corner's influence: the largest without jumps between cells
_VARIANCE = 2.608e-5
"""Variance of `_octave`, over points and lattices; a test measures it."""


def simplex(
    shape: Sequence[int],
    generators: Sequence[torch.Generator],
    like: Tensor | None = None,
    octaves: int = 6,
    persistence: float = 0.8,
    wavelength: float = 64.0,
) -> Tensor:
    """Noise (B, *shape) of mean 0 and unit variance over draws: a `noise.NoiseSource`.

    Each channel has its own lattice and its own place in it, drawn on the CPU from the element's generator. The rest is
    computed on the device of ``like``. The mean of a single draw is not 0, because its largest blobs are as large as
    the image.

    Args:
        shape: (C, *S) with 2 or 3 spatial axes.
        generators: one CPU generator per batch element.
        like: gives device and dtype; None is float32 on torch's default device.
        octaves: number of summed fields, each with half the wavelength of the one before.
        persistence: ratio of an octave's amplitude to that of the one before (published: 0.8).
        wavelength: size in voxels of a cell of the first octave (published: "frequency 64").
    """
    channels, *size = shape
    like = torch.zeros(()) if like is None else like
    table, offset = [], []
    for g in generators:
        for _ in range(channels):
            table.append(torch.randperm(_PERIOD, generator=g))
            offset.append(_PERIOD * torch.rand(3, generator=g))
    lattice, start = sent(torch.stack(table), like.device), sent(torch.stack(offset), like.device)
    axes = [torch.arange(n, dtype=torch.float32, device=like.device) for n in size]
    points = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(size))
    points = torch.cat([points, points.new_zeros(len(points), 3 - len(size))], 1).T.contiguous()
    total = torch.zeros(len(lattice), points.shape[1], dtype=torch.float32, device=like.device)
    squares = 0.0
    for octave in range(octaves):
        amplitude = persistence**octave
        places = points * (2**octave / wavelength)
        # At a place of its own: where all octaves meet at the same point of the lattice, they add up instead of cancel.
        total += amplitude * _octave(places, start * 2**octave % _PERIOD, lattice)
        squares += amplitude**2
    total /= math.sqrt(squares * _VARIANCE)
    return total.reshape(len(generators), channels, *size).to(like.dtype)


def _octave(points: Tensor, start: Tensor, lattice: Tensor) -> Tensor:
    """Simplex noise (N, P) float32 at the points (3, P) of N lattices (N, 256), each moved by its start (N, 3)."""
    x = points[:, None] + start.T[..., None]  # (3, N, P): one plane per axis is much faster than rows of three
    # Skewing turns the lattice of tetrahedra into one of cubes, each of which six tetrahedra fill.
    cell = (x + x.sum(0) / 3).floor()
    inside = x - cell + cell.sum(0) / 6
    index = cell.long()
    # For each coordinate, how many are larger; of equal ones, the later counts as smaller.
    a, b, c = inside
    ab, ac, bc = a >= b, a >= c, b >= c
    rank = torch.stack([2 - ab.int() - ac.int(), 1 + ab.int() - bc.int(), ac.int() + bc.int()])
    slopes = sent(_GRADIENTS.float(), x.device).T[:, lattice % len(_GRADIENTS)]  # (3, N, 256)
    noise = torch.zeros(x.shape[1:], dtype=torch.float32, device=x.device)
    for corner in range(4):
        step = rank < corner  # along the axes of the largest coordinates first
        away = inside - step.float() + corner / 6
        weight = (_RADIUS2 - away.square().sum(0)).clamp_(min=0) ** 4
        i, j, k = (index + step) & (_PERIOD - 1)
        hashed = (lattice.gather(1, k) + j) & (_PERIOD - 1)
        hashed = (lattice.gather(1, hashed) + i) & (_PERIOD - 1)
        for slope, distance in zip(slopes, away, strict=True):
            noise.addcmul_(weight * distance, slope.gather(1, hashed))
    return noise
