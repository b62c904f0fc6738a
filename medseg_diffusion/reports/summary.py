"""Evaluation results as data: `summary.json` in nnU-Net's shape and `cases.csv`."""

from __future__ import annotations

import csv
import io
import json
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from medseg_diffusion.metrics.calibration import BINS, REGION_VOXELS, Reliability
from medseg_diffusion.metrics.overlap import EMPTY_POLICY, EMPTY_RULE, ClassOverlap
from medseg_diffusion.metrics.statistics import Interval, mean_interval

from medseg_diffusion.metrics.detection_summary import Detection
from .detection_text import CASE_KEYS, case_numbers, detection_json, table_numbers

# nnU-Net's key for each field of `ClassOverlap`, in its order.
_KEYS = {
    "Dice": "dice", "FN": "fn", "FP": "fp", "IoU": "iou", "TN": "tn", "TP": "tp", "n_pred": "n_pred", "n_ref": "n_ref",
}  # fmt: skip
_CSV_COLUMNS = (
    "case", "label", "class", "dice", "iou", "hd95_mm", "tp", "fp", "fn", "tn", "n_pred", "n_ref", "prediction_file",
    "reference_file",
)  # fmt: skip


CALIBRATION_REGION = f"the reference's foreground and {REGION_VOXELS} voxels around it"


@dataclass(frozen=True)
class CaseResult:
    """One evaluated case.

    Attributes:
        name: The case's name, without folder, suffix and `_seg`.
        prediction_file: Path of the prediction as given.
        reference_file: Path of the reference as given.
        overlap: Label value -> agreement, for every evaluated label.
        hd95_mm: Label value -> 95th percentile Hausdorff distance; NaN where either mask is empty.
        reliability: Of the case's probabilities around the reference's foreground, where there are any.
        energy_distance: Generalised energy distance of the samples from several raters; NaN without them.
        matched_iou: Hungarian-matched IoU of the samples with several raters; NaN without them.
    """

    name: str
    prediction_file: str
    reference_file: str
    overlap: Mapping[int, ClassOverlap]
    hd95_mm: Mapping[int, float] = field(default_factory=dict)
    reliability: Reliability | None = None
    energy_distance: float = math.nan
    matched_iou: float = math.nan

    @property
    def mean_dice(self) -> float:
        """Mean Dice over the classes that occur in the case; NaN if none does."""
        return _mean(item.dice for item in self.overlap.values())


@dataclass(frozen=True)
class Evaluation:
    """A comparison of predictions with references over all cases.

    Attributes:
        cases: One result per case, sorted by name.
        labels: Label value -> class name.
        dice: Label value -> mean Dice with its 95 % interval over cases.
        iou: Label value -> mean IoU with its 95 % interval over cases.
        hd95: Label value -> mean of the 95th percentile Hausdorff distance in mm, with its interval.
        reliability: Of all cases with probabilities together; None without any.
        energy_distance: Mean over cases with several raters; None without any.
        matched_iou: The same of the matched IoU.
        detection: How well score maps find lesions, where there are score maps.
        seed: Seed of the bootstrap.
        warnings: Facts that the reader should know, one sentence each, e.g. predictions without a reference.
    """

    cases: tuple[CaseResult, ...]
    labels: Mapping[int, str]
    dice: Mapping[int, Interval]
    iou: Mapping[int, Interval]
    hd95: Mapping[int, Interval]
    reliability: Reliability | None = None
    energy_distance: Interval | None = None
    matched_iou: Interval | None = None
    detection: Detection | None = None
    seed: int = 0
    warnings: tuple[str, ...] = ()

    @property
    def mean_dice(self) -> float:
        """Mean over the classes of the mean Dice of each; NaN if no class occurs in any case."""
        return _mean(interval.mean for interval in self.dice.values())

    @property
    def mean_iou(self) -> float:
        """Mean over the classes of the mean IoU of each; NaN if no class occurs in any case."""
        return _mean(interval.mean for interval in self.iou.values())

    def worst_first(self) -> list[CaseResult]:
        """The cases by ascending mean Dice, then by name; cases without any class come last."""

        def badness(case: CaseResult) -> tuple[float, str]:
            # NaN has no order.
            return (math.inf if math.isnan(case.mean_dice) else case.mean_dice, case.name)

        return sorted(self.cases, key=badness)

    def table(self) -> list[dict[str, str | int | float | None]]:
        """One row per class: name, means with the ends of their 95 % intervals, cases in the mean and left out.

        With score maps also the numbers of `table_numbers`, which are the same in every row. Numbers that do not exist
        are None.
        """
        rows: list[dict[str, str | int | float | None]] = []
        scored = table_numbers(self.detection) if self.detection is not None else {}
        for label, name in self.labels.items():
            dice, iou, hd95 = self.dice[label], self.iou[label], self.hd95[label]
            numbers = {
                "dice": dice.mean,
                "dice_low": dice.low,
                "dice_high": dice.high,
                "iou": iou.mean,
                "iou_low": iou.low,
                "iou_high": iou.high,
                "hd95_mm": hd95.mean,
            }
            counts = {"n": dice.n, "n_missing": dice.n_missing}
            rows.append({"class": name, **json_ready(numbers), **counts, **json_ready(scored)})
        return rows


