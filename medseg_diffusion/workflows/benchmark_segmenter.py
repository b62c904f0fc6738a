"""What sampler, steps and ensemble size buy: the whole of `medseg benchmark-segmenter` as a function.

OUT/benchmark.csv, benchmark.json   one row per model and setting, one factor changed at a time
OUT/benchmark.png                   Dice against network evaluations
OUT/cases.csv                       one row per model, setting, case and class
"""

from __future__ import annotations

import csv
import functools
import io
import json
import operator
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medseg_diffusion import build
from medseg_diffusion.data.cases import Case, digest, find_cases, split_by_hash
from medseg_diffusion.data.mask_examples import read_case
from medseg_diffusion.device import keep_freed_memory
from medseg_diffusion.diffusion.noise import derive_seed
from medseg_diffusion.errors import UsageError
from medseg_diffusion.files import write_files
from medseg_diffusion.methods.ensemble import tempered
from medseg_diffusion.metrics.calibration import Reliability, region
from medseg_diffusion.metrics.overlap import label_overlap
from medseg_diffusion.metrics.statistics import Interval, mean_interval
from medseg_diffusion.metrics.surface import hd95
from medseg_diffusion.models.load import load_segmenter
from medseg_diffusion.models.segmentation import SegmentationModel
from medseg_diffusion.reports.plots import quality_plot
from medseg_diffusion.reports.summary import json_ready
from medseg_diffusion.volumes.volume import Volume

STEPS = (1, 2, 5, 10, 20, 50, 100)
ENSEMBLES = (1, 2, 5, 10)
SAMPLERS = ("dpm++", "ddim", "ddpm")
Side = Literal["validation", "test"]


