"""Numbers of the steps that are still on the device."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from .health import StepNumbers

LONGEST_S = 1.0
"""Numbers of a process that trains alone wait no longer than this, so that slow steps are shown at once."""


class Readings:
    """Loss and gradient norms of the last steps.

    Reading a number back waits until the device has computed it, and the device then waits for work. The numbers of
    several steps are therefore read together.

    Args:
        every: read back at the steps that are multiples of this.
        alone: there are no other processes, which would have to read at the same steps.
    """

    def __init__(self, every: int, alone: bool) -> None:
        self.every, self.alone = every, alone
        self.pending: list[tuple[int, Tensor]] = []
        self.read_at = -LONGEST_S  # the first step is shown at once

    def add(self, step: int, loss: Tensor, norms: Sequence[Tensor]) -> None:
        """Takes the numbers of a step, scalars on the device."""
        self.pending.append((step, torch.stack([loss, *norms])))

    def due(self, step: int) -> bool:
        """Whether to read back after ``step``."""
        return step % self.every == 0 or (self.alone and time.monotonic() - self.read_at >= LONGEST_S)

    def read(self) -> list[StepNumbers]:
        """The numbers that were added since the last time; waits for the device."""
        if not self.pending:
            return []
        steps, numbers = zip(*self.pending, strict=True)
        rows: list[list[float]] = torch.stack(numbers).tolist()
        self.pending, self.read_at = [], time.monotonic()
        return [StepNumbers(step, loss, tuple(norms)) for step, (loss, *norms) in zip(steps, rows, strict=True)]
