"""Reads what `medseg_diffusion.training.log` writes, also while the training goes on."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from medseg_diffusion.metrics.training_history import THROUGHPUT, History

_LOSS, _NORM = "train/loss", "train/gradient_norm"


def is_logged(folder: Path) -> bool:
    """Whether a training has logged something in a folder."""
    return (folder / "log.csv").is_file() or any(folder.glob("tensorboard/events*"))


def read_history(folder: Path) -> History:
    """The history of the training in a run folder. What is being written at this moment is left out.

    A resumed call starts at a checkpoint: the steps after it, which it repeats, replace those of the call before.
    """
    entries: dict[int, dict[str, float]] = {}
    seconds, calls, written = 0.0, 0, math.nan
    for file in sorted(folder.glob("tensorboard/events*"), key=_started):
        times: list[float] = []
        previous, first = math.nan, True
        for time, step, name, value in _scalars(file):
            if name in (_LOSS, _NORM):
                if first:  # the first step of a call; a validation of the step before it may come earlier
                    entries = {past: entry for past, entry in entries.items() if past < step}
                first = False
                entry = entries.setdefault(step, {})
                if name == _LOSS:
                    entry["seconds"], previous = time - previous, time
                entry[name] = value
            times.append(time)
        if times:
            seconds, calls, written = seconds + times[-1] - times[0], calls + 1, times[-1]
    steps = sorted(entries)

    def column(name: str) -> np.ndarray:
        return np.asarray([entries[step].get(name, math.nan) for step in steps], dtype=np.float64)

    return History(
        np.asarray(steps, dtype=np.float64),
        column(_LOSS),
        column(_NORM),
        column("seconds"),
        tuple(_validations(folder / "log.csv")),
        seconds,
        calls,
        written,
    )


def _started(file: Path) -> tuple[int, int]:
    """Time and number in the name of an event file, such as events.out.tfevents.1795947409.host.13308.0."""
    numbers = [int(part) for part in file.name.split(".") if part.isdecimal()]
    return (numbers[0], numbers[-1]) if numbers else (0, 0)


def _scalars(file: Path) -> Iterator[tuple[float, int, str, float]]:
    """Time, step, name and value of every complete entry."""
    # Imported where used: slow, and only reports need it.
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
    from tensorboard.compat import tf

    with suppress(tf.errors.DataLossError):  # the last entry is being written
        for event in LegacyEventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.WhichOneof("value") == "simple_value":
                    yield event.wall_time, event.step, value.tag, value.simple_value


def _validations(file: Path) -> Iterator[dict[str, float]]:
    """The rows of log.csv, without what is no number and without the numbers of `THROUGHPUT`."""
    if not file.is_file():
        return
    with file.open(newline="", encoding="utf-8", errors="replace") as content:
        for row in csv.DictReader(content):
            numbers = {}
            for name, text in row.items():
                if name not in THROUGHPUT:
                    with suppress(TypeError, ValueError):
                        numbers[name] = float(text)
            if math.isfinite(numbers.get("step", math.nan)):
                yield numbers
