"""The results of single cases averaged per class: means over cases with bootstrap intervals, also by stratum."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import chain

from .ambiguity import ReaderAgreement, ReaderSummary
from .calibration import Reliability
from .case_metrics import ClassResult, MeasureOptions
from .detection_summary import Detection
from .overlap import ClassOverlap
from .registry import METRICS, Metric
from .statistics import Interval, mean_interval, rough

Means = Mapping[str, Mapping[int, Interval]]
"""Name of a metric -> label value -> mean over cases with its median and 95 % interval."""


@dataclass(frozen=True)
class EvaluatedCase:
    """The numbers of one evaluated case.

    Attributes:
        name: The case's name, without folder, suffix and `_seg`.
        prediction_file: Path of the prediction as given.
        reference_file: Path of the reference as given.
        results: Label value -> counts of voxels and metrics, for every evaluated label.
        spacing_mm: Voxel size along each axis of the file.
        reliability: Calibration of the case's probabilities around the reference's foreground; None without any.
        agreement: Samples compared with several readers; None without them.
    """

    name: str
    prediction_file: str
    reference_file: str
    results: Mapping[int, ClassResult]
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)
    reliability: Reliability | None = None
    agreement: ReaderAgreement | None = None

    @property
    def metrics(self) -> dict[int, Mapping[str, float]]:
        """Label value -> name of a metric -> value; NaN where it does not exist."""
        return {label: result.metrics for label, result in self.results.items()}

    @property
    def overlap(self) -> dict[int, ClassOverlap]:
        """Label value -> counts of voxels."""
        return {label: result.overlap for label, result in self.results.items()}

    @property
    def mean_dice(self) -> float:
        """Mean Dice over the classes that occur in the case; NaN if none does."""
        return mean(result.overlap.dice for result in self.results.values())


@dataclass(frozen=True)
class Strata:
    """Groups of cases by a column of a table.

    Attributes:
        source: File of the table.
        column: Name of the column.
        of_case: Case name -> stratum.
        means: Stratum -> means over its cases, in the order of their names.
    """

    source: str
    column: str
    of_case: Mapping[str, str]
    means: Mapping[str, Means]


@dataclass(frozen=True)
class Evaluation:
    """A comparison of predictions with references over all cases.

    Attributes:
        cases: The numbers of each case, sorted by name.
        labels: Label value -> class name.
        means: Name of a metric -> label value -> mean over cases with its median and 95 % interval.
        tolerances_mm: Label value -> tolerance of the normalised surface distance.
        lesion_overlap: Share of a lesion's voxels that must be predicted for it to be detected.
        reliability: Calibration over the voxels of all cases with probabilities; None without any.
        readers: Agreement of samples with readers over the cases with several readers; None without any.
        detection: How well score maps find lesions; None without score maps.
        strata: The means of groups of cases; None without a table of strata.
        patients: Case name -> patient, if means and intervals are over patients; empty if they are over cases.
        seed: Seed of the bootstrap.
        warnings: Facts that the reader should know, one sentence each, e.g. predictions without a reference, or
            intervals over few cases.
    """

    cases: tuple[EvaluatedCase, ...]
    labels: Mapping[int, str]
    means: Means
    tolerances_mm: Mapping[int, float]
    lesion_overlap: float
    reliability: Reliability | None = None
    readers: ReaderSummary | None = None
    detection: Detection | None = None
    strata: Strata | None = None
    patients: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0
    warnings: tuple[str, ...] = ()

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics that were computed, in the order of columns."""
        return tuple(METRICS[name] for name in self.means)

    @property
    def dice(self) -> Mapping[int, Interval]:
        """Label value -> mean Dice."""
        return self.means["dice"]

    @property
    def iou(self) -> Mapping[int, Interval]:
        """Label value -> mean IoU."""
        return self.means["iou"]

    @property
    def hd95(self) -> Mapping[int, Interval]:
        """Label value -> mean of the 95th percentile Hausdorff distance in mm."""
        return self.means["hd95_mm"]

    @property
    def intervals(self) -> list[Interval]:
        """Every mean over cases, also those of strata, readers and detection."""
        tables = [self.means, *(self.strata.means.values() if self.strata is not None else ())]
        found = [interval for means in tables for of_labels in means.values() for interval in of_labels.values()]
        if self.readers is not None:
            found += [value for value in vars(self.readers).values() if isinstance(value, Interval)]
        if self.detection is not None:
            detection = self.detection
            found += chain(detection.means.values(), detection.lesion_means.values(), detection.healthy.values())
        return found

    @property
    def several_lesions(self) -> bool:
        """Whether any class of any case has several components, so that numbers of lesions say more than Dice."""
        return any(
            result.metrics["reference_lesions"] > 1 or result.metrics["predicted_lesions"] > 1
            for case in self.cases
            for result in case.results.values()
        )

    @property
    def key_metrics(self) -> list[Metric]:
        """The metrics that say most, for short tables; lesion F1 only where anything has several lesions."""
        names = ("dice", "nsd", "hd95_mm", "volume_error_ml", *(("lesion_f1",) if self.several_lesions else ()))
        return [METRICS[name] for name in names if name in self.means]

    @property
    def unit(self) -> str:
        """What means are over: "patients" or "cases"."""
        return "patients" if self.patients else "cases"

    @property
    def mean_dice(self) -> float:
        """Mean over the classes of the mean Dice of each; NaN if no class occurs in any case."""
        return mean(interval.mean for interval in self.dice.values())

    @property
    def n_with_probabilities(self) -> int:
        """Cases whose probabilities entered `reliability`."""
        return sum(case.reliability is not None for case in self.cases)

    def counts(self) -> dict[int, dict[str, float]]:
        """Label value -> nnU-Net's counts (tp, fp, fn, tn, n_pred, n_ref) -> mean over the cases."""
        return {
            label: {name: mean(getattr(case.results[label].overlap, name) for case in self.cases) for name in COUNTS}
            for label in self.labels
        }

    def class_means(self) -> dict[int, dict[str, float]]:
        """Label value -> count or name of a metric -> mean over the cases where it is not NaN."""
        counts = self.counts()
        return {
            label: {
                **counts[label],
                **{name: mean(case.results[label].metrics[name] for case in self.cases) for name in self.means},
            }
            for label in self.labels
        }

    def foreground_means(self) -> dict[str, float]:
        """Key of `class_means` -> mean over the classes where it is not NaN."""
        per_class = list(self.class_means().values())
        return {name: mean(means[name] for means in per_class) for name in (*COUNTS, *self.means)}

    def worst_first(self) -> list[EvaluatedCase]:
        """The cases by ascending mean Dice, then by name; cases without any class come last."""

        def sort_key(case: EvaluatedCase) -> tuple[float, str]:
            # NaN has no order.
            return (math.inf if math.isnan(case.mean_dice) else case.mean_dice, case.name)

        return sorted(self.cases, key=sort_key)

    def table(self) -> list[dict[str, str | int | float | None]]:
        """One row per class: label, class, cases in the mean Dice and left out of it, and the numbers of each metric.

        The keys are NAME (the mean), NAME_median, NAME_low, NAME_high (the 95 % interval) and NAME_missing for each
        metric NAME. With score maps every row also holds `Detection.key_numbers`, the same in all rows. Numbers that do
        not exist are None.
        """
        rows: list[dict[str, str | int | float | None]] = []
        detection = _none_for_nan(self.detection.key_numbers()) if self.detection is not None else {}
        for label, class_name in self.labels.items():
            numbers: dict[str, int | float | None] = {}
            for name, intervals in self.means.items():
                one = intervals[label]
                ends = {f"{name}_median": one.median, f"{name}_low": one.low, f"{name}_high": one.high}
                numbers |= {**_none_for_nan({name: one.mean, **ends}), f"{name}_missing": one.n_missing}
            counts = {"n": self.dice[label].n, "n_missing": self.dice[label].n_missing}
            rows.append({"label": label, "class": class_name, **counts, **numbers, **detection})
        return rows


