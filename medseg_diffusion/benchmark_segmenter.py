"""What sampler, steps and ensemble size buy: the whole of `medseg benchmark-segmenter` as a function.

OUT/benchmark.csv, benchmark.json   one row per model and setting, one factor changed at a time
OUT/benchmark.png                   Dice against network evaluations
"""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .data.cases import Case, find_cases, split_by_hash
from .diffusion.noise import derive_seed
from .errors import UsageError
from .metrics.calibration import Reliability, region
from .metrics.overlap import label_overlap
from .metrics.statistics import Interval, mean_interval
from .metrics.surface import hd95
from .pipeline import SegmentationModel
from .reports.files import write_files
from .reports.plots import quality_plot
from .reports.summary import json_ready
from .training.runtime import keep_freed_memory
from .volumes.io import read_labels, read_volume

STEPS = (1, 2, 5, 10, 20, 50, 100)
ENSEMBLES = (1, 2, 5, 10)
SAMPLERS = ("dpm++", "ddim", "ddpm")
Side = Literal["validation", "test"]


@dataclass(frozen=True)
class Setting:
    """How a model samples; ``factor`` is what this row varies."""

    factor: Literal["steps", "ensemble", "sampler", "feed-forward"]
    sampler: str
    steps: int
    ensemble: int


@dataclass(frozen=True)
class BenchmarkRow:
    """One model at one setting.

    Attributes:
        model: as it was named.
        setting: see `Setting`; ``steps`` is the number that was walked.
        dice: class name to mean Dice over cases.
        iou: the same of IoU.
        hd95_mm: the same of the 95th percentile Hausdorff distance.
        ece: expected calibration error around the reference, all cases together.
        evaluations: of the network, per case and window.
        seconds: per case, median over cases: everything between the read scan and the mask on its grid.
        cases: their number.
    """

    model: str
    setting: Setting
    dice: dict[str, Interval]
    iou: dict[str, Interval]
    hd95_mm: dict[str, Interval]
    ece: float
    evaluations: int
    seconds: float
    cases: int

    @property
    def mean_dice(self) -> float:
        """Mean over classes."""
        return float(np.nanmean([interval.mean for interval in self.dice.values()]))

    def cells(self) -> dict[str, Any]:
        """The row as a table shows it."""
        s = self.setting
        return {
            "model": self.model,
            "factor": s.factor,
            "sampler": s.sampler,
            "steps": s.steps,
            "ensemble": s.ensemble,
            "evaluations": self.evaluations,
            **{f"Dice {name}": str(interval) for name, interval in self.dice.items()},
            "IoU": round(float(np.nanmean([interval.mean for interval in self.iou.values()])), 4),
            "HD95 mm": round(float(np.nanmean([interval.mean for interval in self.hd95_mm.values()])), 2),
            "ECE": round(self.ece, 4),
            "s per case": round(self.seconds, 3),
        }


def benchmark_segmenter(
    models: Sequence[str],
    data: Path,
    output: Path,
    *,
    steps: Sequence[int] = STEPS,
    ensembles: Sequence[int] = ENSEMBLES,
    samplers: Sequence[str] = SAMPLERS,
    cases: int | None = 10,
    side: Side = "validation",
    device: str = "auto",
    seed: int = 0,
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    on_row: Callable[[BenchmarkRow], None] = lambda row: None,
) -> list[BenchmarkRow]:
    """Segments held-out cases at many settings of every model and scores them on the scans' own grids.

    Steps are varied for one sample; the ensemble's size and the sampler at the model's own number of steps.

    Args:
        models: names or folders.
        data: the labelled folder that the models were trained on: its split is theirs.
        output: folder for the results.
        steps: numbers of denoiser calls per sample.
        ensembles: numbers of samples.
        samplers: update rules.
        cases: how many, the first by name; None for all.
        side: choose settings on "validation", report on "test".
        device: auto, cpu, cuda, cuda:N or mps.
        seed: as that of `medseg segment`.
        on_progress: called after every case with (setting, cases done, cases).
        on_row: called after every setting.

    Raises:
        UsageError: no case on this side, or an unknown sampler.
        InputError: unusable data.
        ModelError: no usable model.
    """
    keep_freed_memory()  # as `medseg segment` does
    rows: list[BenchmarkRow] = []
    for name in models:
        chosen = _cases(SegmentationModel(name, device), data, side, cases)
        for setting in _settings(SegmentationModel(name, device), steps, ensembles, samplers):
            row = _row(name, setting, chosen, device, seed, on_progress)
            rows.append(row)
            on_row(row)
            _write(rows, output)
    return rows


