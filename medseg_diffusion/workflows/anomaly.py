"""Scan in, anomaly map and mask out: the whole of `medseg anomaly` as a function."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medseg_diffusion.data.healthy import require_volume
from medseg_diffusion.diffusion.noise import derive_seed
from medseg_diffusion.errors import InputError, MedsegError, ModelError, UsageError
from medseg_diffusion.files import write_files
from medseg_diffusion.models.anomaly import AnomalyMap, AnomalyModel, mask_of
from medseg_diffusion.reports.preview import preview_png
from medseg_diffusion.volumes.io import read_volume, upright, write_labels, write_map
from medseg_diffusion.volumes.paths import SUFFIXES, find_scans, scan_name
from medseg_diffusion.volumes.volume import Volume

from .segment import CaseResult, refuse_collisions

DEFAULT_MODEL = "flair-anomaly"


@dataclass(frozen=True)
class AnomalyOptions:
    """Options of `detect`; None takes the model's own default.

    Attributes:
        model: model folder, run folder or installed name.
        threshold: "auto" (the calibrated one), "q0.99" (another quantile of healthy scans) or a number.
        method: detector.
        latent_quantile: of latent-healing, the share of healthy latent positions that stay as they are.
        median: side of a median filter of the map, in voxels of the model's grid.
        erosion: erosion of the foreground, in voxels of the model's grid.
        min_volume_mm3: connected parts of the mask below this are dropped.
        output: file of the map (one scan) or folder; None writes next to each scan.
        seed: every scan derives its own from this and its name.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        preview: write *_anomaly_preview.png.
        skip_existing: leave scans alone whose mask is there.
    """

    model: str | None = None
    threshold: str = "auto"
    method: str | None = None
    latent_quantile: float | None = None
    median: int | None = None
    erosion: int | None = None
    min_volume_mm3: float | None = None
    output: Path | None = None
    seed: int = 0
    device: str = "auto"
    preview: bool = False
    skip_existing: bool = False


def detect(
    scans: Sequence[Path],
    options: AnomalyOptions = AnomalyOptions(),
    on_case: Callable[[CaseResult], None] | None = None,
    on_progress: Callable[[str, float], None] | None = None,
) -> list[CaseResult]:
    """Scores scans; one bad scan stops no other.

    Written are *_anomaly.nii.gz, *_anomaly_mask.nii.gz, *_anomaly_foreground.nii.gz (where scores count) and
    *_anomaly.json.

    The mask is written last: where it is, the scan is finished.

    Args:
        scans: files, or folders of them.
        options: see `AnomalyOptions`.
        on_case: called after every scan.
        on_progress: called with (scan name, share done).

    Raises:
        UsageError: contradictory options, or two scans with the same output.
        InputError: a path that does not exist, or a folder without scans.
        ModelError: no usable model, or "auto" for one that was not calibrated.
    """
    parse_threshold(options.threshold)
    found = [path for scan in scans for path in find_scans(scan)]
    targets = {scan: _targets(scan, options.output, len(found)) for scan in found}
    refuse_collisions(targets)
    model: AnomalyModel | None = None
    results = []
    for scan in found:
        files = targets[scan]
        if options.skip_existing and files["mask"].exists():
            result = CaseResult(scan, "skipped", {"mask": files["mask"]})
        else:
            try:
                # The scan is read before the weights: a mistyped path is answered at once.
                require_volume(scan)
                volume = read_volume(scan)
                if model is None:
                    model = _loaded(options)
                result = _one(scan, volume, files, model, options, on_progress)
            except MedsegError as error:
                if model is None and not isinstance(error, InputError):
                    raise
                result = CaseResult(scan, "failed", error=str(error), exit_code=error.exit_code)
            except Exception as error:
                text = " ".join(str(error).split()) or type(error).__name__
                result = CaseResult(scan, "failed", error=f"{scan}: {type(error).__name__}: {text}", exit_code=1)
        results.append(result)
        if on_case is not None:
            on_case(result)
    return results


def parse_threshold(text: str) -> str | float:
    """What a threshold is: the word "auto", a quantile as the text "q0.99", or a number; UsageError if nothing."""
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
        ModelError: a healthy quantile for a model without calibration.
    """
    wanted = parse_threshold(text)
    if isinstance(wanted, float):
        return wanted
    healthy = model.healthy_scores()
    if healthy is None:
        raise ModelError(
            f"{model.saved.path}: not calibrated for {model.method}; calibrate it with medseg calibrate-anomaly on "
            "healthy scans, or give --threshold a number"
        )
    return healthy.automatic if text == "auto" else healthy.threshold(float(text[1:]))


