"""Brings slices and volumes of any size to the fixed grid of a generator, and maps back from it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def to_generator_grid(image: Tensor, size: Sequence[int], fill: float = -1.0) -> Tensor:
    """Bring images (B, C, *S) to a grid of ``size``: (B, C, *size) in the images' floating-point type.

    Slices (I, J) of RAS volumes are rotated so that anterior is up and the person's left is on the left of the
    picture. Then they are padded to the aspect ratio of the grid and resized as a whole. Volumes keep their voxel size:
    they are padded or cropped about their centre.

    Args:
        image: slices or volumes.
        size: two sides for slices, three for volumes.
        fill: value of the padding.
    """
    if image.ndim == 4:
        image = image.rot90(1, (2, 3))
        rows, columns = image.shape[2:]
        # The smallest rectangle with the grid's aspect ratio that holds the slice.
        scale = max(rows / size[0], columns / size[1])
        whole = [max(rows, round(size[0] * scale)), max(columns, round(size[1] * scale))]
        return _resized(_centred(image, whole, fill), size)
    return _centred(image, size, fill)


def from_generator_grid(maps: Tensor, shape: Sequence[int], fill: float = 0.0) -> Tensor:
    """The inverse of `to_generator_grid`: maps (B, C, *size) on a generator's grid to the images' grid (B, C, *shape).

    Bit-exact where `to_generator_grid` only padded. ``fill`` is the value where a volume was cropped.
    """
    if maps.ndim == 4:
        rows, columns = shape[1], shape[0]  # turned
        scale = max(rows / maps.shape[2], columns / maps.shape[3])
        whole = [max(rows, round(maps.shape[2] * scale)), max(columns, round(maps.shape[3] * scale))]
        return _centred(_resized(maps, whole), (rows, columns), fill).rot90(-1, (2, 3))
    return _centred(maps, shape, fill)


def _centred(image: Tensor, size: Sequence[int], fill: float) -> Tensor:
    """(B, C, *S) padded with ``fill`` or cropped to ``size`` about its centre. Cropping undoes padding exactly."""
    pad = []
    for old, new in zip(reversed(image.shape[2:]), reversed(size), strict=True):
        # Padding and cropping both round down, so that one undoes the other.
        before = (new - old) // 2 if new >= old else -((old - new) // 2)
        pad += [before, new - old - before]
    return F.pad(image, pad, value=fill) if any(pad) else image


def _resized(image: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(image.shape[2:]) == tuple(size):
        return image
    smaller = size[0] < image.shape[2]
    return F.interpolate(image, tuple(size), mode="bilinear", antialias=smaller, align_corners=False)


def labels_to_generator_grid(labels: Tensor, size: Sequence[int]) -> Tensor:
    """Bring label maps (B, *S) to a grid of ``size``; the padding is 0.

    Each label's mask is interpolated linearly. Each position gets the label with the largest value.
    """
    # Background takes part even if no position is labelled 0: the padding is background.
    best = to_generator_grid((labels == 0)[:, None].float(), size, fill=1.0)[:, 0]
    result = torch.zeros_like(best, dtype=labels.dtype)
    for value in torch.unique(labels[labels != 0]).tolist():
        share = to_generator_grid((labels == value)[:, None].float(), size, fill=0.0)[:, 0]
        larger = share > best + 1e-6  # equal shares differ by rounding
        result[larger] = value
        best = torch.where(larger, share, best)
    return result
