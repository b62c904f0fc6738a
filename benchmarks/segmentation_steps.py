"""Dice per class against the number of steps and the size of the ensemble, on the test cases of a labelled folder.

    python benchmarks/segmentation_steps.py MODEL --data Task04_Hippocampus --steps 1 2 5 10 50 --ensemble 1 5

The members of the largest ensemble are sampled once for each number of steps; smaller ensembles are their first ones,
as `medseg segment` would draw them. Dice is measured on the scan's own grid.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path

import numpy as np

from medseg_diffusion.data.cases import find_cases, split_by_hash
from medseg_diffusion.diffusion.noise import derive_seed
from medseg_diffusion.metrics.overlap import label_overlap
from medseg_diffusion.metrics.statistics import mean_interval
from medseg_diffusion.pipeline import SegmentationModel
from medseg_diffusion.training.runtime import keep_freed_memory
from medseg_diffusion.volumes.io import read_labels, read_volume


def main() -> None:
    """Prints one row per (steps, ensemble) and writes them to --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 5, 10, 50])
    parser.add_argument("--ensemble", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--sampler", default=None)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--limit", type=int, default=None, help="only the first so many test cases")
    parser.add_argument("--out", type=Path, default=None, help="CSV file")
    options = parser.parse_args()
    keep_freed_memory()  # as `medseg segment` does
    rows = []
    for steps in options.steps:
        model = SegmentationModel(options.model, options.device, max(options.ensemble), steps, options.sampler)
        section = model.config.data
        cases = find_cases(options.data).cases
        split = split_by_hash(cases, section.test_cases, section.validation_cases)
        tests = [case for case in cases if case.name in split.test][: options.limit]
        labels = [label for label in model.labels if label]
        dice: dict[tuple[int, int], list[float]] = {}
        seconds = []
        for case in tests:
            volume, reference = read_volume(case.image, section.channels), read_labels(case.label)
            started = time.perf_counter()
            members, placement = model.sample(volume, derive_seed(0, case.name))
            seconds.append(time.perf_counter() - started)
            for count in options.ensemble:
                found = model.combine(members[:count], placement).labels
                overlap = label_overlap(found.numpy(), reference.data[0].numpy(), labels)
                for label in labels:
                    dice.setdefault((count, label), []).append(overlap[label].dice)
        for count in options.ensemble:
            row: dict[str, object] = {"steps": len(model.times) - 1, "ensemble": count, "cases": len(tests)}
            for label in labels:
                interval = mean_interval(dice[count, label])
                row[model.labels[label]] = str(interval)
            row["seconds per case"] = f"{np.mean(seconds) * count / max(options.ensemble):.2f}"
            print(row, flush=True)
            rows.append(row)
    if options.out is not None:
        with options.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