def _loaded(options: AnomalyOptions) -> AnomalyModel:
    model = AnomalyModel(
        options.model or DEFAULT_MODEL,
        options.method,
        options.device,
        options.latent_quantile,
        options.median,
        options.erosion,
        options.min_volume_mm3,
    )
    chosen_threshold(options.threshold, model)  # what is missing is said before the first scan
    return model


def _one(
    scan: Path,
    volume: Volume,
    files: dict[str, Path],
    model: AnomalyModel,
    options: AnomalyOptions,
    on_progress: Callable[[str, float], None] | None,
) -> CaseResult:
    started = time.monotonic()
    name = scan_name(scan)
    found = model.score(
        volume,
        derive_seed(options.seed, name),
        lambda done: on_progress(name, done) if on_progress is not None else None,
    )
    threshold = chosen_threshold(options.threshold, model)
    voxel_mm3 = float(np.prod(volume.spacing))
    mask = mask_of(found, threshold, voxel_mm3, model.config.postprocessing.min_volume_mm3)
    files["mask"].parent.mkdir(parents=True, exist_ok=True)
    write_map(found.score, volume, files["map"])
    write_labels(found.foreground.to(torch.uint8), volume, files["foreground"])
    outputs = {kind: files[kind] for kind in ("mask", "map", "foreground", "scores")}
    if options.preview:
        shown = upright(volume, scan)
        picture = preview_png(
            shown.data[0].numpy(),
            upright(volume.like(mask[None].to(torch.uint8)), scan).data[0].numpy(),
            shown.spacing,
            {1: "anomaly"},
            uncertainty=upright(volume.like(found.score[None]), scan).data[0].numpy(),
            map_name="Anomaly score",
        )
        write_files(files["mask"].parent, {files["preview"].name: picture})
        outputs["preview"] = files["preview"]
    seconds = time.monotonic() - started
    volume_ml = float(mask.sum()) * voxel_mm3 / 1000
    about = _about(scan, model, options, found, threshold, mask, volume_ml, seconds)
    write_files(files["mask"].parent, {files["scores"].name: json.dumps(about, indent=2) + "\n"})
    write_labels(mask.to(torch.uint8), volume, files["mask"])
    return CaseResult(scan, "done", outputs, time.monotonic() - started, {"anomaly": volume_ml}, warnings=model.notes)


def _about(
    scan: Path,
    model: AnomalyModel,
    options: AnomalyOptions,
    found: AnomalyMap,
    threshold: float,
    mask: Tensor,
    volume_ml: float,
    seconds: float,
) -> dict[str, Any]:
    """What is said of a scan in *_anomaly.json."""
    inside = max(1, int(found.foreground.sum()))
    content: dict[str, Any] = {
        "scan": scan.name,
        "model": model.name,
        "method": model.method,
        "score": round(found.scan_score, 6),
        "threshold": round(threshold, 6),
        "threshold_from": options.threshold if parse_threshold(options.threshold) != threshold else "given",
        "volume_ml": round(volume_ml, 4),
        "share_of_foreground": round(float(mask.sum()) / inside, 6),
        "evaluations": found.evaluations,
        "seconds": round(seconds, 2),
    }
    healthy = model.healthy_scores()
    if healthy is not None and not model.notes:  # else the map is not the one that was calibrated
        content["healthy_percentile"] = round(healthy.percentile(found.scan_score), 1)
        content["healthy_scans"] = len(healthy.scan_scores)
        if options.threshold == "auto":
            content["healthy_false_positive_rate"] = round(healthy.rate, 6)
    return content


def _targets(scan: Path, output: Path | None, count: int) -> dict[str, Path]:
    """The files of a scan by kind."""
    if output is not None and output.name.lower().endswith(SUFFIXES):
        if count > 1:
            raise UsageError(f"-o {output} is a file, but there are {count} scans; give a folder")
        base, whole = output.parent / scan_name(output).removesuffix("_anomaly"), output
    else:
        base = (scan.parent if output is None else output) / scan_name(scan)
        whole = base.with_name(base.name + "_anomaly.nii.gz")
    endings = {
        "mask": "_mask.nii.gz",
        "foreground": "_foreground.nii.gz",
        "scores": ".json",
        "preview": "_preview.png",
    }
    return {
        "map": whole,
        **{kind: base.with_name(f"{base.name}_anomaly{ending}") for kind, ending in endings.items()},
    }
