"""An image to an ensemble of class probabilities: whole, in windows, or slice by slice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from monai.inferers import sliding_window_inference
from torch import Tensor

from medseg_diffusion.diffusion.noise import derive_seed
from medseg_diffusion.sampling.loop import Sampler


class Segmenter(Protocol):
    """What samples masks of images: (B, C, *S) and N seeds an image to probabilities (B, N, K, *S)."""

    def probabilities(
        self, image: Tensor, seeds: Sequence[Sequence[int]], sampler: Sampler, times: Sequence[int]
    ) -> Tensor: ...


@dataclass(frozen=True)
class Windows:
    """How an image is cut: window size (None: whole), overlap of neighbours in [0, 1), windows per batch."""

    size: tuple[int, ...] | None = None
    overlap: float = 0.25
    batch_size: int = 1


def segment(
    model: Segmenter,
    image: Tensor,
    seeds: Sequence[int],
    sampler: Sampler,
    times: Sequence[int],
    windows: Windows = Windows(),
    dims: int = 3,
    on_window: Callable[[], None] = lambda: None,
) -> Tensor:
    """Class probabilities (N, K, I, J, K') of ``image`` (C, I, J, K') for N member seeds.

    A 3D model sees the whole image or Gaussian-weighted windows of it; a 2D model sees the slices across the third
    axis, in batches. The noise of a window or slice depends on the member's seed and its position alone, never on
    what shares its batch.

    Args:
        model: trained, on the image's device.
        image: preprocessed intensities.
        seeds: one per ensemble member.
        sampler: update rule.
        times: the list of times.
        windows: cutting and batching.
        dims: dimensions of the model, 2 or 3.
        on_window: called after every batch of windows.
    """

    def predict(patches: Tensor, corners: Sequence[tuple[int, ...]]) -> Tensor:
        own = [[derive_seed(seed, *corner) for seed in seeds] for corner in corners]
        found = model.probabilities(patches, own, sampler, times)
        on_window()
        return found.flatten(1, 2)

    stack = image[None] if dims == 3 else image.movedim(-1, 0)
    spatial = stack.shape[2:]
    size = windows.size and tuple(min(a, b) for a, b in zip(windows.size, spatial, strict=True))
    if size is None or size == tuple(spatial):
        parts = [
            predict(part, [(first + i, *[0] * len(spatial)) for i in range(len(part))])
            for first, part in zip(
                range(0, len(stack), windows.batch_size), stack.split(windows.batch_size), strict=True
            )
        ]
        flat = torch.cat(parts)
    else:
        flat = sliding_window_inference(
            stack,
            size,
            windows.batch_size,
            lambda patches, where: predict(patches, [_corner(place) for place in where]),
            overlap=windows.overlap,
            mode="gaussian",
            with_coord=True,
        )
    members = flat.unflatten(1, (len(seeds), -1))
    return members[0] if dims == 3 else members.movedim(0, -1)


def _corner(place: Sequence[slice]) -> tuple[int, ...]:
    """(batch index, first voxel of every axis) of a window, from MONAI's slices (batch, channels, *axes)."""
    return (place[0].start, *(axis.start for axis in place[2:]))


def count_batches(shape: Sequence[int], windows: Windows, dims: int) -> int:
    """How often `segment` calls ``on_window`` for an image of ``shape`` (C, I, J, K)."""
    spatial = tuple(shape[1:]) if dims == 3 else tuple(shape[1:3])
    count = 1 if dims == 3 else shape[3]
    if windows.size is not None:
        size = [min(a, b) for a, b in zip(windows.size, spatial, strict=True)]
        steps = [max(1, int(n * (1 - windows.overlap))) for n in size]
        for axis, side, step in zip(spatial, size, steps, strict=True):
            count *= -(-(axis - side) // step) + 1
    return -(-count // windows.batch_size)