def summarise(
    cases: Sequence[EvaluatedCase],
    labels: Mapping[int, str],
    *,
    how: MeasureOptions = MeasureOptions(),
    detection: Detection | None = None,
    patients: Mapping[str, str] | None = None,
    strata: tuple[str, str, Mapping[str, str]] | None = None,
    seed: int = 0,
    warnings: Sequence[str] = (),
) -> Evaluation:
    """Average the cases' results per class.

    Args:
        cases: At least one, with results that all hold every label of `labels` and the same metrics.
        labels: Label value -> class name.
        how: The options with which the cases were measured.
        detection: Passed on to the result.
        patients: Case name -> patient of every case; None takes every case as a patient of its own.
        strata: File and column of a table of strata, and case name -> stratum of every case.
        seed: Seed of the bootstrap.
        warnings: Passed on to the result, which adds one on intervals over few cases.
    """
    ordered = tuple(sorted(cases, key=lambda case: case.name))
    reliabilities = [case.reliability for case in ordered if case.reliability is not None]
    agreements = {case.name: case.agreement for case in ordered if case.agreement is not None}
    readers = None
    if agreements:
        rated = [patients[name] for name in agreements] if patients else None
        readers = ReaderSummary.of(list(agreements.values()), rated, seed)
    result = Evaluation(
        cases=ordered,
        labels=dict(labels),
        means=_means(ordered, labels, patients, seed),
        tolerances_mm={label: how.tolerance_of(label) for label in labels},
        lesion_overlap=how.lesion_overlap,
        reliability=sum(reliabilities[1:], reliabilities[0]) if reliabilities else None,
        readers=readers,
        detection=detection,
        strata=_strata(ordered, labels, patients, strata, seed) if strata is not None else None,
        patients=dict(patients or {}),
        seed=seed,
        warnings=tuple(warnings),
    )
    return replace(result, warnings=(*result.warnings, *rough(result.intervals, result.unit)))


def _means(
    cases: Sequence[EvaluatedCase], labels: Iterable[int], patients: Mapping[str, str] | None, seed: int
) -> dict[str, dict[int, Interval]]:
    labels = list(labels)
    groups = [patients[case.name] for case in cases] if patients else None
    names = cases[0].results[labels[0]].metrics
    return {
        name: {
            label: mean_interval([case.results[label].metrics[name] for case in cases], patients=groups, seed=seed)
            for label in labels
        }
        for name in names
    }


def _strata(
    cases: Sequence[EvaluatedCase],
    labels: Iterable[int],
    patients: Mapping[str, str] | None,
    strata: tuple[str, str, Mapping[str, str]],
    seed: int,
) -> Strata:
    source, column, of_case = strata
    groups: dict[str, list[EvaluatedCase]] = {name: [] for name in sorted(set(of_case.values()))}
    for case in cases:
        groups[of_case[case.name]].append(case)
    means = {name: _means(group, labels, patients, seed) for name, group in groups.items()}
    return Strata(source, column, dict(of_case), means)


COUNTS = tuple(item.name for item in fields(ClassOverlap) if item.name not in METRICS)
"""Counts of voxels of a class: tp, fp, fn, tn, n_pred, n_ref."""


def mean(values: Iterable[float]) -> float:
    """Mean of the values that are not NaN; NaN if there are none."""
    present = [value for value in values if not math.isnan(value)]
    return math.fsum(present) / len(present) if present else math.nan


def _none_for_nan(numbers: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}
