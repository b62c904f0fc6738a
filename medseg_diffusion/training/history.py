"""Reads what `medseg_diffusion.training.log` writes, also while the training goes on."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from medseg_diffusion.metrics.training_history import THROUGHPUT, History


def is_logged(folder: Path) -> bool:
    """Whether a training has logged something in a folder."""
    return (folder / "log.csv").is_file() or (folder / "steps.csv").is_file()


def read_history(folder: Path) -> History:
    """The history of the training in a run folder. What is being written at this moment is left out.

    A resumed call starts at a checkpoint: the steps after it, which it repeats, replace those of the call before.
    """
    entries: dict[int, tuple[float, float, float]] = {}  # step -> loss, gradient norm, seconds since the step before
    seconds, calls, call, written = 0.0, 0, math.nan, math.nan
    for row in _numbers(folder / "steps.csv"):
        try:
            step, time = int(row["step"]), row["time"]
            values = row["loss"], row["gradient_norm"]
            new_call = row["call"] != call
        except KeyError:
            continue
        if new_call:  # the time between two calls is not the training's
            entries = {past: entry for past, entry in entries.items() if past < step}
            calls, call, written = calls + 1, row["call"], math.nan
        since = time - written
        entries[step] = (*values, since)
        seconds, written = seconds + (0.0 if new_call else since), time
    steps = sorted(entries)
    loss, norm, took = np.asarray([entries[step] for step in steps], dtype=np.float64).reshape(-1, 3).T
    validations = tuple(
        {name: value for name, value in row.items() if name not in THROUGHPUT} for row in _numbers(folder / "log.csv")
    )
    return History(np.asarray(steps, dtype=np.float64), loss, norm, took, validations, seconds, calls, written)


def _numbers(file: Path) -> Iterator[dict[str, float]]:
    """The rows of a file, without what is no number; a step is always one."""
    if not file.is_file():
        return
    with file.open(newline="", encoding="utf-8", errors="replace") as content:
        lines = (line for line in content if line.endswith("\n"))  # the last one is being written
        for row in csv.DictReader(lines):
            numbers = {}
            for name, text in row.items():
                with suppress(TypeError, ValueError):
                    numbers[name] = float(text)
            if not math.isfinite(numbers.get("step", math.nan)):
                continue
            yield numbers
