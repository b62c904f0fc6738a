"""The results of single cases averaged per class: means over cases with bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields

from .ambiguity import ReaderAgreement, ReaderSummary
from .calibration import Reliability
from .detection_summary import Detection
from .overlap import ClassOverlap
from .statistics import Interval, mean_interval


@dataclass(frozen=True)
class EvaluatedCase:
    """The numbers of one evaluated case.

    Attributes:
        name: The case's name, without folder, suffix and `_seg`.
        prediction_file: Path of the prediction as given.
        reference_file: Path of the reference as given.
        overlap: Label value -> agreement, for every evaluated label.
        hd95_mm: Label value -> 95th percentile Hausdorff distance; NaN where either mask is empty.
        reliability: Calibration of the case's probabilities around the reference's foreground; None without any.
        agreement: Samples compared with several readers; None without them.
    """

    name: str
    prediction_file: str
    reference_file: str
    overlap: Mapping[int, ClassOverlap]
    hd95_mm: Mapping[int, float] = field(default_factory=dict)
    reliability: Reliability | None = None
    agreement: ReaderAgreement | None = None

    @property
    def mean_dice(self) -> float:
        """Mean Dice over the classes that occur in the case; NaN if none does."""
        return _mean(item.dice for item in self.overlap.values())


@dataclass(frozen=True)
class Evaluation:
    """A comparison of predictions with references over all cases.

    Attributes:
        cases: The numbers of each case, sorted by name.
        labels: Label value -> class name.
        dice: Label value -> mean Dice with its 95 % interval over cases.
        iou: Label value -> mean IoU with its 95 % interval over cases.
        hd95: Label value -> mean of the 95th percentile Hausdorff distance in mm, with its interval.
        reliability: Calibration over the voxels of all cases with probabilities; None without any.
        readers: Agreement of samples with readers over the cases with several readers; None without any.
        detection: How well score maps find lesions; None without score maps.
        patients: Case name -> patient, if means and intervals are over patients; empty if they are over cases.
        seed: Seed of the bootstrap.
        warnings: Facts that the reader should know, one sentence each, e.g. predictions without a reference.
    """

    cases: tuple[EvaluatedCase, ...]
    labels: Mapping[int, str]
    dice: Mapping[int, Interval]
    iou: Mapping[int, Interval]
    hd95: Mapping[int, Interval]
    reliability: Reliability | None = None
    readers: ReaderSummary | None = None
    detection: Detection | None = None
    patients: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0
    warnings: tuple[str, ...] = ()

    @property
    def unit(self) -> str:
        """What means are over: "patients" or "cases"."""
        return "patients" if self.patients else "cases"

    @property
    def mean_dice(self) -> float:
        """Mean over the classes of the mean Dice of each; NaN if no class occurs in any case."""
        return _mean(interval.mean for interval in self.dice.values())

    @property
    def mean_iou(self) -> float:
        """Mean over the classes of the mean IoU of each; NaN if no class occurs in any case."""
        return _mean(interval.mean for interval in self.iou.values())

    @property
    def n_with_probabilities(self) -> int:
        """Cases whose probabilities entered `reliability`."""
        return sum(case.reliability is not None for case in self.cases)

    def class_means(self) -> dict[int, dict[str, float]]:
        """Label value -> field of `ClassOverlap` -> mean over the cases where it is not NaN."""
        return {
            label: {name: _mean(getattr(case.overlap[label], name) for case in self.cases) for name in _OVERLAP_FIELDS}
            for label in self.labels
        }

    def foreground_means(self) -> dict[str, float]:
        """Field of `ClassOverlap` -> mean of `class_means` over the classes where it is not NaN."""
        per_class = self.class_means().values()
        return {name: _mean(means[name] for means in per_class) for name in _OVERLAP_FIELDS}

    def worst_first(self) -> list[EvaluatedCase]:
        """The cases by ascending mean Dice, then by name; cases without any class come last."""

        def sort_key(case: EvaluatedCase) -> tuple[float, str]:
            # NaN has no order.
            return (math.inf if math.isnan(case.mean_dice) else case.mean_dice, case.name)

        return sorted(self.cases, key=sort_key)

    def table(self) -> list[dict[str, str | int | float | None]]:
        """One row per class: name, means with the ends of their 95 % intervals, cases in the mean and left out.

        With score maps every row also holds `Detection.key_numbers`, the same in all rows. Numbers that do not exist
        are None.
        """
        rows: list[dict[str, str | int | float | None]] = []
        detection = _none_for_nan(self.detection.key_numbers()) if self.detection is not None else {}
        for label, name in self.labels.items():
            dice, iou, hd95 = self.dice[label], self.iou[label], self.hd95[label]
            means = {
                "dice": dice.mean,
                "dice_low": dice.low,
                "dice_high": dice.high,
                "iou": iou.mean,
                "iou_low": iou.low,
                "iou_high": iou.high,
                "hd95_mm": hd95.mean,
            }
            counts = {"n": dice.n, "n_missing": dice.n_missing}
            rows.append({"class": name, **_none_for_nan(means), **counts, **detection})
        return rows


def summarise(
    cases: Sequence[EvaluatedCase],
    labels: Mapping[int, str],
    *,
    detection: Detection | None = None,
    patients: Mapping[str, str] | None = None,
    seed: int = 0,
    warnings: Sequence[str] = (),
) -> Evaluation:
    """Average the cases' results per class.

    Args:
        cases: Results that all hold every label of `labels`.
        labels: Label value -> class name.
        detection: Passed on to the result.
        patients: Case name -> patient of every case; None takes every case as a patient of its own.
        seed: Seed of the bootstrap.
        warnings: Passed on to the result.
    """
    ordered = tuple(sorted(cases, key=lambda case: case.name))
    groups = [patients[case.name] for case in ordered] if patients else None

    def means(value: Callable[[EvaluatedCase, int], float]) -> dict[int, Interval]:
        return {
            label: mean_interval([value(case, label) for case in ordered], patients=groups, seed=seed)
            for label in labels
        }

    reliabilities = [case.reliability for case in ordered if case.reliability is not None]
    agreements = {case.name: case.agreement for case in ordered if case.agreement is not None}
    readers = None
    if agreements:
        rated = [patients[name] for name in agreements] if patients else None
        readers = ReaderSummary.of(list(agreements.values()), rated, seed)
    return Evaluation(
        cases=ordered,
        labels=dict(labels),
        dice=means(lambda case, label: case.overlap[label].dice),
        iou=means(lambda case, label: case.overlap[label].iou),
        hd95=means(lambda case, label: case.hd95_mm.get(label, math.nan)),
        reliability=sum(reliabilities[1:], reliabilities[0]) if reliabilities else None,
        readers=readers,
        detection=detection,
        patients=dict(patients or {}),
        seed=seed,
        warnings=tuple(warnings),
    )


_OVERLAP_FIELDS = tuple(item.name for item in fields(ClassOverlap))


def _mean(values: Iterable[float]) -> float:
    """Mean of the values that are not NaN; NaN if there are none."""
    present = [value for value in values if not math.isnan(value)]
    return math.fsum(present) / len(present) if present else math.nan


def _none_for_nan(numbers: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}
