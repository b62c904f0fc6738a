"""`medseg benchmark-segmenter`: compare step counts, ensemble sizes and samplers of segmenters.

OUT/report.html                     the page: what the numbers say, table, quality against cost
OUT/benchmark.csv, benchmark.json   one row per model and setting; one factor varies at a time
OUT/cases.csv                       one row per model, setting, case and class
"""

from __future__ import annotations

import csv
import functools
import io
import json
import math
import operator
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from medseg_diffusion import build
from medseg_diffusion.data.cases import Case, digest, find_cases, middle_cases, split_by_hash
from medseg_diffusion.data.file_lists import Data, FileList, folder_or_files
from medseg_diffusion.data.mask_examples import CaseFormat, read_case, read_case_labels
from medseg_diffusion.device import keep_freed_memory
from medseg_diffusion.diffusion.noise import derive_seed
from medseg_diffusion.errors import UsageError
from medseg_diffusion.files import require_folder, require_table, write_files
from medseg_diffusion.methods.ablation import Replacement
from medseg_diffusion.methods.ensemble import temperature_scaled
from medseg_diffusion.metrics.ambiguity import ReaderAgreement, ReaderSummary
from medseg_diffusion.metrics.benchmark_summary import BenchmarkRow, Setting
from medseg_diffusion.metrics.calibration import Reliability, region
from medseg_diffusion.metrics.overlap import label_overlap
from medseg_diffusion.metrics.statistics import Interval, mean_interval
from medseg_diffusion.metrics.surface import hd95
from medseg_diffusion.models.load import load_segmenter
from medseg_diffusion.models.segmentation import SegmentationModel
from medseg_diffusion.reports.benchmark_page import BenchmarkInfo, benchmark_page
from medseg_diffusion.reports.summary import json_ready
from medseg_diffusion.training.progress import OnProgress, count_of, silent
from medseg_diffusion.volumes.volume import Volume

Side = Literal["validation", "test"]


@dataclass(frozen=True)
class BenchmarkOptions:
    """The options of `medseg benchmark-segmenter`.

    Attributes:
        steps: Numbers of denoising steps to compare, for one sample.
        ensembles: Ensemble sizes to compare, at the model's own number of steps.
        samplers: Samplers to compare, at the model's own number of steps.
        settings: (sampler, steps, ensemble size) to measure instead of varying one factor at a time; None stands for
            the model's own, with which it is used and calibrated. Of a model without steps only the ensemble size
            counts.
        without_x_t: Also measure every sampling model of several steps with a replacement of x_t: with the given
            settings, or with the model's own and the largest of the ensemble sizes.
        cases: Number of cases, the first by name; None for all.
        one_per_patient: Take one case of each patient, the middle one by name.
        side: Held-out cases: "validation" to choose settings, "test" to report.
        device: auto, cpu, cuda, cuda:N or mps.
        seed: Seed of the samples, as in `medseg segment`.
        command: The command line, for the page.
    """

    steps: Sequence[int] = (1, 2, 5, 10, 20, 50, 100)
    ensembles: Sequence[int] = (1, 2, 5, 10)
    samplers: Sequence[str] = ("dpm++", "ddim", "ddpm")
    settings: Sequence[tuple[str, int, int] | None] = ()
    without_x_t: bool = False
    cases: int | None = 10
    one_per_patient: bool = False
    side: Side = "validation"
    device: str = "auto"
    seed: int = 0
    command: str = ""


