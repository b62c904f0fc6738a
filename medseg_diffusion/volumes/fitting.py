"""Slices and volumes of any size on the fixed grid of a generator, and maps back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def fitted(image: Tensor, size: Sequence[int], fill: float = -1.0) -> Tensor:
    """Images (B, C, *S) on a grid of ``size``: (B, C, *size) in the images' floating-point type.

    Slices (I, J) of RAS volumes are turned so that anterior is up and the left of the person on the left of the
    picture, padded to the shape of the grid, and resized as a whole: the aspect is kept. Volumes keep their voxel
    size, so they are padded or cut about their centre.

    Args:
        image: slices or volumes.
        size: two or three sides.
        fill: value of what is added.
    """
    if image.ndim == 4:
        image = image.rot90(1, (2, 3))
        rows, columns = image.shape[2:]
        # The smallest sides of the grid's aspect that hold the slice.
        scale = max(rows / size[0], columns / size[1])
        whole = [max(rows, round(size[0] * scale)), max(columns, round(size[1] * scale))]
        return _resized(_centred(image, whole, fill), size)
    return _centred(image, size, fill)


def unfitted(maps: Tensor, shape: Sequence[int], fill: float = 0.0) -> Tensor:
    """Maps (B, C, *size) on a generator's grid, back on that of the images (B, C, *shape) which `fitted` put there.

    Bit-exact where `fitted` only padded. ``fill`` is the value where a volume was cut.
    """
    if maps.ndim == 4:
        rows, columns = shape[1], shape[0]  # turned
        scale = max(rows / maps.shape[2], columns / maps.shape[3])
        whole = [max(rows, round(maps.shape[2] * scale)), max(columns, round(maps.shape[3] * scale))]
        return _centred(_resized(maps, whole), (rows, columns), fill).rot90(-1, (2, 3))
    return _centred(maps, shape, fill)


def _centred(image: Tensor, size: Sequence[int], fill: float) -> Tensor:
    """(B, C, *S) padded with ``fill`` or cut to ``size``; the inverse of itself where it only padded."""
    pad = []
    for have, want in zip(reversed(image.shape[2:]), reversed(size), strict=True):
        # Floor in one direction and its mirror image in the other, so that going there and back is the identity.
        before = (want - have) // 2 if want >= have else -((have - want) // 2)
        pad += [before, want - have - before]
    return F.pad(image, pad, value=fill) if any(pad) else image


def _resized(image: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(image.shape[2:]) == tuple(size):
        return image
    smaller = size[0] < image.shape[2]
    return F.interpolate(image, tuple(size), mode="bilinear", antialias=smaller, align_corners=False)


def fitted_labels(labels: Tensor, size: Sequence[int]) -> Tensor:
    """Label maps (B, *S) on a grid of ``size``: each label's mask linearly, then the largest; 0 outside."""
    best = fitted((labels == 0)[:, None].float(), size, fill=1.0)[:, 0]  # also where no position is 0: what is padded
    result = torch.zeros_like(best, dtype=labels.dtype)
    for value in torch.unique(labels[labels != 0]).tolist():
        share = fitted((labels == value)[:, None].float(), size, fill=0.0)[:, 0]
        larger = share > best + 1e-6  # shares of one half each differ by rounding alone
        result[larger] = value
        best = torch.where(larger, share, best)
    return result
