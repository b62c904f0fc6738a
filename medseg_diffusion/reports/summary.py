"""The files of an evaluation for programs: `summary.json` in nnU-Net's shape, and `cases.csv`."""

from __future__ import annotations

import csv
import io
import json
import math
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from medseg_diffusion.metrics.calibration import BINS, REGION_VOXELS
from medseg_diffusion.metrics.comparison import ALPHA, METHOD, Comparison
from medseg_diffusion.metrics.evaluation_summary import COUNTS, EvaluatedCase, Evaluation, Means
from medseg_diffusion.metrics.overlap import EMPTY_POLICY, EMPTY_RULE
from medseg_diffusion.metrics.registry import METRICS

from .detection_text import CASE_NUMBERS, case_numbers, detection_json

# Key in summary.json of each count and metric; the counts and the keys Dice and IoU are nnU-Net's.
_KEYS = {
    "fn": "FN", "fp": "FP", "tn": "TN", "tp": "TP", "n_pred": "n_pred", "n_ref": "n_ref",
    **{name: metric.key for name, metric in METRICS.items()},
}  # fmt: skip

CALIBRATION_REGION = f"the reference's foreground and {REGION_VOXELS} voxels around it"
"""The voxels in which calibration is measured, in words."""


def summary_json(evaluation: Evaluation) -> str:
    """The text of `summary.json`: nnU-Net's three keys, so that existing scripts work, and further ones.

    Two differences from nnU-Net: a number that does not exist is `null`, because NaN is not JSON; and a class that is
    absent from every case is left out of `foreground_mean` instead of turning it into NaN. docs/reference/files.md
    describes every key.
    """
    content = {
        "foreground_mean": _with_keys(evaluation.foreground_means()),
        "mean": {str(label): _with_keys(means) for label, means in evaluation.class_means().items()},
        "metric_per_case": [_case_json(evaluation, case) for case in evaluation.cases],
        "confidence_interval_95": _intervals(evaluation.means, evaluation.labels),
        **optional_sections(evaluation),
        "labels": {str(label): name for label, name in evaluation.labels.items()},
        "n_cases": len(evaluation.cases),
        **({"n_patients": len(set(evaluation.patients.values()))} if evaluation.patients else {}),
        "metrics": {
            metric.key: {
                "column": metric.name,
                "unit": metric.unit,
                "better": metric.better,
                "definition": metric.definition,
                **metric.policy,
            }
            for metric in evaluation.metrics
        },
        "tolerance_mm": {str(label): tolerance for label, tolerance in evaluation.tolerances_mm.items()},
        "lesion_overlap": evaluation.lesion_overlap,
        "policy": {**EMPTY_POLICY, "description": EMPTY_RULE},
        "bootstrap_seed": evaluation.seed,
        "warnings": list(evaluation.warnings),
        "versions": versions(),
    }
    return json.dumps(json_ready(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _with_keys(numbers: Mapping[str, float]) -> dict[str, float]:
    return {key: numbers[name] for name, key in _KEYS.items() if name in numbers}


def _intervals(means: Means, labels: Iterable[int]) -> dict[str, dict[str, Any]]:
    return {
        str(label): {METRICS[name].key: asdict(intervals[label]) for name, intervals in means.items()}
        for label in labels
    }


def _case_json(evaluation: Evaluation, case: EvaluatedCase) -> dict[str, Any]:
    metrics = {
        str(label): _with_keys({**_counts(case, label), **case.results[label].metrics}) for label in evaluation.labels
    }
    scores = _detection_numbers(evaluation, case)
    return {
        "metrics": metrics,
        **({"detection": scores} if evaluation.detection is not None else {}),
        **({"stratum": evaluation.strata.of_case[case.name]} if evaluation.strata is not None else {}),
        "prediction_file": case.prediction_file,
        "reference_file": case.reference_file,
    }


def _counts(case: EvaluatedCase, label: int) -> dict[str, int]:
    return {name: getattr(case.results[label].overlap, name) for name in COUNTS}


def _detection_numbers(evaluation: Evaluation, case: EvaluatedCase) -> dict[str, float | int]:
    """The numbers of a case's score map; empty without score maps."""
    return {} if evaluation.detection is None else case_numbers(evaluation.detection.cases[case.name])


def optional_sections(evaluation: Evaluation) -> dict[str, Any]:
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
    if (strata := evaluation.strata) is not None:
        sections["strata"] = {
            "file": strata.source,
            "column": strata.column,
            "confidence_interval_95": {
                stratum: _intervals(means, evaluation.labels) for stratum, means in strata.means.items()
            },
        }
    return sections


FIRST_COLUMNS = ("case", "label", "class")
"""The first columns of `cases.csv`, by which it is recognised."""


def cases_csv(evaluation: Evaluation) -> str:
    """The text of `cases.csv`: one row per case and class; a number that does not exist is an empty field.

    With score maps the columns of `CASE_NUMBERS` follow, with the same values in all rows of a case.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    patients, strata = evaluation.patients, evaluation.strata
    writer.writerow(
        (
            *FIRST_COLUMNS,
            *(("patient",) if patients else ()),
            *(("stratum",) if strata is not None else ()),
            *evaluation.means,
            *COUNTS,
            *("prediction_file", "reference_file"),
            *(CASE_NUMBERS if evaluation.detection is not None else ()),
        )
    )
    for case in evaluation.cases:
        scores = [_field(number) for number in _detection_numbers(evaluation, case).values()]
        groups = [patients[case.name]] if patients else []
        groups += [strata.of_case[case.name]] if strata is not None else []
        files = [case.prediction_file, case.reference_file]
        for label, name in evaluation.labels.items():
            numbers = [_field(case.results[label].metrics[metric]) for metric in evaluation.means]
            counts = _counts(case, label).values()
            writer.writerow([case.name, label, name, *groups, *numbers, *counts, *files, *scores])
    return text.getvalue()


def _field(number: float) -> str:
    return "" if math.isnan(number) else repr(number)


def comparison_json(comparison: Comparison) -> str:
    """The text of `comparison.json`: paired differences of sets of predictions, each with what can be concluded."""
    first = comparison.first
    content = {
        "predictions": dict(comparison.folders),
        "cases": [case.name for case in first.cases],
        "left_out": dict(comparison.left_out),
        "n_cases": len(first.cases),
        **({"n_patients": len(set(first.patients.values()))} if first.patients else {}),
        "unit": first.unit,
        "method": METHOD,
        "alpha": ALPHA,
        "n_tests": comparison.n_tests,
        "comparisons": [
            {
                "first": one.first,
                "second": one.second,
                "label": one.label,
                "class": first.labels[one.label],
                "metric": METRICS[one.metric].key,
                "difference": asdict(one.difference),
                "p_value": one.p_value,
                "p_holm": one.p_holm,
                "conclusion": one.conclusion,
            }
            for one in comparison.differences
        ],
        "bootstrap_seed": first.seed,
        "warnings": list(comparison.warnings),
        "versions": versions(),
    }
    return json.dumps(json_ready(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


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
