"""Predicted masks against reference masks: the whole of `medseg evaluate` as one function."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from medseg_diffusion.errors import InputError
from medseg_diffusion.metrics.overlap import ClassOverlap, label_overlap
from medseg_diffusion.reports.files import write_files
from medseg_diffusion.reports.html import CasePicture, evaluation_report
from medseg_diffusion.reports.plots import overlay
from medseg_diffusion.reports.summary import CaseResult, Evaluation, cases_csv, summarise, summary_json
from medseg_diffusion.volumes.io import SUFFIXES, read_labels, read_volume, scan_name
from medseg_diffusion.volumes.volume import Volume

__all__ = ["Evaluation", "evaluate"]

# A label map has a few hundred classes at the very most; a scan passed by mistake has thousands of values.
_MAX_CLASSES = 1000
# Written by `medseg segment` beside its masks: not predictions to be compared, and no surprise in their folder.
_COMPANIONS = ("_prob", "_uncertainty", "_anomaly")


@dataclass(frozen=True)
class _Pair:
    name: str
    prediction: Path
    reference: Path


def evaluate(
    prediction: Path,
    reference: Path,
    out: Path,
    *,
    labels: Mapping[int, str] | Sequence[int] | None = None,
    images: Path | None = None,
    seed: int = 0,
    command: str | None = None,
) -> Evaluation:
    """Compare predicted with reference masks; write `summary.json`, `cases.csv` and `report.html`.

    Two files are compared with each other. Files in folders are paired by name: `case_seg.nii.gz`, else `case.nii.gz`,
    stands for `case` on either side. A single prediction in front of a folder of references is compared with its own
    reference only. Every file counts as one independent case.

    Args:
        prediction: Predicted label map, or a folder of them.
        reference: Reference label map, or a folder of them.
        out: Folder for the results; created. An earlier result in it is replaced.
        labels: Label value -> class name, or label values, to evaluate; None takes every label above 0 that any
            prediction or reference holds, so that false alarms of a class without reference count.
        images: The scans (a file or a folder, paired by name) as background of the pictures; without one the reference
            is shown on black.
        seed: Seed of the bootstrap.
        command: What the report's footer says was run; None describes this call.

    Returns:
        The numbers. `warnings` names predictions without a reference and labels that were left out.

    Raises:
        InputError: A path or file that cannot be used, a reference without a prediction, two files for one case, a
            prediction or image on another grid than its reference, or no label to evaluate. Nothing is written then.
    """
    prediction, reference, out = Path(prediction), Path(reference), Path(out)
    pairs, notes = _pairs(prediction, reference)
    backgrounds = _backgrounds(images, pairs)
    wanted = _named(labels)
    found = {pair.name: _compare(pair, set(wanted)) for pair in pairs}
    present = {label for overlap in found.values() for label, item in overlap.items() if item.n_pred or item.n_ref}
    names = wanted or {label: f"label {label}" for label in sorted(present)}
    if not names:
        raise InputError(
            reference, "no label above 0 in any reference or prediction", "at least one class", "pass the labels to use"
        )
    if left_out := sorted(present - set(names)):
        notes.append(f"Labels not evaluated: {', '.join(map(str, left_out))}.")
    if absent := sorted(set(names) - present):
        notes.append(f"Labels in no reference and no prediction: {', '.join(map(str, absent))}.")
    cases = [
        CaseResult(
            pair.name, str(pair.prediction), str(pair.reference), {label: found[pair.name][label] for label in names}
        )
        for pair in (_ for _ in pairs)
    ]
    result = summarise(cases, names, seed=seed, warnings=notes)
    report = evaluation_report(
        result,
        _pictures(result, {pair.name: pair for pair in pairs}, backgrounds),
        command=command if command is not None else _command(prediction, reference, out, images),
    )
    write_files(
        out, {"summary.json": summary_json(result), "cases.csv": cases_csv(result), "report.html": report}
    )
    return result