def benchmark_segmenter(
    models: str | Path | Sequence[str | Path],
    data: Data,
    output: str | Path,
    options: BenchmarkOptions = BenchmarkOptions(),
    *,
    on_progress: OnProgress = silent,
    on_row: Callable[[BenchmarkRow], None] = lambda row: None,
) -> list[BenchmarkRow]:
    """Segment held-out cases at many settings of every model and compare the masks with the references.

    The number of steps varies for one sample; the ensemble size and the sampler vary at the model's own number of
    steps. All models, samplers and cases are checked before the first measurement.

    Args:
        models: One or more names or folders.
        data: The labelled folder or list that the models were trained on. A model recognises its held-out cases
            by a `digest` of their names. For an older model without digests the folder is split again.
        output: Folder for the results.
        options: The other options.
        on_progress: Called with a text and the share done, 0 to 1, after every case.
        on_row: Called after every setting.

    Raises:
        UsageError: No case on this side, an unknown sampler, or another table in the place of `cases.csv`.
        InputError: Unusable data, or a case whose labels are on another grid or of other classes.
        ModelError: No usable model.
    """
    files, output = folder_or_files(data), Path(output)
    names = [str(models)] if isinstance(models, str | Path) else [str(model) for model in models]
    require_folder(output)
    require_table(output / "cases.csv", ("model", "factor"))
    keep_freed_memory()  # as `medseg segment` does
    named_labels = find_cases(files).labels
    plan: list[tuple[str, Setting, list[Case]]] = []
    for name in names:
        model = load_segmenter(name, options.device)
        cases = _held_out_cases(model, files, options)
        for case in cases:
            volume, _ = _read(case, model, named_labels)
            for path in case.further_labels:
                _read_labels(path, volume, model, named_labels)
        settings = list(_settings(model, options))
        for sampler in dict.fromkeys(setting.sampler for setting in settings if setting.sampler):
            build.sampler(sampler)
            if sampler not in model.samplers:
                raise UsageError(f"{name}: {sampler} is no sampler of this model; use {', '.join(model.samplers)}")
        if known := _calibrated_on(model, cases):
            warnings.warn(f"{name}: {known} of the {len(cases)} cases calibrated it; its ECE is too good", stacklevel=2)
        if options.without_x_t and not any(setting.x_t != "own" for setting in settings):
            warnings.warn(f"{name}: takes at most one step, so nothing is measured without x_t", stacklevel=2)
        plan += [(name, setting, cases) for setting in settings]
    measured: dict[tuple[str, Setting], BenchmarkRow] = {}
    rows: list[BenchmarkRow] = []
    try:
        for name, setting, cases in plan:
            # Settings of several factors may coincide; each is measured once.
            key = (name, replace(setting, factor="setting"))
            if key not in measured:
                measured[key] = _measure(name, setting, cases, named_labels, options, count_of(on_progress))
            rows.append(replace(measured[key], setting=replace(measured[key].setting, factor=setting.factor)))
            on_row(rows[-1])
            _write(rows, output)
    finally:
        if rows:  # also those of a run that is stopped
            info = benchmark_info(files, options, len(plan))
            write_files(output, {"report.html": benchmark_page(rows, info)})
    return rows


def benchmark_info(data: Path | FileList, options: BenchmarkOptions, planned: int) -> BenchmarkInfo:
    """What page and Markdown say beside the rows; ``planned`` is the number of rows of a complete run."""
    return BenchmarkInfo(str(data), options.side, planned, options.seed, options.command)


def _settings(model: SegmentationModel, options: BenchmarkOptions) -> Iterator[Setting]:
    defaults = model.inference
    if not model.samples_masks:
        yield Setting("feed-forward", "", 1, defaults.ensemble)
        return
    own = defaults.sampler, defaults.steps, defaults.ensemble
    settings = [own if setting is None else setting for setting in options.settings]
    if not model.samplers:
        if settings:
            counts = dict.fromkeys(count for _, _, count in settings)
            yield from (Setting("setting", "", 1, count) for count in counts)
        else:
            yield from (Setting("ensemble", "", 1, count) for count in options.ensembles)
        return
    if settings:
        yield from (Setting("setting", *setting) for setting in settings)
        if options.without_x_t:
            for setting in settings:
                yield from _without_x_t(*setting)
        return
    for count in options.steps:
        yield Setting("steps", defaults.sampler, count, 1)
    for count in options.ensembles:
        yield Setting("ensemble", defaults.sampler, defaults.steps, count)
    for sampler in options.samplers:
        if sampler in build.SAMPLERS and sampler not in model.samplers:
            continue  # of another kind of diffusion
        yield Setting("sampler", sampler, defaults.steps, 1)
    if options.without_x_t:
        yield from _without_x_t(defaults.sampler, defaults.steps, max(options.ensembles))


def _without_x_t(sampler: str, steps: int, ensemble: int) -> Iterator[Setting]:
    """The setting with x_t, for comparison, and without; none for one step, which sees nothing but noise anyway."""
    if steps > 1:
        for x_t in ("own", *get_args(Replacement)):
            yield Setting("without x_t", sampler, steps, ensemble, x_t)


