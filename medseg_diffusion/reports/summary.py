"""The files of an evaluation for programs: `summary.json` in nnU-Net's shape, and `cases.csv`."""

from __future__ import annotations

import csv
import io
import json
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from medseg_diffusion.metrics.calibration import BINS, REGION_VOXELS
from medseg_diffusion.metrics.evaluation_summary import EvaluatedCase, Evaluation
from medseg_diffusion.metrics.overlap import EMPTY_POLICY, EMPTY_RULE

from .detection_text import CASE_NUMBERS, case_numbers, detection_json

# nnU-Net's key for each field of `ClassOverlap`, in its order.
_KEYS = {
    "Dice": "dice", "FN": "fn", "FP": "fp", "IoU": "iou", "TN": "tn", "TP": "tp", "n_pred": "n_pred", "n_ref": "n_ref",
}  # fmt: skip
_CSV_COLUMNS = (
    "case", "label", "class", "dice", "iou", "hd95_mm", "tp", "fp", "fn", "tn", "n_pred", "n_ref", "prediction_file",
    "reference_file",
)  # fmt: skip

CALIBRATION_REGION = f"the reference's foreground and {REGION_VOXELS} voxels around it"
"""The voxels in which calibration is measured, in words."""


def summary_json(evaluation: Evaluation) -> str:
    """The text of `summary.json`: nnU-Net's three keys, so that existing scripts work, and further ones.

    Two differences from nnU-Net: a number that does not exist is `null`, because NaN is not JSON; and a class that is
    absent from every case is left out of `foreground_mean` instead of turning it into NaN.

    With score maps, `detection` holds the content of `detection_json`, and each case's `detection` has the keys of
    `CASE_NUMBERS`.
    """
    content = {
        "foreground_mean": _with_nnunet_keys(evaluation.foreground_means()),
        "mean": {str(label): _with_nnunet_keys(means) for label, means in evaluation.class_means().items()},
        "metric_per_case": [_case_json(evaluation, case) for case in evaluation.cases],
        "confidence_interval_95": {
            str(label): {
                "Dice": asdict(evaluation.dice[label]),
                "IoU": asdict(evaluation.iou[label]),
                "HD95_mm": asdict(evaluation.hd95[label]),
            }
            for label in evaluation.labels
        },
        **_optional_sections(evaluation),
        "labels": {str(label): name for label, name in evaluation.labels.items()},
        "n_cases": len(evaluation.cases),
        **({"n_patients": len(set(evaluation.patients.values()))} if evaluation.patients else {}),
        "policy": {**EMPTY_POLICY, "description": EMPTY_RULE},
        "bootstrap_seed": evaluation.seed,
        "warnings": list(evaluation.warnings),
        "versions": versions(),
    }
    return json.dumps(json_ready(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _with_nnunet_keys(numbers: Mapping[str, float]) -> dict[str, float]:
    return {key: numbers[name] for key, name in _KEYS.items()}


def _case_json(evaluation: Evaluation, case: EvaluatedCase) -> dict[str, Any]:
    metrics = {
        str(label): {
            **_with_nnunet_keys(asdict(case.overlap[label])),
            "HD95_mm": case.hd95_mm.get(label, math.nan),
        }
        for label in evaluation.labels
    }
    scores = _detection_numbers(evaluation, case)
    return {
        "metrics": metrics,
        **({"detection": scores} if evaluation.detection is not None else {}),
        "prediction_file": case.prediction_file,
        "reference_file": case.reference_file,
    }


def _detection_numbers(evaluation: Evaluation, case: EvaluatedCase) -> dict[str, float | int]:
    """The numbers of a case's score map; empty without score maps."""
    return {} if evaluation.detection is None else case_numbers(evaluation.detection.cases[case.name])


def _optional_sections(evaluation: Evaluation) -> dict[str, Any]:
    """Calibration, agreement with several raters and detection by score maps, where they were measured."""
    sections: dict[str, Any] = {}
    if (reliability := evaluation.reliability) is not None:
        sections["calibration"] = {
            "ECE": reliability.ece,
            "Brier": reliability.brier_score,
            "bins": BINS,
            "region": CALIBRATION_REGION,
            "n_cases": evaluation.n_with_probabilities,
        }
    if (readers := evaluation.readers) is not None:
        sections["raters"] = {
            "generalised_energy_distance": asdict(readers.energy_distance),
            "matched_IoU": asdict(readers.matched_iou),
            "majority_Dice": asdict(readers.majority_dice),
            "empty_samples": asdict(readers.empty_samples),
            "empty_raters": asdict(readers.empty_readers),
            "frequency_ECE": readers.frequency_ece,
        }
    if evaluation.detection is not None:
        sections["detection"] = detection_json(evaluation.detection)
    return sections


def cases_csv(evaluation: Evaluation) -> str:
    """The text of `cases.csv`: one row per case and class; a number that does not exist is an empty field.

    With score maps the columns of `CASE_NUMBERS` follow, with the same values in all rows of a case.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow((*_CSV_COLUMNS, *(CASE_NUMBERS if evaluation.detection is not None else ())))
    for case in evaluation.cases:
        scores = [_field(number) for number in _detection_numbers(evaluation, case).values()]
        for label, name in evaluation.labels.items():
            item = case.overlap[label]
            numbers = (item.dice, item.iou, case.hd95_mm.get(label, math.nan))
            counts = [item.tp, item.fp, item.fn, item.tn, item.n_pred, item.n_ref]
            files = [case.prediction_file, case.reference_file]
            writer.writerow([case.name, label, name, *map(_field, numbers), *counts, *files, *scores])
    return text.getvalue()


def _field(number: float) -> str:
    return "" if math.isnan(number) else repr(number)


def format_number(value: float, digits: int = 3) -> str:
    """A number for people: fixed digits, or a dash where there is none."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "\u2013"


def versions() -> dict[str, str]:
    """Versions of what computed the numbers; "unknown" for a package that is not installed as a distribution."""
    numbers = {"python": platform.python_version()}
    for package in ("medseg-diffusion", "numpy", "scipy"):
        try:
            numbers[package] = version(package)
        except PackageNotFoundError:
            numbers[package] = "unknown"
    return numbers


def json_ready(value: Any) -> Any:
    """The same structure with None in place of every number that JSON cannot express."""
    if isinstance(value, Mapping):
        return {key: json_ready(item) for key, item in value.items()}
    if isinstance(value, list):
        return [json_ready(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
