"""Estimates the memory of a segmentation, and chooses batches and windows that stay below a limit."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from medseg_diffusion.errors import InputError, remark
from medseg_diffusion.methods.windows import Windows
from medseg_diffusion.volumes.volume import Volume

from .inference import not_compiled
from .passes import MEMBERS_AT_ONCE, RESULT_BYTES, Pass

FLOAT = 4


@dataclass(frozen=True)
class Limit:
    """The most memory that the process may take, by an estimate from the sizes of all arrays.

    Attributes:
        limit: in bytes.
        base: bytes of the process before its first scan. What it has now would depend on the scans before.
        classes: number of classes, background included.
        members: size of the ensemble.
        network: bytes of the network for each position of a sample; 0 on a GPU.
        fixed_window: positions of a sample if the size of windows does not matter, else None.
    """

    limit: int
    base: int
    classes: int
    members: int
    network: float
    fixed_window: int | None = None

    def before(self, volume: Volume) -> None:
        """InputError if the scan cannot be brought to the model's grid: it is copied, turned and sorted.

        The scans before and after it are in memory, too (`workflows.scans.each_scan`); they count as large as this one.
        """
        self._require(volume, self.base + 4 * FLOAT * volume.data.numel())

    def chosen(self, way: Pass, volume: Volume, image: Tensor, maps: Collection[str]) -> Pass:
        """How the image (C, *S) on the model's grid is sampled within the limit.

        Fewer samples at once come first, then members one after another, then smaller windows. Only the last changes
        results beyond rounding; it is warned of.

        Raises:
            InputError: not even the smallest windows fit.
        """
        native, voxels = math.prod(volume.shape), image[0].numel()
        several = self.members > 1
        on_scan = native * (3 + FLOAT * (self.classes * ("probabilities" in maps) + 2 * len(maps)))
        on_grid = voxels * (self.members + 1 + FLOAT * several)
        fixed = self.base + 3 * FLOAT * volume.data.numel() + 2 * on_scan + on_grid + RESULT_BYTES
        least = math.inf
        for windows in self._windows(way.windows, image.shape[1 : 1 + way.dims]):
            planes = windows.thickness(image.shape, way.dims, self.members, image.device)
            of_slab = FLOAT * self.classes * voxels // image.shape[1 if way.dims == 3 else 3] * planes
            positions = self.fixed_window or math.prod(windows.of(image.shape[1 : 1 + way.dims]))
            batch = windows.batch(image.shape[1 : 1 + way.dims], self.members, image.device)
            together = fixed + 3 * self.members * of_slab
            in_turn = fixed + 4 * of_slab + 3 * FLOAT * self.classes * voxels
            options = [
                (together, min(self.members, MEMBERS_AT_ONCE) * batch, way.values_at_once),
                (together, 1, way.values_at_once),
                (in_turn if several else together, 1, 1),
            ]
            for needed, samples, values in options[:1] if way.together else options:
                total = needed + self.network * positions * samples
                least = min(least, total)
                if total <= self.limit:
                    if windows is not way.windows:
                        size = " x ".join(map(str, windows.of(image.shape[1 : 1 + way.dims])))
                        remark(f"windows of {size} to stay below --max-memory")
                    return replace(way, windows=windows, samples=samples, values_at_once=values)
        self._require(volume, least)
        raise AssertionError

    def _windows(self, windows: Windows, spatial: Any) -> Iterator[Windows]:
        yield windows
        while self.fixed_window is None and (smaller := windows.smaller(spatial)) is not None:
            windows = smaller
            yield windows

    def _require(self, volume: Volume, needed: float) -> None:
        if needed > self.limit:
            size = " x ".join(map(str, volume.shape))
            raise InputError(
                volume.source,
                f"{size} voxels, which need about {needed / 1e9:.1f} GB",
                f"at most {self.limit / 1e9:g} GB, as --max-memory says",
                "allow more memory, crop the scan or take a machine with more",
            )


def network_bytes(model: Any, way: Pass, channels: int, device: torch.device) -> tuple[float, int]:
    """Bytes for each position of a sample, and positions: the outputs of all layers in one step of a small window."""
    spatial = way.windows.of((32,) * way.dims)
    image = torch.zeros(1, channels, *spatial, device=device)
    total = 0

    def add(module: torch.nn.Module, inputs: Any, out: Any) -> None:
        nonlocal total
        total += out.nbytes if isinstance(out, Tensor) else 0

    layers = [module for module in model.modules() if not list(module.children())]
    handles = [layer.register_forward_hook(add) for layer in layers]
    try:
        with not_compiled(model):
            way.memory_limited(model, device).probabilities(image, [[0]], way.sampler, way.times[-2:])  # one step
    finally:
        for handle in handles:
            handle.remove()
    positions = math.prod(spatial)
    return total / positions, positions
