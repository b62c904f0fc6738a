"""Plots the validation losses of training runs over wall-clock time.

    python benchmarks/studies/training_curves.py OUT.png NAME=RUN... [--column loss]

Time is that of the steps in RUN/steps.csv. Pauses of an interrupted run count.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def curve(run: Path, column: str) -> tuple[list[float], list[float]]:
    """Minutes since the first step and value of every validation."""
    with (run / "steps.csv").open(newline="") as file:
        ended = {int(row["step"]): float(row["time"]) for row in csv.DictReader(file)}
    began = ended[min(ended)]
    minutes = {step: (time - began) / 60 for step, time in ended.items()}
    with (run / "log.csv").open(newline="") as file:
        rows = [(int(row["step"]), float(row[column])) for row in csv.DictReader(file) if row.get(column)]
    return [minutes[step] for step, _ in rows], [value for _, value in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN")
    parser.add_argument("--column", default="loss")
    options = parser.parse_args()
    figure, axes = plt.subplots(1, len(options.runs), figsize=(3.6 * len(options.runs), 3), layout="constrained")
    for panel, entry in zip([axes] if len(options.runs) == 1 else axes, options.runs, strict=True):
        name, _, run = entry.partition("=")
        panel.plot(*curve(Path(run), options.column), marker="o", markersize=3)
        panel.set(title=name, xlabel="minutes", ylabel=f"validation {options.column}")
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(options.out, dpi=130)


if __name__ == "__main__":
    main()
