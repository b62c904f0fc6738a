"""The log of a training run: log.csv and TensorBoard."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medseg_diffusion.files import whole_file


class TrainingLog:
    """Writes log.csv (one row per validation) and tensorboard/ (every step).

    Args:
        run: the run directory; it is made if missing.
        step: step at which this call starts.
        resume: keep the rows up to ``step`` and drop later ones; otherwise start a new log.
    """

    def __init__(self, run: Path, step: int, resume: bool) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        run.mkdir(parents=True, exist_ok=True)
        self.path = run / "log.csv"
        self.tensorboard = SummaryWriter(str(run / "tensorboard"), purge_step=step if resume else None)
        self.rows: list[dict[str, Any]] = []
        if resume and self.path.is_file():
            with self.path.open(newline="") as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["step"]) <= step]

    def step(self, step: int, loss: float, norm: float, when: float | None = None) -> None:
        """Logs the loss of one step and the norm of its gradient before clipping.

        ``when`` is the time at which it was done, in seconds since the epoch; None is now.
        """
        self.tensorboard.add_scalar("train/loss", loss, step, walltime=when)
        self.tensorboard.add_scalar("train/gradient_norm", norm, step, walltime=when)

    def validation(
        self,
        step: int,
        loss: float,
        rate: float,
        numbers: Mapping[str, float],
        throughput: Mapping[str, float] | None = None,
    ) -> None:
        """Logs one validation: the smoothed training loss, the learning rate and the validation's ``numbers``.

        ``throughput`` is how fast the training was since the last validation.
        """
        throughput = throughput or {}
        for group, values in (("validation", numbers), ("throughput", throughput)):
            for name, value in values.items():
                self.tensorboard.add_scalar(f"{group}/{name}", value, step)
        # A process that was killed between a validation and its resume file makes the validation again.
        self.rows = [earlier for earlier in self.rows if int(earlier["step"]) != step]
        row = {"step": step, "loss": f"{loss:.6g}", "learning_rate": f"{rate:.4g}"}
        self.rows.append({**row, **{name: f"{value:.6g}" for name, value in {**numbers, **throughput}.items()}})
        _write_csv(self.path, self.rows)

    def flush(self) -> None:
        """Writes what TensorBoard holds in memory, so that the steps before a resume file are not lost."""
        self.tensorboard.flush()

    def close(self) -> None:
        """Writes what TensorBoard still holds in memory."""
        self.tensorboard.close()


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with whole_file(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
