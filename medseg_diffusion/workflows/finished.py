"""The numbers of scans that an earlier call has segmented, from the files that it wrote.

Volumes are counted in the mask, which may have been edited. What a mask does not tell (intervals, quality, time, model)
comes from the scan's statistics, or else from its row in the table of volumes, if these are of the same volumes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from medseg_diffusion.errors import InputError, MedsegError
from medseg_diffusion.methods.seen import UNLIKE
from medseg_diffusion.volumes.io import read_labels, stored_labels
from medseg_diffusion.volumes.label_table import printable_name
from medseg_diffusion.volumes.outputs import Outputs
from medseg_diffusion.volumes.volume import Volume

from .label_files import few, from_segments
from .results_table import BETWEEN, Row
from .scans import ScanResult

VOLUME, LOW, HIGH = "_volume_ml", "_interval_low_ml", "_interval_high_ml"
"""Endings of the columns of a class in the table of volumes, after its name."""
EMPTY = "nothing was found: the mask is empty; check the scan and whether the model is for it"
MOSTLY_EMPTY = "the mask is empty, but sampled masks are not; look at them with --save-members"
DISAGREE = "the sampled masks agree less than is usual for this model; check the result"


def columns_of(names: Mapping[int, str]) -> list[str]:
    """The columns of the table of volumes between those of every table."""
    return ["quality", "interval_level", *(name + end for name in names.values() for end in (VOLUME, LOW, HIGH))]


def numbers_of(result: ScanResult) -> dict[str, object]:
    """The numbers of a scan by column of the table of volumes."""
    numbers: dict[str, object] = {"quality": result.quality, "interval_level": result.level}
    for name, volume in result.volumes_ml.items():
        numbers[name + VOLUME] = round(volume, 4)
        for end, value in zip((LOW, HIGH), result.intervals_ml.get(name, ()), strict=False):
            numbers[name + end] = round(value, 4)
    return numbers


def finished_segmentation(scan: Path, files: Outputs, names: Mapping[int, str], row: Row) -> ScanResult:
    """The result of a scan whose mask exists.

    Args:
        scan: The scan, which is not read.
        files: Kind -> file that a call may have written.
        names: Class value -> name, without background.
        row: The scan's row in the table of an earlier call; empty without one.
    """
    outputs = {kind: files[kind] for kind in ("segmentation", *files) if files[kind].is_file()}
    try:
        volumes = _volumes(read_mask(files["segmentation"], names), names)
    except (MedsegError, OSError, ValueError) as error:
        warning = f"the finished mask cannot be read: {' '.join(str(error).split())}"
        return ScanResult(scan, "skipped", outputs, warnings=(warning,), flags=("warning",))
    known = _from_row(row, volumes) | _from_statistics(files["statistics"], volumes)
    doubts = doubts_about(volumes, known.get("members_ml", {}), known.get("quality"), known.pop("unlike_training", ""))
    if "empty mask" in doubts and MOSTLY_EMPTY in known.get("warnings", ()):
        doubts["empty mask"] = MOSTLY_EMPTY  # by the members, which a row does not hold
    known["warnings"] = tuple(dict.fromkeys((*known.get("warnings", ()), *doubts.values())))
    known["flags"] = (*doubts, *known.get("flags", ()))
    return ScanResult(scan, "skipped", outputs, volumes_ml=volumes, **known)


def doubts_about(
    volumes_ml: Mapping[str, float],
    members_ml: Mapping[str, tuple[float, float]],
    quality: str | None,
    unlike_training: str,
) -> dict[str, str]:
    """Reasons to look at a segmentation: flag -> warning.

    How far members agree is only known for scans like those of the calibration, so it is no reason beside a scan
    that is unlike those of the training.
    """
    unlike = {"unlike training": unlike_training} if unlike_training else {}
    if not any(volumes_ml.values()):
        sampled = any(largest > 0 for _, largest in members_ml.values())
        return {"empty mask": MOSTLY_EMPTY if sampled else EMPTY, **unlike}
    return {"members disagree": DISAGREE} if quality == "check" and not unlike else unlike


def read_mask(path: Path, names: Mapping[int, str]) -> Volume:
    """A mask that a call wrote for these classes, in any of its formats, on a grid of its own: (1, I, J, K).

    Raises:
        InputError: A file that cannot be read, or whose classes are others, as far as it tells them.
    """
    if path.suffix.lower() != ".dcm":
        _require_same(path, list(stored_labels(path).items()), [(v, printable_name(n)) for v, n in names.items()])
        return read_labels(path)
    from medseg_diffusion.volumes.dicom_labels import read_segmentation
    from medseg_diffusion.volumes.dicom_seg import segment_label

    mask, stored = read_segmentation(path)
    _require_same(path, list(stored.items()), list(enumerate(map(segment_label, names.values()), 1)))
    return mask.like(torch.from_numpy(from_segments(mask.data.numpy(), names)))


def _require_same(path: Path, stored: list[tuple[int, str]], expected: list[tuple[int, str]]) -> None:
    """InputError for a mask that names other classes: nobody has looked for those that it lacks."""
    if stored and stored != expected:
        actual, names = (few(name for _, name in classes) for classes in (stored, expected))
        raise InputError(path, f"a mask of the classes {actual}", names, "segment it again without --skip-existing")


def _volumes(mask: Volume, names: Mapping[int, str]) -> dict[str, float]:
    counts = torch.bincount(mask.data.flatten(), minlength=max(names, default=0) + 1).tolist()
    if unknown := [value for value, count in enumerate(counts) if count and value and value not in names]:
        raise ValueError(f"{mask.source}: the label {unknown[0]} is no class of the model")
    return {name: counts[value] * mask.voxel_mm3 / 1000 for value, name in names.items()}


def _same(one: float, other: float) -> bool:
    # Affines in files have single precision, and stored volumes four decimals.
    return math.isclose(one, other, rel_tol=1e-5, abs_tol=1e-4)


def _from_statistics(file: Path, volumes: Mapping[str, float]) -> dict[str, Any]:
    """What *_statistics.json tells beside the volumes; empty without the file, or if it is of another mask."""
    try:
        content = json.loads(file.read_text())
        classes = content["classes"]
        if classes.keys() != volumes.keys() or not all(
            _same(classes[name]["volume_ml"], volume) for name, volume in volumes.items()
        ):
            return {}
        pairs: dict[str, dict[str, tuple[float, float]]] = {
            key: {name: (one[key][0], one[key][1]) for name, one in classes.items() if key in one}
            for key in ("interval_ml", "members_ml")
        }
        return {
            "seconds": float(content["seconds"]),
            "members_ml": pairs["members_ml"],
            "intervals_ml": pairs["interval_ml"],
            "level": content.get("interval_level"),
            "quality": content.get("quality"),
            "unlike_training": str(content.get("unlike_training", "")),
            "model": content["model"],
            **({"model_sha256": content["model_sha256"]} if "model_sha256" in content else {}),
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):  # none, or of another program
        return {}


def _from_row(row: Row, volumes: Mapping[str, float]) -> dict[str, Any]:
    """What the row of an earlier table tells beside the volumes; empty if it is of another mask."""
    try:
        if not row or not all(_same(float(row[name + VOLUME]), volume) for name, volume in volumes.items()):
            return {}
        warnings = tuple(row["warnings"].split(BETWEEN)) if row["warnings"] else ()
        known: dict[str, Any] = {
            "seconds": float(row["seconds"] or 0),
            "intervals_ml": {
                name: (float(row[name + LOW]), float(row[name + HIGH])) for name in volumes if row[name + LOW]
            },
            "level": float(row["interval_level"]) if row["interval_level"] else None,
            "quality": row["quality"] if row["quality"] in ("usual", "check") else None,
            "model": row["model"],
            "model_sha256": row["model_sha256"],
            "flags": tuple(flag for flag in row["flags"].split(BETWEEN) if flag == "warning"),
            "warnings": warnings,
            "unlike_training": next((warning for warning in warnings if warning.startswith(UNLIKE)), ""),
        }
    except (ValueError, KeyError):
        return {}
    return known
