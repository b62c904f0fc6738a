"""A process's share of every step's batch, on its device and in the parts that fit into its memory."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from medseg_diffusion.data.draws import FinishesBatches

from .interrupt import apart
from .runtime import Runtime


class Batches:
    """The batches of the steps from ``first_step`` up to, but without, ``last_step``, on the device.

    On a GPU, a batch is copied, and finished if ``draws`` leaves changes to that, while the step before is computed.

    Args:
        draws: the n-th training example by number.
        batch_size: examples per step over all processes together, which share it evenly.
        first_step: the step of the first batch.
        last_step: the step after that of the last batch.
        workers: processes that prepare examples; 0 prepares them in this process.
        runtime: device and processes.

    Attributes:
        waited: seconds in which this process waited for, or prepared, examples while its device had nothing to do.
    """

    def __init__(
        self,
        draws: Dataset[dict[str, Tensor]],
        batch_size: int,
        first_step: int,
        last_step: int,
        workers: int,
        runtime: Runtime,
    ) -> None:
        on_gpu = runtime.device.type == "cuda"
        self.runtime = runtime
        self.finish = draws.finish if isinstance(draws, FinishesBatches) else None
        self.copying = torch.cuda.Stream(runtime.device) if on_gpu else None
        self.waited = 0.0
        loader = DataLoader(
            draws,
            batch_size=batch_size // runtime.world_size,
            sampler=_StepSampler(first_step, last_step, batch_size, runtime.rank, runtime.world_size),
            num_workers=workers,
            persistent_workers=workers > 0,
            multiprocessing_context="spawn" if workers else None,
            worker_init_fn=apart,
            pin_memory=on_gpu,
        )
        self.of_loader: Iterator[dict[str, Tensor]] = iter(loader)  # starts the workers

    def close(self) -> None:
        """Ends the workers now; an error would keep them until the process ends."""
        self.of_loader = iter(())

    def __next__(self) -> Mapping[str, Tensor]:
        began = time.monotonic()
        batch = next(self.of_loader)
        if self.runtime.is_idle:
            self.waited += time.monotonic() - began
        return self._on_device(batch)

    def _on_device(self, batch: dict[str, Tensor]) -> Mapping[str, Tensor]:
        if self.copying is None:
            return self._finished(batch)
        with torch.cuda.stream(self.copying):
            moved = self._finished(batch)
        computing = torch.cuda.current_stream(self.runtime.device)
        computing.wait_stream(self.copying)
        for value in moved.values():
            if value.is_cuda:  # its memory may be used again only when the step that uses it is over
                value.record_stream(computing)
        return moved

    def _finished(self, batch: dict[str, Tensor]) -> Mapping[str, Tensor]:
        moved = self.runtime.to_device(batch)
        # No dict, as in `Runtime.to_device`.
        return moved if self.finish is None else MappingProxyType(self.finish(moved, self.runtime.device))


class _StepSampler(Sampler[int]):
    """Numbers of the examples that this process draws: of every step's batch, its consecutive share."""

    def __init__(self, first_step: int, last_step: int, batch_size: int, rank: int, world_size: int) -> None:
        self.steps, self.batch_size = range(first_step, last_step), batch_size
        self.share = batch_size // world_size
        self.offset = rank * self.share

    def __iter__(self) -> Iterator[int]:
        for step in self.steps:
            start = step * self.batch_size + self.offset
            yield from range(start, start + self.share)

    def __len__(self) -> int:
        return len(self.steps) * self.share


def part_of(batch: Mapping[str, Tensor], first: int, last: int) -> Mapping[str, Tensor]:
    """The examples from ``first`` up to, but without, ``last``."""
    # No dict, as in `Runtime.to_device`.
    return MappingProxyType({name: value[first:last] for name, value in batch.items()})


def passes(batch: Mapping[str, Tensor], at_once: int | None) -> list[tuple[float, Mapping[str, Tensor]]]:
    """Parts of at most ``at_once`` examples each, with their shares of the batch; None leaves the batch whole."""
    count = len(batch["seed"])
    if at_once is None or count <= at_once:
        return [(1.0, batch)]
    starts = range(0, count, at_once)
    return [(min(at_once, count - first) / count, part_of(batch, first, first + at_once)) for first in starts]
