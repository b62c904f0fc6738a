"""Rows of a benchmark with given numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from medseg_diffusion.metrics.ambiguity import ReaderSummary
from medseg_diffusion.metrics.benchmark_summary import BenchmarkRow, Setting
from medseg_diffusion.metrics.statistics import mean_interval


def row(
    *,
    model: str = "runs/model",
    factor: Any = "setting",
    sampler: str = "ddim",
    steps: int = 1,
    ensemble: int = 1,
    x_t: Any = "own",
    dice: Sequence[float] = (0.5, 0.6),
    energy: Sequence[float] | None = None,
    first_case: int = 0,
) -> BenchmarkRow:
    """A row of one class; a number for each case, each of a patient of its own."""
    entries = [
        {"case": f"case{first_case + i}", "patient": f"patient{first_case + i}", "class": "lesion", "dice": value}
        for i, value in enumerate(dice if energy is None else [0.5] * len(energy))
    ]
    readers = None
    if energy is not None:
        entries = [{**entry, "energy_distance": value} for entry, value in zip(entries, energy, strict=True)]
        mean = mean_interval(energy)
        readers = ReaderSummary(mean, mean, mean, mean, mean, 0.1)
    scores = mean_interval([float(entry["dice"]) for entry in entries])
    return BenchmarkRow(
        model=model,
        setting=Setting(factor, "" if factor == "feed-forward" else sampler, steps, ensemble, x_t),
        dice={"lesion": scores},
        iou={"lesion": scores},
        hd95_mm={"lesion": mean_interval([math.nan])},
        ece=0.1,
        ece_uncalibrated=0.2,
        ece_everywhere=0.01,
        evaluations=steps * ensemble,
        seconds=0.1 * steps * ensemble,
        cases=len(entries),
        patients=len(entries),
        pairwise_dice=1.0,
        readers=readers,
        by_case=entries,
    )