def _held_out_cases(model: SegmentationModel, data: Path | FileList, options: BenchmarkOptions) -> list[Case]:
    section = model.config.data
    cases = find_cases(data).cases
    held_out = model.saved.card.get("training", {}).get("held_out")
    if held_out is None:
        held_out = split_by_hash(cases, section.test_cases or 0, section.validation_cases or 0).held_out()
    chosen = [case for case in cases if digest(case.name) in held_out[options.side]]
    chosen = (middle_cases(chosen) if options.one_per_patient else chosen)[: options.cases]
    if not chosen:
        raise UsageError(f"{data}: model {model.saved.name} has no {options.side} cases in it; use the other side")
    return chosen


def _calibrated_on(model: SegmentationModel, cases: Sequence[Case]) -> int:
    """How many of the cases the model's calibration was fitted to, if it holds for the model's settings."""
    if model.aggregation.calibration is None:
        return 0
    digests = model.saved.card.get("calibrated_on", {}).get("digests", ())
    return sum(digest(case.name) in digests for case in cases)


def _read_labels(path: Path, volume: Volume, model: SegmentationModel, named_labels: Collection[int]) -> Volume:
    return read_case_labels(path, volume, _format(model, named_labels))


def _format(model: SegmentationModel, named_labels: Collection[int]) -> CaseFormat:
    return CaseFormat(model.channels, len(model.labels), model.merge_labels, named_labels)


def _read(case: Case, model: SegmentationModel, named_labels: Collection[int]) -> tuple[Volume, Volume]:
    return read_case(case, _format(model, named_labels))


@dataclass(frozen=True)
class _CaseMeasurement:
    """One segmented case: an entry per class, the three reliabilities of `BenchmarkRow`, and the time it took.

    ``agreement`` compares the members with the case's readers; None for a case of one reader.
    """

    case: Case
    classes: list[dict[str, Any]]
    reliabilities: tuple[Reliability, Reliability, Reliability]
    pairwise_dice: float
    agreement: ReaderAgreement | None
    seconds: float


def _measure(
    name: str,
    setting: Setting,
    cases: Sequence[Case],
    named_labels: Collection[int],
    options: BenchmarkOptions,
    on_progress: Callable[[str, int, int], None],
) -> BenchmarkRow:
    """Segment the cases with one model at one setting."""
    steps, sampler = (setting.steps, setting.sampler) if setting.sampler else (None, None)
    model = load_segmenter(name, options.device, ensemble=setting.ensemble, steps=steps, sampler=sampler)
    # The temperature is applied here, because the numbers without it are reported, too.
    calibration, known = model.aggregation.calibration, _calibrated_on(model, cases)
    model.aggregation = replace(model.aggregation, calibration=None)
    temperature = 1.0 if calibration is None else calibration.temperature
    sampling = f"{setting.sampler} {model.num_steps} steps, " if setting.sampler else ""
    seen = "" if setting.x_t == "own" else f", {setting.x_t} x_t"
    description = f"{model.saved.name}: {sampling}ensemble {setting.ensemble}{seen}"
    measurements = []
    for done, case in enumerate(cases, 1):
        volume, reference = _read(case, model, named_labels)
        seed = derive_seed(options.seed, case.name)
        readers = [_read_labels(path, volume, model, named_labels) for path in case.further_labels]
        with model.without_x_t(setting.x_t, seed) if setting.x_t != "own" else nullcontext():
            measurements.append(_measure_case(case, model, volume, [reference, *readers], temperature, seed))
        on_progress(f"{description}: case", done, len(cases))
    row = _row(name, replace(setting, steps=model.num_steps), [label for _, label in _classes(model)], measurements)
    return replace(row, calibrated_on=known)


def _classes(model: SegmentationModel) -> list[tuple[int, str]]:
    """Label value and name of every class but the background."""
    return [(value, label) for value, label in model.labels.items() if value]


