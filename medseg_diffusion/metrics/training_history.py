"""The numbers that a training has logged: every step's loss, and the validations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

THROUGHPUT = (
    "seconds_per_step",
    "examples_per_s",
    "waiting",
    "peak_memory_gb",
    "tflop_per_s",
    "flop_utilisation",
    "skipped_steps",
)
"""Columns of log.csv that tell how fast and how smoothly a training goes, not how good the model is."""


@dataclass(frozen=True, eq=False)
class History:
    """What one network's training has logged so far.

    Attributes:
        steps: (n,) steps in ascending order.
        loss: (n,) loss of each step; NaN where it was not logged.
        gradient_norm: (n,) norm of its gradient before clipping.
        step_seconds: (n,) time since the step before; NaN for the first one of a call.
        validations: Name -> number, one mapping for each validation, without `THROUGHPUT`; "step" is always there.
        seconds: Time of all calls together, from the first to the last entry of each.
        calls: Number of calls: one, and one for each time that the training was resumed.
        written: Time of the last entry, seconds since the epoch; NaN without any.
    """

    steps: Values
    loss: Values
    gradient_norm: Values
    step_seconds: Values
    validations: Sequence[Mapping[str, float]]
    seconds: float
    calls: int
    written: float

    @property
    def step(self) -> int:
        """The last step that was logged; 0 without any."""
        last = [int(self.steps[-1])] if len(self.steps) else []
        return max([*last, *(int(row["step"]) for row in self.validations)], default=0)

    @property
    def seconds_per_step(self) -> float:
        """Median over the steps: validations, which make single steps long, do not count. NaN without steps."""
        known = self.step_seconds[np.isfinite(self.step_seconds)]
        return float(np.median(known)) if known.size else math.nan

    @property
    def best(self) -> Mapping[str, float] | None:
        """The validation with the largest score, whose weights are stored; None before the first."""
        scored = [row for row in self.validations if math.isfinite(row.get("score", math.nan))]
        return max(scored, key=lambda row: row["score"]) if scored else None


@dataclass(frozen=True, eq=False)
class Binned:
    """Values of many steps, reduced to a few points for a plot.

    Attributes:
        steps: (m,) mean step of each bin.
        middle: (m,) mean of its values; NaN for a bin without any.
        low: (m,) smallest.
        high: (m,) largest.
    """

    steps: Values
    middle: Values
    low: Values
    high: Values


def binned(steps: Values, values: Values, bins: int = 200) -> Binned:
    """Reduce values to at most ``bins`` points of about equally many steps each; NaN is left out."""
    known = np.isfinite(values)
    parts = np.array_split(np.stack([steps[known], values[known]]), max(1, min(bins, int(known.sum()))), axis=1)
    parts = [part for part in parts if part.shape[1]]
    columns = [
        [float(part[0].mean()), float(part[1].mean()), float(part[1].min()), float(part[1].max())] for part in parts
    ]
    table = np.asarray(columns, dtype=np.float64).reshape(-1, 4)
    return Binned(*table.T)
