"""Samples the members of an ensemble slab by slab, with as many at once as memory holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from medseg_diffusion.device import Precision, autocast_dtype, return_freed_memory
from medseg_diffusion.errors import remark
from medseg_diffusion.methods.ensemble import Ensemble
from medseg_diffusion.methods.segment import Segmenter, segment_slabs, slab_axis
from medseg_diffusion.methods.windows import Windows, count_batches
from medseg_diffusion.sampling.loop import Sampler
from medseg_diffusion.volumes.preprocessing import Box, Placement, Preprocessing
from medseg_diffusion.volumes.volume import Volume

PROBABILITIES_AT_ONCE = 2**28
"""Largest number of values of all members in memory (1 GB). Large scans take fewer members or slices at once."""
MEMBERS_AT_ONCE = 10
"""Largest number of members that share one encoding of the image."""
RESULT_BYTES = 2**28
"""Memory for the parts of the result on the scan's grid (`Placement.restored`), and for what is computed from them."""
LARGE_SLAB = 2**28
"""Bytes of a slab after which freed memory is returned to the system: gaps between such slabs took up to 1 GB."""
CPU = torch.device("cpu")

Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class Slabs:
    """The ensemble of an image in consecutive slabs, each computed when it is its turn.

    Attributes:
        parts: the slabs; they can be walked through once.
        axis: the image's axis along which they follow each other.
    """

    parts: Iterable[Ensemble]
    axis: int

    def joined(self) -> Ensemble:
        """The ensemble of the whole image."""
        return Ensemble.joined(self.parts, self.axis)


