"""The numbers of a scan that `medseg anomaly` has scored: in memory, in its JSON file, and in the table of scans."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medseg_diffusion.errors import MedsegError
from medseg_diffusion.reports.batch import millilitres, percent
from medseg_diffusion.volumes.io import read_labels
from medseg_diffusion.volumes.outputs import Outputs

from .results_table import BETWEEN, Row
from .scans import ScanResult

ABOVE_HEALTHY = 95.0
"""Percentile among healthy scans from which a scan is flagged."""
_DIGITS: Mapping[str, int | None] = {
    "method": None,
    "score": 6,
    "threshold": 6,
    "threshold_from": None,
    "share_of_foreground": 6,
    "evaluations": None,
    "healthy_percentile": 1,
    "healthy_scans": None,
    "healthy_false_positive_rate": 6,
    "unlike_training": None,
}
"""Number of a scan -> the digits with which it is written."""
COLUMNS = ("score", "healthy_percentile", "healthy_scans", "volume_ml", "share_of_foreground", "threshold",
           "threshold_from", "healthy_false_positive_rate", "method")  # fmt: skip
"""The columns of the table of anomalies between those of every table."""


@dataclass(frozen=True)
class AnomalyResult(ScanResult):
    """The result for one scan. None stands for what is not known.

    Attributes:
        method: Name of the detector.
        score: Score of the whole scan: the mean of the largest hundredth of its map.
        threshold: Threshold of the mask.
        threshold_from: "auto", a quantile such as "q0.99", or "given".
        share_of_foreground: Share of the foreground that the mask holds, 0 to 1.
        evaluations: Calls of the networks, counted by slices.
        healthy_percentile: Percentage of the calibration's healthy scans with a lower score.
        healthy_scans: Number of these scans.
        healthy_false_positive_rate: Share of the healthy scans' voxels above the threshold, 0 to 1, before small parts
            are dropped.
        unlike_training: In what the scan is unlike those of the training; empty if nothing is known.
    """

    method: str = ""
    score: float | None = None
    threshold: float | None = None
    threshold_from: str = ""
    share_of_foreground: float | None = None
    evaluations: int | None = None
    healthy_percentile: float | None = None
    healthy_scans: int | None = None
    healthy_false_positive_rate: float | None = None
    unlike_training: str = ""

    @property
    def headline(self) -> str:
        if self.score is None:
            return ""
        text = f"score {self.score:.3f}, {compared(self.healthy_percentile, self.healthy_scans)}"
        text += f"; {millilitres(self.volumes_ml['anomaly'])} ml above {self.threshold:.3f}"
        if self.healthy_false_positive_rate is not None:
            text += f" ({percent(self.healthy_false_positive_rate)} of healthy tissue is expected above it)"
        return text


def compared(percentile: float | None, scans: int | None) -> str:
    """A scan's place among healthy scans, in words."""
    if percentile is None or scans is None:
        return "not comparable with healthy scans"
    if percentile == 100:
        return f"higher than all {scans} healthy scans"
    # Not rounded up: 100 % of them would be all.
    return f"higher than {math.floor(percentile)} % of {scans} healthy scans"


def flags_of(percentile: float | None, unlike_training: str) -> tuple[str, ...]:
    """Reasons to look at a scan: its percentile among healthy scans, or what is unlike the training scans."""
    if unlike_training:
        return ("unlike training",)
    return ("above healthy",) if percentile is not None and percentile >= ABOVE_HEALTHY else ()


def entries_of(result: AnomalyResult) -> dict[str, Any]:
    """The content of *_anomaly.json; docs/reference/files.md describes every key. What is not known is left out."""
    known = {name: value for name, value in _written(result).items() if value not in (None, "")}
    return {
        "scan": result.scan.name,
        "model": result.model,
        "model_sha256": result.model_sha256,
        **known,
        "volume_ml": round(result.volumes_ml["anomaly"], 4),
        "seconds": result.seconds,
    }


def numbers_of(result: ScanResult) -> dict[str, object]:
    """The numbers of a scan by column of the table of anomalies."""
    numbers = dict(_written(result)) if isinstance(result, AnomalyResult) else {}
    if "anomaly" in result.volumes_ml:
        numbers["volume_ml"] = round(result.volumes_ml["anomaly"], 4)
    return {name: numbers[name] for name in COLUMNS if name in numbers}


def _written(result: AnomalyResult) -> dict[str, Any]:
    return {
        name: value if digits is None or value is None else round(value, digits)
        for name, digits in _DIGITS.items()
        for value in (getattr(result, name),)
    }


def finished_anomaly(scan: Path, files: Outputs, row: Row) -> ScanResult:
    """The result of a scan whose mask exists: its volume is that of the mask, the other numbers are in its JSON file.

    Its warnings are those of ``row``, which an earlier table has of the scan; it is empty without one. Numbers and
    warnings of another mask do not count.
    """
    outputs = {kind: files[kind] for kind in ("mask", *files) if files[kind].is_file()}
    try:
        mask = read_labels(files["mask"])
        volume = float((mask.data > 0).sum()) * mask.voxel_mm3 / 1000
    except (MedsegError, OSError) as error:
        warning = f"the finished mask cannot be read: {' '.join(str(error).split())}"
        return ScanResult(scan, "skipped", outputs, warnings=(warning,), flags=("warning",))
    known = _from_json(files["scores"], volume)
    unlike = known.get("unlike_training", "")
    said, noted = _from_row(row, volume)
    flags = (*flags_of(known.get("healthy_percentile"), unlike), *noted)
    warnings = tuple(dict.fromkeys((*said, *([unlike] if unlike else []))))
    volumes = {"anomaly": volume}
    return AnomalyResult(scan, "skipped", outputs, volumes_ml=volumes, warnings=warnings, flags=flags, **known)


def _from_row(row: Row, volume_ml: float) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The warnings in the row of an earlier table, and the flag "warning" if it has it; none of another mask."""
    try:
        if not row or not _same(float(row["volume_ml"]), volume_ml):
            return (), ()
        warnings = tuple(row["warnings"].split(BETWEEN)) if row["warnings"] else ()
        return warnings, tuple(flag for flag in row["flags"].split(BETWEEN) if flag == "warning")
    except (ValueError, KeyError):
        return (), ()


def _same(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-5, abs_tol=1e-4)


def _from_json(file: Path, volume_ml: float) -> dict[str, Any]:
    """What *_anomaly.json tells beside the volume; empty without the file, or if it is of another mask."""
    try:
        content = json.loads(file.read_text())
        if not _same(content["volume_ml"], volume_ml):
            return {}
        known = {name: content[name] for name in _DIGITS if name in content}
        texts = ("method", "threshold_from", "unlike_training")
        numbers = [value for name, value in known.items() if name not in texts]
        if not all(isinstance(value, int | float) for value in numbers) or not {"score", "threshold"} <= known.keys():
            return {}
        return {
            **known,
            "seconds": float(content["seconds"]),
            "model": str(content["model"]),
            "model_sha256": str(content.get("model_sha256", "")),
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or of another program
        return {}
