"""`medseg anomaly`: scans in, anomaly maps, masks and scores out."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medseg_diffusion.data.healthy import require_volume
from medseg_diffusion.diffusion.noise import derive_seed
from medseg_diffusion.errors import ModelError, UsageError
from medseg_diffusion.files import as_paths, write_files, write_json
from medseg_diffusion.models.anomaly import AnomalyModel, DetectionOptions
from medseg_diffusion.models.anomaly_map import AnomalyMap, mask_of
from medseg_diffusion.models.store import model_input
from medseg_diffusion.reports.preview import preview_png
from medseg_diffusion.reports.theme import ANOMALY
from medseg_diffusion.training.progress import OnProgress, silent
from medseg_diffusion.volumes.io import upright, write_labels, write_map
from medseg_diffusion.volumes.modality import ModelInput
from medseg_diffusion.volumes.outputs import anomaly_outputs, refuse_collisions
from medseg_diffusion.volumes.paths import is_image
from medseg_diffusion.volumes.sources import InputOptions, Source, find_sources, read_source
from medseg_diffusion.volumes.volume import Volume

from .anomaly_report import AnomalyReport
from .anomaly_result import COLUMNS, AnomalyResult, entries_of, finished_anomaly, flags_of, numbers_of
from .results_table import ResultsTable, table_path
from .run_report import RunReport
from .scans import (
    Scan,
    ScanResult,
    Work,
    Write,
    each_scan,
    of_part,
    part_of,
    paths_of,
    refuse_foreign,
    say_lacking,
    telling,
)
from .viewed import refuse_report

DEFAULT_MODEL = "flair-anomaly"


@dataclass(frozen=True)
class AnomalyOptions:
    """Options of `anomaly`.

    Attributes:
        model: Model folder, run folder or installed name; None takes the built-in model.
        threshold: "auto" (the calibrated one), "q0.99" (another quantile of healthy scans) or a number.
        detection: Detector and post-processing; None in it takes the model's.
        output: File of the map (one scan) or folder; None writes next to each scan.
        seed: Seed of all randomness; every scan derives its seed from this and its name.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        compile: Compile the denoiser; maps differ by rounding.
        preview: Write *_anomaly_preview.png.
        save_counterpart: Write *_anomaly_counterpart.nii.gz, the healthy counterpart that the method produced.
        table: Write the numbers of all scans to one table beside the masks (`results_table.table_path`).
        report: Write one HTML page about all scans to this file, and the counterparts, which it shows.
        command: The command line, for the page; empty shows none.
        skip_existing: Skip scans whose mask exists. A remark counts those that lack other files that are asked for.
        run_report: Write a report on the run to this file, as JSON (`workflows.run_report`).
        inputs: What is read: pattern, DICOM series.
        shard: (i, n) with 1 <= i <= n: score only part i of the scans, chosen by a hash of the path. Each part has
            its own table, page, report on the run and list of failures: report.1-of-4.html.
        failures: CSV file of the scans that fail (`each_scan`). A single scan writes none.
    """

    model: str | None = None
    threshold: str = "auto"
    detection: DetectionOptions = DetectionOptions()
    output: Path | None = None
    seed: int = 0
    device: str = "auto"
    compile: bool = False
    preview: bool = False
    save_counterpart: bool = False
    table: bool = False
    report: Path | None = None
    command: str = ""
    skip_existing: bool = False
    run_report: Path | None = None
    inputs: InputOptions = InputOptions()
    shard: tuple[int, int] | None = None
    failures: Path | None = None

    def __post_init__(self) -> None:
        as_paths(self, "output", "report", "run_report", "failures")


def anomaly(
    scans: str | Path | Sequence[str | Path],
    options: AnomalyOptions = AnomalyOptions(),
    on_case: Callable[[ScanResult], None] | None = None,
    on_progress: OnProgress = silent,
) -> list[ScanResult]:
    """Find anomalies in scans. A scan that fails does not stop the others.

    The files of a scan are *_anomaly.nii.gz (scores), *_anomaly_mask.nii.gz, *_anomaly_foreground.nii.gz (voxels whose
    scores count) and *_anomaly.json. The mask is written last, so that a scan with a mask is finished.

    Args:
        scans: One or more files, lists and folders (`volumes.sources.find_sources`).
        options: The options.
        on_case: Called after every scan.
        on_progress: Called with the scan's name, after "3 of 8: " if there are several, and the share done, 0 to 1.

    Raises:
        UsageError: Contradictory options, two scans with the same output, or a file in the place of a mask or map that
            medseg did not write.
        InputError: A path that does not exist, or a folder without scans.
        ModelError: No usable model, or "auto" for a model without calibration.
    """
    parse_threshold(options.threshold)
    takes = model_input(options.model or DEFAULT_MODEL)
    sources = {source.path: source for source in find_sources(paths_of(scans), takes, options.inputs)}
    outputs = {
        path: anomaly_outputs(source.named, source.output(options.output), len(sources))
        for path, source in sources.items()
    }
    files = {path: source.files for path, source in sources.items()}
    refuse_collisions(outputs, [file for each in files.values() for file in each])
    report, run_json = (of_part(file, options.shard) for file in (options.report, options.run_report))
    refuse_report(report, run_json, files)
    ours = part_of(outputs, options.shard)
    if options.skip_existing:
        say_lacking(ours, "mask", {"preview": options.preview, "counterpart": options.save_counterpart})
    else:
        refuse_foreign(each[kind] for each in ours.values() for kind in ("mask", "map"))
    masks = {path: each["mask"] for path, each in outputs.items()}
    folder = None if len(sources) == 1 else options.output
    file = table_path("anomalies", list(masks.values()), folder, options.shard) if options.table else None

    def load() -> AnomalyModel:
        model = _load(options)
        threshold = chosen_threshold(options.threshold, model)
        settings = {"method": model.method, "threshold": threshold, "seed": options.seed}
        run_report.uses(model.saved, model.device, settings)
        shown = {**settings, "threshold": f"{threshold:.6g} ({options.threshold})", "device": model.device}
        page.uses(model, {name: str(value) for name, value in shown.items()})
        return model

    def read(path: Path) -> Volume:
        return _read(sources[path], takes, options)

    with (
        RunReport(run_json, "anomaly", options, files) as run_report,
        AnomalyReport(report, options.model or DEFAULT_MODEL, read, options.command, len(ours)) as page,
        # First at the end: a page takes a while.
        ResultsTable(file, COLUMNS, numbers_of, {path: masks[path] for path in ours}) as table,
    ):
        work = Work(
            run_report.timed(read),
            load,
            lambda model, scan: _score_one(model, scan, options),
            "mask",
            lambda path, files: finished_anomaly(path, files, table.earlier(path)),
        )
        return each_scan(
            ours,
            work,
            skip_existing=options.skip_existing,
            on_case=telling(run_report.add, table.add, page.add, on_case),
            on_progress=on_progress,
            failures=of_part(options.failures, options.shard) if len(sources) > 1 else None,
        )


def _read(source: Source, takes: ModelInput, options: AnomalyOptions) -> Volume:
    require_volume(source.path)
    return read_source(source, takes, options.inputs.series, channels=1)


def _load(options: AnomalyOptions) -> AnomalyModel:
    model = AnomalyModel(options.model or DEFAULT_MODEL, options.detection, options.device, options.compile)
    chosen_threshold(options.threshold, model)  # a missing calibration must be an error before the first scan
    return model


def parse_threshold(text: str) -> str | float:
    """Parse a threshold into the text "auto", a quantile as text such as "q0.99", or a number; UsageError otherwise."""
    if text == "auto":
        return text
    quantile = re.fullmatch(r"q(0?\.\d+)", text)
    if quantile:
        return text
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not np.isfinite(value) or text.startswith("q"):
        raise UsageError(f"--threshold {text}: expected auto, a quantile such as q0.99, or a number")
    return value


def chosen_threshold(text: str, model: AnomalyModel) -> float:
    """The value of a threshold for a model.

    Raises:
        ModelError: "auto" or a quantile for a model without calibration.
    """
    parsed = parse_threshold(text)
    if isinstance(parsed, float):
        return parsed
    healthy = model.healthy_scores()
    if healthy is None:
        raise ModelError(
            f"{model.saved.path}: not calibrated for {model.method}; calibrate it with medseg calibrate-anomaly on "
            "healthy scans, or give --threshold a number"
        )
    return healthy.automatic if text == "auto" else healthy.threshold(float(text[1:]))


def _score_one(model: AnomalyModel, scan: Scan, options: AnomalyOptions) -> Write:
    """Score a scan; the returned function writes its files."""
    counterpart = options.save_counterpart or options.report is not None
    scan.volume = scan.volume.described(model.saved.signature)
    scored = model.score(scan.volume, derive_seed(options.seed, scan.name), scan.on_progress, counterpart)
    threshold = chosen_threshold(options.threshold, model)
    voxel_mm3 = scan.volume.voxel_mm3
    mask = mask_of(scored, threshold, voxel_mm3, model.config.postprocessing.min_volume_mm3)
    return partial(_write_results, model, scan, options, scored, threshold, mask)


def _write_results(
    model: AnomalyModel, scan: Scan, options: AnomalyOptions, scored: AnomalyMap, threshold: float, mask: Tensor
) -> ScanResult:
    """Write the files of a scored scan, the mask last."""
    volume, files = scan.volume, scan.outputs
    files["mask"].parent.mkdir(parents=True, exist_ok=True)
    write_map(scored.score, volume, files["map"])
    write_labels(scored.foreground.to(torch.uint8), volume, files["foreground"])
    written = ["mask", "map", "foreground", "scores"]
    if scored.counterpart is not None:
        write_map(scored.counterpart, volume, files["counterpart"])
        written.append("counterpart")
    if options.preview:
        write_files(files["preview"].parent, {files["preview"].name: _picture(scan, scored, mask, model.name)})
        written.append("preview")
    result = _result(model, scan, options, scored, threshold, mask)
    write_json(files["scores"], entries_of(result))
    write_labels(mask.to(torch.uint8), volume, files["mask"])
    return replace(result, outputs={kind: files[kind] for kind in written})


def _picture(scan: Scan, scored: AnomalyMap, mask: Tensor, model: str) -> bytes:
    """The preview, as PNG."""

    def shown(data: Tensor) -> Any:
        return upright(scan.volume.like(data[None]), scan.path).data[0].numpy()

    image = upright(scan.volume, scan.path)
    return preview_png(
        image.data[0].numpy(),
        shown(mask.to(torch.uint8)),
        image.spacing,
        {1: "anomaly"},
        uncertainty=shown(scored.score),
        map_name="Anomaly score",
        map_colours=ANOMALY,
        oriented=not is_image(scan.path),
        made_by=model,
    )


def _result(
    model: AnomalyModel, scan: Scan, options: AnomalyOptions, scored: AnomalyMap, threshold: float, mask: Tensor
) -> AnomalyResult:
    """The numbers of a scored scan."""
    inside = max(1, int(scored.foreground.sum()))
    healthy = model.comparable_scores(scored)
    percentile = model.percentile(scored)
    return AnomalyResult(
        scan.path,
        "done",
        seconds=scan.seconds,
        volumes_ml={"anomaly": float(mask.sum()) * scan.volume.voxel_mm3 / 1000},
        warnings=(*model.notes, *([scored.unlike_training] if scored.unlike_training else [])),
        flags=flags_of(percentile, scored.unlike_training),
        model=model.name,
        model_sha256=model.saved.sha256,
        method=model.method,
        score=scored.scan_score,
        threshold=threshold,
        threshold_from=options.threshold if parse_threshold(options.threshold) != threshold else "given",
        share_of_foreground=float(mask.sum()) / inside,
        evaluations=scored.evaluations,
        healthy_percentile=percentile,
        healthy_scans=None if healthy is None else len(healthy.scan_scores),
        healthy_false_positive_rate=None if healthy is None else healthy.share_above(threshold),
        unlike_training=scored.unlike_training,
    )
