"""Samples an ensemble of class probabilities for an image: whole, in windows, or slice by slice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from medseg_diffusion.diffusion.noise import derive_seed
from medseg_diffusion.sampling.loop import Sampler

from .windows import WHOLE, Corner, Windows, predict_in_windows, rows_in_windows


class Segmenter(Protocol):
    """A model that samples masks: images (B, C, *S), with N seeds each, to probabilities (B, N, K, *S)."""

    def probabilities(
        self, image: Tensor, seeds: Sequence[Sequence[int]], sampler: Sampler, times: Sequence[int]
    ) -> Tensor: ...


def segment(
    model: Segmenter,
    image: Tensor,
    seeds: Sequence[int],
    sampler: Sampler,
    times: Sequence[int],
    windows: Windows = WHOLE,
    dims: int = 3,
    on_window: Callable[[], None] = lambda: None,
) -> Tensor:
    """Class probabilities (N, K, I, J, K') of ``image`` (C, I, J, K') for N seeds, see `segment_slabs`."""
    slabs = list(segment_slabs(model, image, seeds, sampler, times, windows, dims, on_window))
    return slabs[0] if len(slabs) == 1 else torch.cat(slabs, slab_axis(dims) - 3)


def slab_axis(dims: int) -> int:
    """The axis of the image along which `segment_slabs` of a model of 2 or 3 dimensions proceeds: 2 or 0."""
    return 0 if dims == 3 else 2


def segment_slabs(
    model: Segmenter,
    image: Tensor,
    seeds: Sequence[int],
    sampler: Sampler,
    times: Sequence[int],
    windows: Windows = WHOLE,
    dims: int = 3,
    on_window: Callable[[], None] = lambda: None,
) -> Iterator[Tensor]:
    """Class probabilities of ``image`` (C, I, J, K') for N member seeds, slab by slab.

    A 3D model sees the whole image or Gaussian-weighted windows of it. A 2D model sees the slices across the third
    axis, in batches. The noise of a window depends only on the member's seed and the window's position, not on the
    batch. All slices of a member have the same noise, so that a member is one mask of the whole volume. With
    independent slices, differences between members would cancel in their volumes and in the volume intervals.

    Args:
        model: trained, on the image's device.
        image: preprocessed intensities.
        seeds: one per ensemble member.
        sampler: update rule.
        times: the list of times.
        windows: cutting and batching.
        dims: dimensions of the model, 2 or 3.
        on_window: called after every batch of windows.

    Yields:
        Consecutive slabs (N, K, ...) of the image along `slab_axis`: the slices of a batch, or the rows that no further
        window overlaps.
    """

    def predict(patches: Tensor, corners: Sequence[Corner]) -> Tensor:
        # For slices, the seed depends on the position within the slice, not on the slice.
        window_seeds = [[derive_seed(seed, *corner[3 - dims :]) for seed in seeds] for corner in corners]
        probabilities = model.probabilities(patches, window_seeds, sampler, times)
        on_window()
        return probabilities.flatten(1, 2)

    stack = image[None] if dims == 3 else image.movedim(-1, 0)
    spatial = tuple(stack.shape[2:])
    batch = windows.batch(spatial, len(seeds), image.device)
    origin = [0] * len(spatial)
    parts: Iterator[Tensor]
    if windows.of(spatial) == spatial:
        parts = (
            predict(part, [(first + i, *origin) for i in range(len(part))])
            for first, part in zip(range(0, len(stack), batch), stack.split(batch), strict=True)
        )
    elif dims == 3:
        parts = rows_in_windows(stack, windows, batch, predict)
    else:
        slices = windows.thickness(image.shape, dims, len(seeds), image.device)
        parts = (predict_in_windows(part, windows, batch, predict) for part in stack.split(slices))

    def members(flat: Tensor) -> Tensor:
        one = flat.unflatten(1, (len(seeds), -1))
        return one[0] if dims == 3 else one.movedim(0, -1)

    yield from map(members, parts)  # a loop would keep a slab in memory while the next one is computed
