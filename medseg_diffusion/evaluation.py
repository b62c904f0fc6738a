"""Two folders in, a report out: the whole of `medseg evaluate` as a function."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from .errors import InputError
from .metrics.overlap import label_overlap
from .reports.files import write_files
from .reports.html import evaluation_report
from .reports.plots import overlay
from .reports.summary import CaseResult, Evaluation, cases_csv, summarise, summary_json
from .volumes.io import SUFFIXES, read_labels, read_volume, scan_name
from .volumes.volume import Volume


def evaluate(
    prediction: Path,
    reference: Path,
    out: Path,
    *,
    labels: Mapping[int, str] | None = None,
    images: Path | None = None,
    seed: int = 0,
) -> Evaluation:
    """Compares predicted with reference label maps and writes summary.json, cases.csv and report.html into ``out``.

    Cases are paired by name: `case_seg.nii.gz` or `case.nii.gz` with `case.nii.gz` or `case_seg.nii.gz`; two single
    files are paired whatever their names. Means are over cases.

    Args:
        prediction: a label map, or a folder of them.
        reference: a label map, or a folder of them.
        out: created if missing.
        labels: value to name of the classes to compare; default: every value above 0 in any file.
        images: scans (a file or a folder, paired by name) behind the outlines in the report.
        seed: of the bootstrap.

    Raises:
        InputError: an unusable file, a reference without a prediction, or a pair on different grids.
    """
    pairs, warnings = _pairs(prediction, reference)
    values = sorted(labels) if labels is not None else _values(pairs)
    names = dict(labels) if labels is not None else {value: f"label {value}" for value in values}
    if not values:
        raise InputError(reference, "no label above 0 in any file", "at least one class", "check the references")
    cases = []
    for name, (predicted, expected) in pairs.items():
        found, truth = _read_pair(predicted, expected)
        overlap = label_overlap(found.data[0].numpy(), truth.data[0].numpy(), values)
        cases.append(CaseResult(name, str(predicted), str(expected), overlap))
    result = summarise(cases, names, seed=seed, warnings=warnings)
    scans = _by_name(images) if images is not None else {}
    page = evaluation_report(result, _pictures(result, scans))
    write_files(out, {"summary.json": summary_json(result), "cases.csv": cases_csv(result), "report.html": page})
    return result


def _pairs(prediction: Path, reference: Path) -> tuple[dict[str, tuple[Path, Path]], list[str]]:
    predictions, references = _by_name(prediction), _by_name(reference)
    if prediction.is_file() and reference.is_file():
        return {next(iter(references)): (prediction, reference)}, []
    missing = sorted(set(references) - set(predictions))
    if missing:
        raise InputError(
            prediction,
            f"no prediction for {len(missing)} of {len(references)} references ({', '.join(missing[:5])}"
            f"{', ...' if len(missing) > 5 else ''})",
            "one prediction for each reference, named alike",
            "segment the missing scans, or remove their references",
        )
    extra = sorted(set(predictions) - set(references))
    warnings = [f"{len(extra)} predictions have no reference and were left out: {', '.join(extra)}."] if extra else []
    return {name: (predictions[name], path) for name, path in sorted(references.items())}, warnings


def _by_name(path: Path) -> dict[str, Path]:
    """Case name to file, of a file or of all label maps or scans in a folder."""
    if not path.exists():
        raise InputError(path, "no such file or folder", "label maps", "check the path")
    files = [path] if path.is_file() else sorted(f for f in path.iterdir() if f.name.lower().endswith(SUFFIXES))
    # Maps that `medseg segment` writes beside the masks are no masks.
    files = [f for f in files if path.is_file() or not scan_name(f).endswith(("_prob", "_uncertainty"))]
    found: dict[str, Path] = {}
    masks = {scan_name(f).removesuffix("_seg") for f in files if scan_name(f).endswith("_seg")}
    for file in files:
        name = scan_name(file)
        if name in masks and not path.is_file():
            continue  # the scan beside its own mask
        name = name.removesuffix("_seg")
        if name in found:
            raise InputError(file, f"a second file for case {name}", f"only {found[name].name}", "remove one of them")
        found[name] = file
    if not found:
        raise InputError(path, "no label map", f"files ending in {', '.join(SUFFIXES)}", "check the folder")
    return found


def _values(pairs: Mapping[str, tuple[Path, Path]]) -> list[int]:
    found: set[int] = set()
    for files in pairs.values():
        for file in files:
            found.update(int(value) for value in np.unique(read_labels(file).data.numpy()))
    return sorted(found - {0})


def _read_pair(predicted: Path, expected: Path) -> tuple[Volume, Volume]:
    found, truth = read_labels(predicted), read_labels(expected)
    if found.shape != truth.shape or not np.allclose(found.affine, truth.affine, atol=1e-3):
        what = "the same shape with another affine" if found.shape == truth.shape else f"a grid of {found.shape}"
        raise InputError(
            predicted, what, f"the grid of {expected}, {truth.shape}", "resample the prediction onto the reference"
        )
    return found, truth


def _pictures(result: Evaluation, scans: Mapping[str, Path]) -> dict[str, tuple[CaseResult, bytes]]:
    """Overlays of the best, the median and the worst case that have a Dice, each case once."""
    ranked = sorted((case for case in result.cases if case.mean_dice == case.mean_dice), key=lambda c: -c.mean_dice)
    if not ranked:
        return {}
    chosen = {"Best case": ranked[0], "Median case": ranked[len(ranked) // 2], "Worst case": ranked[-1]}
    if len(ranked) == 1:
        chosen = {"The case": ranked[0]}
    elif len(ranked) == 2:
        del chosen["Median case"]
    pictures = {}
    for title, case in chosen.items():
        found, truth = (v.oriented("RAS") for v in _read_pair(Path(case.prediction_file), Path(case.reference_file)))
        image = None
        if case.name in scans or len(scans) == len(result.cases) == 1:
            scan = read_volume(scans.get(case.name, next(iter(scans.values()))), channels=None).oriented("RAS")
            image = scan.data[0].numpy() if scan.shape == truth.shape else None
        png = overlay(truth.data[0].numpy(), found.data[0].numpy(), truth.spacing, image)
        pictures[title] = (case, png)
    return pictures
