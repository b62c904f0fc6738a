"""The log of a training run: log.csv, steps.csv, and trackers such as TensorBoard."""

from __future__ import annotations

import csv
import hashlib
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from medseg_diffusion.errors import UsageError
from medseg_diffusion.files import whole_file

from .run import read_run_file

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

Tracker = Literal["tensorboard", "mlflow", "wandb"]

PROJECT = "medseg-diffusion"
"""Name of the project at Weights & Biases, and of the experiment in MLflow."""
STEP_COLUMNS = ("step", "call", "time", "loss", "gradient_norm")


class TrainingLog:
    """Writes log.csv (one row per validation) and steps.csv (one row per step), and tells the trackers.

    Rows are appended to steps.csv, so that neither a kill nor a resumed call loses one. A resumed call repeats the
    steps after its checkpoint; its rows have a higher number of the call.

    Args:
        run: the run directory; it is made if missing.
        step: step at which this call starts.
        resume: keep the rows of log.csv up to ``step`` and drop later ones; otherwise start a new log.
        trackers: names of the trackers.

    Raises:
        InputError: the log.csv that is kept is damaged.
    """

    def __init__(self, run: Path, step: int, resume: bool, trackers: Sequence[Tracker] = ()) -> None:
        run.mkdir(parents=True, exist_ok=True)
        self.path = run / "log.csv"
        self.rows: list[dict[str, Any]] = []
        if resume and self.path.is_file():
            self.rows = [row for row in read_run_file(self.path, _rows) if int(row["step"]) <= step]
        steps = run / "steps.csv"
        before = steps.read_bytes() if resume and steps.is_file() else b""
        self.call = 1 + _last_call(before)
        # Each line is written at once: a process that is killed leaves whole rows.
        self.steps = steps.open("a" if before else "w", buffering=1)
        if not before:
            self.steps.write(",".join(STEP_COLUMNS) + "\n")
        elif not before.endswith(b"\n"):
            self.steps.write("\n")
        self.trackers = [_tracker(name, run, step if resume else 0) for name in trackers]

    def step(self, step: int, loss: float, norm: float, ended: float | None = None) -> None:
        """Logs the loss of one step and the norm of its gradient before clipping.

        Args:
            step: number of the step, from 1.
            loss: mean over the processes.
            norm: norm of the gradient.
            ended: time at which the step ended, seconds since the epoch; now by default.
        """
        moment = time.time() if ended is None else ended
        # Nine digits give a float32 back exactly.
        self.steps.write(f"{step},{self.call},{moment:.3f},{loss:.9g},{norm:.9g}\n")
        for tracker in self.trackers:
            tracker.log({"train/loss": loss, "train/gradient_norm": norm}, step=step)

    def validation(
        self,
        step: int,
        loss: float,
        rate: float,
        numbers: Mapping[str, float],
        throughput: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """Logs one validation: the smoothed training loss, the learning rate and the validation's ``numbers``.

        ``throughput`` is how fast the training was since the last validation.
        """
        # A process that was killed between a validation and its resume file makes the validation again.
        self.rows = [earlier for earlier in self.rows if int(earlier["step"]) != step]
        row = {"step": step, "loss": f"{loss:.6g}", "learning_rate": f"{rate:.4g}"}
        self.rows.append({**row, **{name: f"{value:.6g}" for name, value in {**numbers, **throughput}.items()}})
        _write_csv(self.path, self.rows)
        groups = {"validation": numbers, "throughput": throughput}
        values = {f"{group}/{name}": value for group, part in groups.items() for name, value in part.items()}
        for tracker in self.trackers:
            tracker.log(values, step=step)

    def close(self) -> None:
        """Writes what the trackers still hold in memory."""
        self.steps.close()
        for tracker in self.trackers:
            tracker.finish()


def require_trackers(trackers: Sequence[Tracker]) -> None:
    """UsageError for a tracker whose package is not installed."""
    for name in trackers:
        if find_spec(name) is None:
            raise UsageError(f"training.trackers: {name} is not installed; pip install 'medseg-diffusion[{name}]'")


def _tracker(name: Tracker, run: Path, step: int) -> GeneralTracker:
    """A tracker that has been started, of a call that starts at ``step``."""
    from accelerate.tracking import MLflowTracker, TensorBoardTracker, WandBTracker

    tracker: GeneralTracker
    if name == "tensorboard":
        tracker = TensorBoardTracker("tensorboard", run, purge_step=step + 1)
    elif name == "mlflow":
        tracker = MLflowTracker(PROJECT, run_name=run.name)
    else:
        # The same folder is the same run: a resumed call continues its curves.
        identity = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]
        tracker = WandBTracker(PROJECT, name=run.name, dir=run, id=identity, resume="allow")
    tracker.start()
    return tracker


def _rows(text: str) -> list[dict[str, Any]]:
    """The rows of log.csv; ValueError for one without the number of its step."""
    rows: list[dict[str, Any]] = list(csv.DictReader(text.splitlines()))
    for row in rows:
        int(row["step"])
    return rows


def _last_call(content: bytes) -> int:
    """Number of the call that wrote the last whole row of steps.csv; 0 without any."""
    for line in reversed(content.splitlines()):
        values = line.split(b",")
        if len(values) == len(STEP_COLUMNS) and values[1].isdigit():
            return int(values[1])
    return 0


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with whole_file(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
