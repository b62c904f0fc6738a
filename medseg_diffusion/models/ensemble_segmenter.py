"""What the segmenters share: from a scan to the members on the model's grid, and from there to the segmentation."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from medseg_diffusion.device import process_bytes
from medseg_diffusion.diffusion.noise import derive_seed
from medseg_diffusion.methods.ensemble import Ensemble
from medseg_diffusion.methods.seen import Seen
from medseg_diffusion.methods.windows import Windows
from medseg_diffusion.volumes.preprocessing import Box, Placement, Preprocessing
from medseg_diffusion.volumes.volume import Volume

from .doubts import with_doubts
from .finder import NOT_FOUND, Finder
from .inference import filled_up_to
from .memory import Limit, network_bytes
from .passes import MemoryLimitedSegmenter, Pass, Slabs, on_model_grid, stepping_down
from .segmentation import Aggregation, Map, Segmentation


class EnsembleSegmenter:
    """Samples an ensemble and combines it (`SegmentationModel`).

    Attributes:
        model: the trained network with its task, on ``device``.
        way: how it is sampled.
        finder: finds the part of a scan that is segmented; None for all of it.
        smaller_windows: whether smaller windows need less memory.
        max_memory: most memory of the process in GB, or None (`memory.Limit`).
        seen: what the training scans measured; None for a model that does not tell.
    """

    model: Any  # a module and a `methods.segment.Segmenter`
    way: Pass
    device: torch.device
    preprocessing: Preprocessing
    labels: dict[int, str]
    ensemble: int
    aggregation: Aggregation
    channels: int
    finder: Finder | None = None
    smaller_windows = True
    max_memory: float | None = None
    dims: int
    seen: Seen | None = None

    @cached_property
    def _memory_limited(self) -> MemoryLimitedSegmenter:
        return self.way.memory_limited(self.model, self.device)

    def sample(
        self, volume: Volume, seed: int, on_progress: Callable[[float], None] = lambda done: None
    ) -> tuple[Ensemble, Placement]:
        image, placement = on_model_grid(self.preprocessing, volume, self.device, self._box(volume))
        slabs = self._slabs(self._memory_limited, image.to(self.device), seed, on_progress, self.way)
        return slabs.joined(), placement

    def segment(
        self,
        volume: Volume,
        seed: int = 0,
        on_progress: Callable[[float], None] = lambda done: None,
        maps: Collection[Map] = (),
        chosen: Collection[int] | None = None,
    ) -> Segmentation:
        if self._limit is not None:
            self._limit.before(volume)
        box = self._box(volume)
        image, placement = on_model_grid(self.preprocessing, volume, self.device, box)
        way = self.way if self._limit is None else self._limit.chosen(self.way, volume, image, maps)

        def run(windows: Windows, device: torch.device) -> Segmentation:
            with self._on(device) as model:
                model.allowed = way.samples
                filled_up_to(self.model, way.samples)
                slabs = self._slabs(model, image.to(device), seed, on_progress, replace(way, windows=windows))
                return self.aggregation.combine(slabs, placement, maps, chosen)

        spatial = image.shape[1 : 1 + way.dims]
        segmentation = stepping_down(run, way.windows, spatial, self.device, self.smaller_windows)
        missed = [NOT_FOUND] if self.finder is not None and box is None else []
        if self.seen is None and not missed:
            return segmentation
        names, orientation = self.aggregation.foreground, self.preprocessing.orientation
        return with_doubts(segmentation, self.seen or Seen(0), volume, image, names, self.dims, orientation, missed)

    def _box(self, volume: Volume) -> Box | None:
        """The part of a scan that is segmented; None for all of it."""
        return None if self.finder is None else self.finder.box(volume, self.device)

    @cached_property
    def _limit(self) -> Limit | None:
        if self.max_memory is None:
            return None
        on_cpu = self.device.type == "cpu"
        network, positions = network_bytes(self.model, self.way, self.channels, self.device) if on_cpu else (0.0, 1)
        window = None if self.smaller_windows else positions
        return Limit(round(self.max_memory * 1e9), process_bytes(), len(self.labels), self.ensemble, network, window)

    def _slabs(
        self, model: MemoryLimitedSegmenter, image: Tensor, seed: int, on_progress: Callable[[float], None], way: Pass
    ) -> Slabs:
        seeds = [derive_seed(seed, member) for member in range(self.ensemble)]
        return way.slabs(model, image, seeds, len(self.labels), on_progress)

    @contextmanager
    def _on(self, device: torch.device) -> Iterator[MemoryLimitedSegmenter]:
        """The model, moved to ``device`` for the block."""
        if device == self.device:
            yield self._memory_limited
            return
        self.model.to(device)
        try:
            yield self.way.memory_limited(self.model, device)
        finally:
            self.model.to(self.device)