def _settings(
    model: SegmentationModel, steps: Sequence[int], ensembles: Sequence[int], samplers: Sequence[str]
) -> Iterator[Setting]:
    own = model.inference
    if model.config.method in ("baseline", "label-efficient"):
        yield Setting("feed-forward", "", 1, own.ensemble)
        return
    for count in steps:
        yield Setting("steps", own.sampler, count, 1)
    for count in ensembles:
        yield Setting("ensemble", own.sampler, own.steps, count)
    for sampler in samplers:
        yield Setting("sampler", sampler, own.steps, 1)


def _cases(model: SegmentationModel, data: Path, side: Side, count: int | None) -> list[Case]:
    section = model.config.data
    known = find_cases(data).cases
    split = split_by_hash(known, section.test_cases, section.validation_cases)
    names = split.validation if side == "validation" else split.test
    chosen = [case for case in known if case.name in names][:count]
    if not chosen:
        raise UsageError(f"{data}: model {model.name} has no {side} cases in it; use the other side")
    return chosen


def _row(
    name: str,
    setting: Setting,
    cases: Sequence[Case],
    device: str,
    seed: int,
    on_progress: Callable[[str, int, int], None],
) -> BenchmarkRow:
    feed_forward = setting.factor == "feed-forward"
    model = SegmentationModel(
        name,
        device,
        setting.ensemble,
        None if feed_forward else setting.steps,
        None if feed_forward else setting.sampler,
    )
    walked = 1 if feed_forward else len(model.times) - 1
    labels = {value: label for value, label in model.labels.items() if value}
    scores: dict[str, dict[int, list[float]]] = {kind: {v: [] for v in labels} for kind in ("dice", "iou", "hd95")}
    reliability: Reliability | None = None
    seconds = []
    what = f"{model.name}: {setting.sampler} {walked} steps, ensemble {setting.ensemble}"
    for done, case in enumerate(cases, 1):
        volume, reference = read_volume(case.image, channels=None), read_labels(case.label)
        started = time.perf_counter()
        found = model.segment(volume, derive_seed(seed, case.name))
        seconds.append(time.perf_counter() - started)
        predicted, truth = found.labels.numpy(), reference.data[0].numpy()
        overlap = label_overlap(predicted, truth, labels)
        for value in labels:
            scores["dice"][value].append(overlap[value].dice)
            scores["iou"][value].append(overlap[value].iou)
            scores["hd95"][value].append(hd95(predicted == value, truth == value, reference.spacing))
        part = Reliability.of(found.probabilities.numpy(), truth, region(truth))
        reliability = part if reliability is None else reliability + part
        on_progress(what, done, len(cases))
    assert reliability is not None
    means = {
        kind: {labels[value]: mean_interval(found) for value, found in of_class.items()}
        for kind, of_class in scores.items()
    }
    return BenchmarkRow(
        name,
        Setting(setting.factor, setting.sampler, walked, setting.ensemble),
        means["dice"],
        means["iou"],
        means["hd95"],
        reliability.ece,
        walked * setting.ensemble,
        float(np.median(seconds)),
        len(cases),
    )


def _write(rows: Sequence[BenchmarkRow], output: Path) -> None:
    table = [row.cells() for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in table for key in row)), restval="")
    writer.writeheader()
    writer.writerows(table)
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.setting.factor != "sampler":
            line = f"{row.model}, {row.setting.factor}"
            lines.setdefault(line, []).append((row.evaluations, row.mean_dice))
    write_files(
        output,
        {
            "benchmark.csv": text.getvalue(),
            "benchmark.json": json.dumps(json_ready([asdict(row) for row in rows]), indent=2, allow_nan=False) + "\n",
            "benchmark.png": quality_plot(lines),
        },
    )