def summarise(
    cases: Sequence[CaseResult],
    labels: Mapping[int, str],
    *,
    detection: Detection | None = None,
    seed: int = 0,
    warnings: Sequence[str] = (),
) -> Evaluation:
    """Average the cases' results per class.

    Args:
        cases: Results that all hold every label of `labels`.
        labels: Label value -> class name.
        detection: Passed on to the result, as are `warnings`.
        seed: Seed of the bootstrap.
        warnings: Passed on to the result.
    """
    ordered = tuple(sorted(cases, key=lambda case: case.name))
    dice = {label: mean_interval([case.overlap[label].dice for case in ordered], seed=seed) for label in labels}
    iou = {label: mean_interval([case.overlap[label].iou for case in ordered], seed=seed) for label in labels}
    hd95 = {
        label: mean_interval([case.hd95_mm.get(label, math.nan) for case in ordered], seed=seed) for label in labels
    }
    known = [case.reliability for case in ordered if case.reliability is not None]
    rated = [case for case in ordered if not math.isnan(case.energy_distance)]
    return Evaluation(
        ordered,
        dict(labels),
        dice,
        iou,
        hd95,
        sum(known[1:], known[0]) if known else None,
        mean_interval([case.energy_distance for case in rated], seed=seed) if rated else None,
        mean_interval([case.matched_iou for case in rated], seed=seed) if rated else None,
        detection,
        seed,
        tuple(warnings),
    )


def summary_json(evaluation: Evaluation) -> str:
    """The text of `summary.json`: nnU-Net's three keys, so that existing scripts work, and what they lack.

    Two differences from nnU-Net: a number that does not exist is `null`, because NaN is not JSON; and a class that is
    absent from every case is left out of `foreground_mean` instead of turning it into NaN.

    With score maps, `detection` holds what `detection_json` says, and so does each case's `detection` with the keys of
    `CASE_KEYS`.
    """
    mean = {
        str(label): {
            key: _mean(getattr(case.overlap[label], field) for case in evaluation.cases) for key, field in _KEYS.items()
        }
        for label in evaluation.labels
    }
    content = {
        "foreground_mean": {key: _mean(values[key] for values in mean.values()) for key in _KEYS},
        "mean": mean,
        "metric_per_case": [
            {
                "metrics": {
                    str(label): {
                        **{key: getattr(case.overlap[label], field) for key, field in _KEYS.items()},
                        "HD95_mm": case.hd95_mm.get(label, math.nan),
                    }
                    for label in evaluation.labels
                },
                **_scored(evaluation, case),
                "prediction_file": case.prediction_file,
                "reference_file": case.reference_file,
            }
            for case in evaluation.cases
        ],
        "confidence_interval_95": {
            str(label): {
                "Dice": asdict(evaluation.dice[label]),
                "IoU": asdict(evaluation.iou[label]),
                "HD95_mm": asdict(evaluation.hd95[label]),
            }
            for label in evaluation.labels
        },
        **_further(evaluation),
        "labels": {str(label): name for label, name in evaluation.labels.items()},
        "n_cases": len(evaluation.cases),
        "policy": {**EMPTY_POLICY, "description": EMPTY_RULE},
        "bootstrap_seed": evaluation.seed,
        "warnings": list(evaluation.warnings),
        "versions": versions(),
    }
    return json.dumps(json_ready(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _scored(evaluation: Evaluation, case: CaseResult) -> dict[str, Any]:
    """The numbers of a case's score map, where there are score maps."""
    return {} if evaluation.detection is None else {"detection": case_numbers(evaluation.detection.cases[case.name])}


def _further(evaluation: Evaluation) -> dict[str, Any]:
    """Calibration, agreement with several raters and detection by scores, where they were measured."""
    found: dict[str, Any] = {}
    if (reliability := evaluation.reliability) is not None:
        found["calibration"] = {
            "ECE": reliability.ece,
            "Brier": reliability.brier_score,
            "bins": BINS,
            "region": CALIBRATION_REGION,
            "n_cases": sum(case.reliability is not None for case in evaluation.cases),
        }
    if evaluation.energy_distance is not None and evaluation.matched_iou is not None:
        found["raters"] = {
            "generalised_energy_distance": asdict(evaluation.energy_distance),
            "matched_IoU": asdict(evaluation.matched_iou),
        }
    if evaluation.detection is not None:
        found["detection"] = detection_json(evaluation.detection)
    return found


def cases_csv(evaluation: Evaluation) -> str:
    """The text of `cases.csv`: one row per case and class; a number that does not exist is an empty field.

    With score maps the columns of `CASE_KEYS` follow, the same in all rows of a case.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow((*_CSV_COLUMNS, *(CASE_KEYS if evaluation.detection is not None else ())))
    for case in evaluation.cases:
        scored = [_field(number) for number in _scored(evaluation, case).get("detection", {}).values()]
        for label, name in evaluation.labels.items():
            item = case.overlap[label]
            numbers = (item.dice, item.iou, case.hd95_mm.get(label, math.nan))
            counts = [item.tp, item.fp, item.fn, item.tn, item.n_pred, item.n_ref]
            files = [case.prediction_file, case.reference_file]
            writer.writerow([case.name, label, name, *map(_field, numbers), *counts, *files, *scored])
    return text.getvalue()


def _field(number: float) -> str:
    return "" if math.isnan(number) else repr(number)


def format_number(value: float, digits: int = 3) -> str:
    """A number for people: fixed digits, or a dash where there is none."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "\u2013"


def versions() -> dict[str, str]:
    """Versions of what computed the numbers; "unknown" for a package that is not installed as a distribution."""
    found = {"python": platform.python_version()}
    for package in ("medseg-diffusion", "numpy", "scipy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def _mean(values: Iterable[float]) -> float:
    """Mean of the values that are not NaN; NaN if there are none."""
    present = [value for value in values if not math.isnan(value)]
    return math.fsum(present) / len(present) if present else math.nan


def json_ready(value: Any) -> Any:
    """The same structure with None in place of every number that JSON cannot express."""
    if isinstance(value, Mapping):
        return {key: json_ready(item) for key, item in value.items()}
    if isinstance(value, list):
        return [json_ready(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
