"""An image to an ensemble of class probabilities: whole, in windows, or slice by slice."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from monai.inferers import sliding_window_inference
from torch import Tensor

from medseg_diffusion.device import at_once
from medseg_diffusion.diffusion.noise import derive_seed
from medseg_diffusion.sampling.loop import Sampler


class Segmenter(Protocol):
    """What samples masks of images: (B, C, *S) and N seeds an image to probabilities (B, N, K, *S)."""

    def probabilities(
        self, image: Tensor, seeds: Sequence[Sequence[int]], sampler: Sampler, times: Sequence[int]
    ) -> Tensor: ...


@dataclass(frozen=True)
class Windows:
    """How an image is cut: window size (None: whole), overlap of neighbours in [0, 1), windows or slices per batch.

    ``batch_size`` None takes as many as `sampling.loop.at_once` says, all members of an ensemble counted.
    """

    size: tuple[int, ...] | None = None
    overlap: float = 0.25
    batch_size: int | None = None

    def of(self, spatial: Sequence[int]) -> tuple[int, ...]:
        """The size of a window in an image of the size ``spatial``."""
        return tuple(spatial if self.size is None else map(min, self.size, spatial))

    def batch(self, spatial: Sequence[int], members: int, device: torch.device) -> int:
        """How many windows or slices of an image of this size share a batch."""
        return self.batch_size or at_once(members * math.prod(self.of(spatial)), device)


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
    axis, in batches. The noise of a window depends on the member's seed and the window's place alone, never on what
    shares its batch. All slices of a member have the same noise: a member is a mask of the whole volume then, and not
    a stack of unrelated ones, whose differences would cancel in volumes and in their intervals.

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
        # Of a slice only the place within it counts.
        own = [[derive_seed(seed, *corner[3 - dims :]) for seed in seeds] for corner in corners]
        found = model.probabilities(patches, own, sampler, times)
        on_window()
        return found.flatten(1, 2)

    stack = image[None] if dims == 3 else image.movedim(-1, 0)
    spatial = stack.shape[2:]
    size, batch = windows.of(spatial), windows.batch(spatial, len(seeds), image.device)
    if size == tuple(spatial):
        parts = [
            predict(part, [(first + i, *[0] * len(spatial)) for i in range(len(part))])
            for first, part in zip(range(0, len(stack), batch), stack.split(batch), strict=True)
        ]
        flat = torch.cat(parts)
    else:
        flat = sliding_window_inference(
            stack,
            size,
            batch,
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


def count_batches(shape: Sequence[int], windows: Windows, dims: int, members: int, device: torch.device) -> int:
    """How often `segment` calls ``on_window`` for an image of ``shape`` (C, I, J, K) and so many members."""
    spatial = tuple(shape[1:]) if dims == 3 else tuple(shape[1:3])
    count = 1 if dims == 3 else shape[3]
    size = windows.of(spatial)
    steps = [max(1, int(n * (1 - windows.overlap))) for n in size]
    for axis, side, step in zip(spatial, size, steps, strict=True):
        count *= -(-(axis - side) // step) + 1
    return -(-count // windows.batch(spatial, members, device))