def _measure_case(
    case: Case, model: SegmentationModel, volume: Volume, readers: Sequence[Volume], temperature: float, seed: int
) -> _CaseMeasurement:
    """Segment a case and compare it with the labels of its first reader, and its members with those of all readers."""
    started = time.perf_counter()
    segmentation = model.segment(volume, seed, maps=["probabilities"])
    assert segmentation.probabilities is not None
    seconds = time.perf_counter() - started
    reference = readers[0]
    agreement = None
    if len(readers) > 1:
        members = model.aggregation.members_on_scan(segmentation).numpy()
        masks = [labels.data[0].numpy() for labels in readers]
        agreement = ReaderAgreement.of(list(members), masks, len(model.labels))
    predicted, truth = segmentation.labels.numpy(), reference.data[0].numpy()
    overlap = label_overlap(predicted, truth, [value for value, _ in _classes(model)])
    voxel_ml = reference.voxel_mm3 / 1000
    classes = [
        {
            "case": case.name,
            "patient": case.patient,
            "class": label,
            "dice": overlap[value].dice,
            "iou": overlap[value].iou,
            "hd95_mm": hd95(predicted == value, truth == value, reference.spacing),
            "ml": float((predicted == value).sum()) * voxel_ml,
            "reference_ml": float((truth == value).sum()) * voxel_ml,
            **({} if agreement is None else {"energy_distance": agreement.energy_distance}),
        }
        for value, label in _classes(model)
    ]
    uncalibrated = segmentation.probabilities.numpy()
    calibrated = temperature_scaled(segmentation.probabilities, temperature).numpy()
    around = region(truth)
    reliabilities = (
        Reliability.of(calibrated, truth, around),
        Reliability.of(uncalibrated, truth, around),
        Reliability.of(calibrated, truth),
    )
    pairwise = [dice for dice in segmentation.agreement.values() if not math.isnan(dice)]
    # Members that are all empty agree.
    pairwise_dice = 1.0 if not pairwise else float(np.mean(pairwise))
    return _CaseMeasurement(case, classes, reliabilities, pairwise_dice, agreement, seconds)


def _row(
    model: str, setting: Setting, classes: Sequence[str], measurements: Sequence[_CaseMeasurement]
) -> BenchmarkRow:
    """Average the cases of one model and setting."""
    by_case = [entry for measurement in measurements for entry in measurement.classes]

    def means(kind: str) -> dict[str, Interval]:
        entries = {label: [entry for entry in by_case if entry["class"] == label] for label in classes}
        return {
            label: mean_interval([entry[kind] for entry in own], patients=[entry["patient"] for entry in own])
            for label, own in entries.items()
        }

    ece, ece_uncalibrated, ece_everywhere = (
        functools.reduce(operator.add, parts).ece
        for parts in zip(*(measurement.reliabilities for measurement in measurements), strict=True)
    )
    return BenchmarkRow(
        model=model,
        setting=setting,
        dice=means("dice"),
        iou=means("iou"),
        hd95_mm=means("hd95_mm"),
        ece=ece,
        ece_uncalibrated=ece_uncalibrated,
        ece_everywhere=ece_everywhere,
        evaluations=build.evaluations(setting.sampler, setting.steps) * setting.ensemble,
        seconds=float(np.median([measurement.seconds for measurement in measurements])),
        cases=len(measurements),
        patients=len({entry["patient"] for entry in by_case}),
        pairwise_dice=float(np.mean([measurement.pairwise_dice for measurement in measurements])),
        readers=_reader_summary(measurements),
        by_case=by_case,
    )


def _reader_summary(measurements: Sequence[_CaseMeasurement]) -> ReaderSummary | None:
    rated = [(one.agreement, one.case.patient) for one in measurements if one.agreement is not None]
    return ReaderSummary.of([one for one, _ in rated], [patient for _, patient in rated]) if rated else None


def _write(rows: Sequence[BenchmarkRow], output: Path) -> None:
    write_files(
        output,
        {
            "benchmark.csv": _csv([row.cells() for row in rows]),
            "cases.csv": _csv([{**row.key(), **case} for row in rows for case in row.by_case]),
            "benchmark.json": json.dumps(json_ready([asdict(row) for row in rows]), indent=2, allow_nan=False) + "\n",
        },
    )


def _csv(table: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in table for key in row)), restval="")
    writer.writeheader()
    for row in table:  # a number that does not exist is an empty field
        unknown = {key: "" for key, value in row.items() if isinstance(value, float) and math.isnan(value)}
        writer.writerow({**row, **unknown})
    return text.getvalue()
