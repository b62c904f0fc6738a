"""Sliding windows: the windows of an image, and the average of their predictions.

Overlapping predictions are averaged with Gaussian weights, because predictions are least reliable at the border of a
window (Isensee et al. 2021, doi 10.1038/s41592-020-01008-z). Positions, weights and the order of sums are those of
MONAI's `sliding_window_inference`, which is not used because its import takes seconds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from medseg_diffusion.device import at_once

Corner = tuple[int, ...]
"""Position of a window: the index of the image in its batch, then the first voxel along every axis."""

_SIGMA = 0.125  # standard deviation of the weights, in sides of the window
_SMALLEST = 32  # voxels along a window that is made smaller to save memory
_LEAST_WEIGHT = 1e-3  # avoids a division by almost 0 in voxels that only the corner of a window covers


@dataclass(frozen=True)
class Windows:
    """How an image is divided into windows.

    Attributes:
        size: size of a window in voxels; None for the whole image.
        overlap: overlap of neighbours as a share of the window, in [0, 1).
        batch_size: windows or slices per batch; None for as many as `medseg_diffusion.device.at_once` allows for all
            members of an ensemble.
    """

    size: tuple[int, ...] | None = None
    overlap: float = 0.25
    batch_size: int | None = None

    def of(self, spatial: Sequence[int]) -> tuple[int, ...]:
        """The size of a window in an image of the size ``spatial``."""
        return tuple(spatial if self.size is None else map(min, self.size, spatial))

    def batch(self, spatial: Sequence[int], members: int, device: torch.device) -> int:
        """Number of windows or slices in a batch, for images of the size ``spatial`` and ensembles of ``members``."""
        return self.batch_size or at_once(members * math.prod(self.of(spatial)), device)

    def corners(self, spatial: Sequence[int]) -> list[tuple[int, ...]]:
        """The first voxel of every window in an image of this size, the last axis fastest.

        The last window along an axis ends at the image's border. It may overlap its neighbour by more than ``overlap``.
        """
        starts = []
        for axis, side in zip(spatial, self.of(spatial), strict=True):
            step, last = max(1, int(side * (1 - self.overlap))), axis - side
            # The type of a number is part of the seed from `derive_seed`: int instead of numpy's int64 would change the
            # noise of every window.
            starts.append(list(np.minimum(np.arange(0, last + step, step, dtype=np.int64), last)))
        return list(itertools.product(*starts))

    def thickness(self, shape: Sequence[int], dims: int, members: int, device: torch.device) -> int:
        """Largest number of planes in a slab of `methods.segment.segment_slabs` of an image of ``shape`` (C, I, J, K).

        A 2D model takes so many slices that their windows fill batches. A batch is then that of the whole stack.
        """
        if dims == 3:
            return self.of(shape[1:])[0]
        batch = self.batch(shape[1:3], members, device)
        return min(shape[3], batch // math.gcd(batch, len(self.corners(shape[1:3]))))

    def smaller(self, spatial: Sequence[int]) -> Windows | None:
        """Windows of half the size along the longest axes; None if they would be smaller than `_SMALLEST`."""
        size = self.of(spatial)
        longest = max(size)
        if longest <= _SMALLEST:
            return None
        half = max(_SMALLEST, -(-longest // 32) * 16)
        return replace(self, size=tuple(min(half, side) for side in size))


WHOLE = Windows()
"""The whole image as its only window."""


def predict_in_windows(
    image: Tensor, windows: Windows, batch_size: int, predict: Callable[[Tensor, Sequence[Corner]], Tensor]
) -> Tensor:
    """The weighted mean of the predictions in all windows, (B, K, *S), of the type of ``image``.

    Args:
        image: (B, C, *S), 2D or 3D.
        windows: size and overlap.
        batch_size: windows per call. All windows of an image come before those of the next.
        predict: predicts (N, K, *size) from N windows (N, C, *size) and their corners.
    """
    rows = list(rows_in_windows(image, windows, batch_size, predict))
    return rows[0] if len(rows) == 1 else torch.cat(rows, 2)


def rows_in_windows(
    image: Tensor, windows: Windows, batch_size: int, predict: Callable[[Tensor, Sequence[Corner]], Tensor]
) -> Iterator[Tensor]:
    """`predict_in_windows` in consecutive parts (B, K, rows, ...) of S, each as soon as it is complete.

    Only the rows that further windows will add to are in memory. Several images are complete with the last of them.
    """
    spatial = image.shape[2:]
    size, corners = windows.of(spatial), windows.corners(spatial)
    weights = gaussian_weights(size, image)
    boxes = [tuple(slice(first, first + side) for first, side in zip(corner, size, strict=True)) for corner in corners]
    everything = [(index, window) for index in range(len(image)) for window in range(len(corners))]
    last = len(image) - 1
    done = 0
    # Sums and their weights from the first incomplete row on. The weights are those of the last image.
    rows, total = image.new_zeros(len(image), 0, 0, *spatial[1:]), image.new_zeros(0, *spatial[1:])
    for start in range(0, len(everything), batch_size):
        part = everything[start : start + batch_size]
        cut = [image[index : index + 1, :, *boxes[window]] for index, window in part]
        patches = torch.cat(cut) if batch_size > 1 else cut[0]
        predictions = predict(patches, [(index, *corners[window]) for index, window in part])
        end = max(int(corners[window][0]) for _, window in part) + size[0]
        if done + len(total) < end:
            rows = _longer(rows, (len(image), predictions.shape[1], end - done, *spatial[1:]), 2)
            total = _longer(total, (end - done, *spatial[1:]), 0)
        for (index, window), values in zip(part, predictions, strict=True):
            first, *others = boxes[window]
            here = (slice(first.start - done, first.stop - done), *others)
            rows[index : index + 1, :, *here] += values * weights
            if index == last:
                total[here] += weights
        following = everything[start + batch_size :][:1]
        stop = spatial[0] if not following else int(corners[following[0][1]][0]) if following[0][0] == last else 0
        if stop > done:
            complete, rows = rows[:, :, : stop - done], rows[:, :, stop - done :].clone()
            yield complete.div_(total[: stop - done])
            done, total = stop, total[stop - done :].clone()
            del complete  # the next rows need its memory


def _longer(rows: Tensor, shape: Sequence[int], axis: int) -> Tensor:
    """Rows with zeros behind them along ``axis``."""
    longer = rows.new_zeros(tuple(shape))
    if rows.shape[axis]:
        longer.narrow(axis, 0, rows.shape[axis]).copy_(rows)
    return longer


def gaussian_weights(size: Sequence[int], like: Tensor) -> Tensor:
    """Weights (*size) of a window's voxels, 0.001 to 1 at the centre, of the type and device of ``like``."""
    weights = torch.ones((), device=like.device)
    for side in size:
        distance = torch.arange(side, dtype=torch.float32, device=like.device) - (side - 1) / 2
        weights = weights[..., None] * torch.exp(distance**2 / (-2 * (_SIGMA * side) ** 2))
    return weights.clamp(min=_LEAST_WEIGHT).to(like.dtype)


def count_batches(shape: Sequence[int], windows: Windows, dims: int, members: int, device: torch.device) -> int:
    """Number of batches in which `methods.segment` predicts an image of ``shape`` (C, I, J, K)."""
    spatial = tuple(shape[1:]) if dims == 3 else tuple(shape[1:3])
    images = 1 if dims == 3 else shape[3]
    return -(-images * len(windows.corners(spatial)) // windows.batch(spatial, members, device))