class MemoryLimitedSegmenter:
    """A segmenter that computes fewer samples at once after the GPU ran out of memory (`methods.segment.Segmenter`).

    A sample's noise depends on its seed alone, so that this changes results by rounding only.

    Args:
        model: the segmenter.
        dtype: type for autocast, or None.
        members: largest number of members of a window at once; None for all, always.
        groups: for each class, the group in which its probability is counted; None keeps the classes.
    """

    def __init__(
        self,
        model: Segmenter,
        dtype: torch.dtype | None,
        members: int | None,
        groups: Sequence[int] | None = None,
    ) -> None:
        self.model, self.dtype, self.members, self.groups = model, dtype, members, groups
        self.samples: int | None = None  # no limit so far
        self.allowed: int | None = None  # a limit for the present scan

    def probabilities(
        self, image: Tensor, seeds: Sequence[Sequence[int]], sampler: Sampler, times: Sequence[int]
    ) -> Tensor:
        while True:
            try:
                return self._in_parts(image, seeds, sampler, times)
            except torch.cuda.OutOfMemoryError:
                samples = self._at_once(len(image), len(seeds[0]))
                least = len(seeds[0]) if self.members is None else 1
                if samples <= least:
                    raise
                self.samples = max(least, samples // 2)
            # Outside of the handler, whose traceback keeps the tensors alive.
            torch.cuda.empty_cache()
            remark(f"out of GPU memory: {self.samples} samples at once instead of {samples}")

    def _at_once(self, windows: int, members: int) -> int:
        limits = [limit for limit in (self.samples, self.allowed) if limit is not None]
        least, most = (members, members) if self.members is None else (1, min(self.members, members))
        return max(least, min([most * windows, *limits]))

    def _in_parts(
        self, image: Tensor, seeds: Sequence[Sequence[int]], sampler: Sampler, times: Sequence[int]
    ) -> Tensor:
        samples = self._at_once(len(image), len(seeds[0]))
        members = len(seeds[0]) if self.members is None else min(self.members, len(seeds[0]), samples)
        windows = min(len(image), max(1, samples // members))
        context: Any = torch.autocast(image.device.type, self.dtype) if self.dtype else nullcontext()
        parts = []
        with torch.no_grad(), context:
            for i in range(0, len(image), windows):
                own = seeds[i : i + windows]
                parts.append(
                    [
                        self._grouped(
                            self.model.probabilities(
                                image[i : i + windows], [s[j : j + members] for s in own], sampler, times
                            ).float()
                        )
                        for j in range(0, len(seeds[0]), members)
                    ]
                )
        return _joined([_joined(part, 1) for part in parts], 0)

    def _grouped(self, probabilities: Tensor) -> Tensor:
        """The sums (B, N, G, *S) of the probabilities (B, N, K, *S) of the classes in each group."""
        if self.groups is None:
            return probabilities
        batch, members, _, *spatial = probabilities.shape
        sums = probabilities.new_zeros(batch, members, max(self.groups) + 1, *spatial)
        for value, group in enumerate(self.groups):  # one after another: index_add adds in any order on a GPU
            sums[:, :, group] += probabilities[:, :, value]
        return sums


def _joined(parts: Sequence[Tensor], axis: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), axis)


@dataclass(frozen=True)
class Pass:
    """How an image is sampled: sampler, times, windows and precision.

    Attributes:
        sampler: update rule.
        times: list of times.
        windows: cutting and batching.
        dims: dimensions of the model, 2 or 3.
        precision: precision of the network.
        values_at_once: largest number of probabilities in memory.
        samples: largest number of samples that the network computes at once, or None for as many as are in a batch.
        together: whether all members of a window are one computation, which cannot be divided.
        groups: for each class of the model, the group that takes its place; None keeps the classes. Members are grouped
            before anything is made of them. Where a thalamus has 0.4 and two kinds of white matter have 0.3 each, white
            matter is the more probable tissue, although the most probable structure is the thalamus.
    """

    sampler: Sampler
    times: Sequence[int]
    windows: Windows
    dims: int
    precision: Precision
    values_at_once: int = PROBABILITIES_AT_ONCE
    samples: int | None = None
    together: bool = False
    groups: Sequence[int] | None = None

    def memory_limited(self, model: Segmenter, device: torch.device) -> MemoryLimitedSegmenter:
        """The model with this precision on the device."""
        members = None if self.together else MEMBERS_AT_ONCE
        return MemoryLimitedSegmenter(model, autocast_dtype(device, self.precision), members, self.groups)

    def slabs(
        self, model: Segmenter, image: Tensor, seeds: Sequence[int], classes: int, on_progress: Callable[[float], None]
    ) -> Slabs:
        """Sample the ensemble of N seeds for ``image`` (C, I, J, K) of preprocessed intensities, on its device.

        If the slabs of all members do not fit into memory, some members are sampled after others. Then the whole image
        is one slab.
        """
        axis, shape = slab_axis(self.dims), tuple(image.shape)
        thickness = self.windows.thickness(shape, self.dims, len(seeds), image.device)
        values = classes * image[0].numel() // image.shape[axis + 1] * thickness
        count = len(seeds) if self.together else max(1, self.values_at_once // values)
        parts = [seeds[i : i + count] for i in range(0, len(seeds), count)]
        batches = sum(count_batches(shape, self.windows, self.dims, len(part), image.device) for part in parts)
        on_batch = counter(batches, on_progress)

        def sampled(part: Sequence[int]) -> Iterator[Ensemble]:
            for slab in segment_slabs(model, image, part, self.sampler, self.times, self.windows, self.dims, on_batch):
                large = slab.device.type == "cpu" and slab.nbytes >= LARGE_SLAB
                yield Ensemble.of(slab)
                del slab  # the next one needs its memory
                if large:
                    return_freed_memory()

        if len(parts) == 1:
            return Slabs(sampled(seeds), axis)
        whole = Ensemble.joined(sampled(parts[0]), axis)
        for part in parts[1:]:
            whole = whole.and_others(Ensemble.joined(sampled(part), axis))
        return Slabs([whole], axis)


def counter(total: int, on_progress: Callable[[float], None]) -> Callable[[], None]:
    """Make a function that counts its calls and reports their share of ``total`` to ``on_progress``."""
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        on_progress(min(1.0, done / total))

    return count


def on_model_grid(
    preprocessing: Preprocessing, volume: Volume, device: torch.device, box: Box | None = None
) -> tuple[Tensor, Placement]:
    """`Preprocessing.apply` on a GPU if the scan fits there, else on the CPU."""
    if device.type == "cuda":
        try:
            return preprocessing.apply(volume.like(volume.data.to(device)), box)
        except torch.cuda.OutOfMemoryError:
            pass
        torch.cuda.empty_cache()
    return preprocessing.apply(volume, box)


def stepping_down(
    run: Callable[[Windows, torch.device], Result],
    windows: Windows,
    spatial: Sequence[int],
    device: torch.device,
    smaller: bool = True,
) -> Result:
    """The result of ``run(windows, device)``; after the GPU ran out of memory, with smaller windows, then on the CPU.

    Each step is one warning. `MemoryLimitedSegmenter` has tried smaller batches before. Every scan begins anew, so
    that results do not depend on the scans before.

    Args:
        run: the computation.
        windows: cutting and batching.
        spatial: size of the images that are cut.
        device: where to begin.
        smaller: whether smaller windows need less memory.
    """
    whole, on_cpu = windows, False
    while True:
        try:
            return run(windows, device)
        except torch.cuda.OutOfMemoryError:
            if on_cpu:
                raise
        less = windows.smaller(spatial) if smaller else None
        if less is not None:
            windows, step = less, f"windows of {' x '.join(map(str, less.of(spatial)))}"
        else:
            windows, device, on_cpu, step = whole, CPU, True, "computing on the CPU"
        torch.cuda.empty_cache()
        remark(f"out of GPU memory: {step}")