@dataclass(frozen=True)
class Setting:
    """How a model samples; ``factor`` is what this row varies."""

    factor: Literal["steps", "ensemble", "sampler", "setting", "feed-forward"]
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
        ece: expected calibration error around the reference, all cases together, of what `medseg segment` writes.
        ece_uncalibrated: the same without the model's temperature, which holds for its own sampler and steps alone.
        ece_everywhere: as ``ece``, of all voxels: certain background is most of them.
        evaluations: of the network, per case and window.
        seconds: per case, median over cases: everything between the read scan and the mask on its grid.
        cases: their number.
        by_case: what the means are of, and volumes: one entry per case and class.
    """

    model: str
    setting: Setting
    dice: dict[str, Interval]
    iou: dict[str, Interval]
    hd95_mm: dict[str, Interval]
    ece: float
    ece_uncalibrated: float
    ece_everywhere: float
    evaluations: int
    seconds: float
    cases: int
    by_case: list[dict[str, Any]] = field(repr=False)

    @property
    def mean_dice(self) -> float:
        """Mean over classes."""
        return float(np.nanmean([interval.mean for interval in self.dice.values()]))

    def cells(self) -> dict[str, Any]:
        """The row as a table shows it."""
        return {
            **self.key(),
            "evaluations": self.evaluations,
            **{f"Dice {name}": str(interval) for name, interval in self.dice.items()},
            "IoU": round(float(np.nanmean([interval.mean for interval in self.iou.values()])), 4),
            "HD95 mm": round(float(np.nanmean([interval.mean for interval in self.hd95_mm.values()])), 2),
            "HD95 missing": sum(interval.n_missing for interval in self.hd95_mm.values()),
            "ECE": round(self.ece, 4),
            "ECE uncalibrated": round(self.ece_uncalibrated, 4),
            "ECE everywhere": round(self.ece_everywhere, 4),
            "s per case": round(self.seconds, 3),
            "cases": self.cases,
        }

    def key(self) -> dict[str, Any]:
        """What tells this row from others."""
        return {"model": self.model, **asdict(self.setting)}


def benchmark_segmenter(
    models: Sequence[str],
    data: Path,
    output: Path,
    *,
    steps: Sequence[int] = STEPS,
    ensembles: Sequence[int] = ENSEMBLES,
    samplers: Sequence[str] = SAMPLERS,
    settings: Sequence[tuple[str, int, int]] = (),
    cases: int | None = 10,
    side: Side = "validation",
    device: str = "auto",
    seed: int = 0,
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    on_row: Callable[[BenchmarkRow], None] = lambda row: None,
) -> list[BenchmarkRow]:
    """Segments held-out cases at many settings of every model and scores them on the scans' own grids.

    Steps are varied for one sample; the ensemble's size and the sampler at the model's own number of steps. All models,
    samplers and cases are checked first.

    Args:
        models: names or folders.
        data: the labelled folder that the models were trained on. A model knows its held-out cases by a `digest` of
            their names; an older one, that does not, by splitting the folder again.
        output: folder for the results.
        steps: numbers of denoiser calls per sample.
        ensembles: numbers of samples.
        samplers: update rules.
        settings: (sampler, steps, ensemble) to measure instead of one factor at a time.
        cases: how many, the first by name; None for all.
        side: choose settings on "validation", report on "test".
        device: auto, cpu, cuda, cuda:N or mps.
        seed: as that of `medseg segment`.
        on_progress: called after every case with (setting, cases done, cases).
        on_row: called after every setting.

    Raises:
        UsageError: no case on this side, or an unknown sampler.
        InputError: unusable data, or a case whose labels are on another grid or of other classes.
        ModelError: no usable model.
    """
    keep_freed_memory()  # as `medseg segment` does
    named = find_cases(data).labels
    plan: list[tuple[str, Setting, list[Case]]] = []
    for name in models:
        model = load_segmenter(name, device)
        chosen = _cases(model, data, side, cases)
        for case in chosen:
            _read(case, model, named)
        plan += [(name, setting, chosen) for setting in _settings(model, steps, ensembles, samplers, settings)]
    for _, setting, _ in plan:
        if setting.factor != "feed-forward":
            build.sampler(setting.sampler)
    known: dict[tuple[str, str, int, int], BenchmarkRow] = {}
    rows: list[BenchmarkRow] = []
    for name, setting, chosen in plan:
        same = (name, setting.sampler, setting.steps, setting.ensemble)
        if same not in known:
            known[same] = _row(name, setting, chosen, named, device, seed, on_progress)
        rows.append(replace(known[same], setting=replace(known[same].setting, factor=setting.factor)))
        on_row(rows[-1])
        _write(rows, output)
    return rows


def _settings(
    model: SegmentationModel,
    steps: Sequence[int],
    ensembles: Sequence[int],
    samplers: Sequence[str],
    settings: Sequence[tuple[str, int, int]],
) -> Iterator[Setting]:
    own = model.inference
    if not model.samples_masks:
        yield Setting("feed-forward", "", 1, own.ensemble)
        return
    if settings:
        yield from (Setting("setting", *setting) for setting in settings)
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
    held_out = model.saved.card.get("training", {}).get("held_out")
    if held_out is None:
        held_out = split_by_hash(known, section.test_cases or 0, section.validation_cases or 0).held_out()
    chosen = [case for case in known if digest(case.name) in held_out[side]][:count]
    if not chosen:
        raise UsageError(f"{data}: model {model.saved.name} has no {side} cases in it; use the other side")
    return chosen


def _read(case: Case, model: SegmentationModel, named: Collection[int]) -> tuple[Volume, Volume]:
    return read_case(case, model.channels, len(model.labels), model.merge_labels, named)


def _row(
    name: str,
    setting: Setting,
    cases: Sequence[Case],
    named: Collection[int],
    device: str,
    seed: int,
    on_progress: Callable[[str, int, int], None],
) -> BenchmarkRow:
    feed_forward = setting.factor == "feed-forward"
    model = load_segmenter(
        name,
        device,
        setting.ensemble,
        None if feed_forward else setting.steps,
        None if feed_forward else setting.sampler,
    )
    # Probabilities are wanted with and without the temperature.
    calibration = model.aggregation.calibration
    model.aggregation = replace(model.aggregation, calibration=None)
    temperature = 1.0 if calibration is None else calibration.temperature(model.ensemble)
    walked = model.num_steps if model.samples_masks else 1
    labels = {value: label for value, label in model.labels.items() if value}
    by_case: list[dict[str, Any]] = []
    reliability: list[tuple[Reliability, ...]] = []
    seconds = []
    what = f"{model.saved.name}: {setting.sampler} {walked} steps, ensemble {setting.ensemble}"
    for done, case in enumerate(cases, 1):
        volume, reference = _read(case, model, named)
        started = time.perf_counter()
        found = model.segment(volume, derive_seed(seed, case.name))
        seconds.append(time.perf_counter() - started)
        predicted, truth = found.labels.numpy(), reference.data[0].numpy()
        overlap = label_overlap(predicted, truth, labels)
        voxel_ml = float(np.prod(reference.spacing)) / 1000
        for value, label in labels.items():
            by_case.append(
                {
                    "case": case.name,
                    "class": label,
                    "dice": overlap[value].dice,
                    "iou": overlap[value].iou,
                    "hd95_mm": hd95(predicted == value, truth == value, reference.spacing),
                    "ml": float((predicted == value).sum()) * voxel_ml,
                    "reference_ml": float((truth == value).sum()) * voxel_ml,
                }
            )
        near = region(truth)
        raw = found.probabilities.numpy()
        given = tempered(found.probabilities, temperature).numpy()
        reliability.append(
            (Reliability.of(given, truth, near), Reliability.of(raw, truth, near), Reliability.of(given, truth))
        )
        on_progress(what, done, len(cases))
    ece, ece_uncalibrated, ece_everywhere = (
        functools.reduce(operator.add, parts).ece for parts in zip(*reliability, strict=True)
    )
    means = {
        kind: {
            label: mean_interval([row[kind] for row in by_case if row["class"] == label]) for label in labels.values()
        }
        for kind in ("dice", "iou", "hd95_mm")
    }
    return BenchmarkRow(
        name,
        Setting(setting.factor, setting.sampler, walked, setting.ensemble),
        means["dice"],
        means["iou"],
        means["hd95_mm"],
        ece,
        ece_uncalibrated,
        ece_everywhere,
        walked * setting.ensemble,
        float(np.median(seconds)),
        len(cases),
        by_case,
    )


def _write(rows: Sequence[BenchmarkRow], output: Path) -> None:
    short = {row.model: Path(row.model).name for row in rows}
    if len(set(short.values())) < len(short):
        short = {name: name for name in short}
    lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
    levels: dict[str, float] = {}
    for row in rows:
        setting = row.setting
        if setting.factor == "feed-forward":
            levels[f"{short[row.model]}, feed-forward"] = row.mean_dice
        elif setting.factor != "sampler":
            chosen = f"{setting.sampler}, {setting.ensemble} sample{'s' * (setting.ensemble > 1)}"
            varied = chosen if setting.factor == "setting" else setting.factor
            lines.setdefault((short[row.model], varied), []).append((row.evaluations, row.mean_dice))
    write_files(
        output,
        {
            "benchmark.csv": _csv([row.cells() for row in rows]),
            "cases.csv": _csv([{**row.key(), **case} for row in rows for case in row.by_case]),
            "benchmark.json": json.dumps(json_ready([asdict(row) for row in rows]), indent=2, allow_nan=False) + "\n",
            "benchmark.png": quality_plot(lines, levels),
        },
    )


def _csv(table: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in table for key in row)), restval="")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()
