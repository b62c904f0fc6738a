"""Several sets of predictions for the same cases, compared in pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

from .evaluation_summary import Evaluation
from .registry import METRICS, Metric
from .statistics import Interval, by_patient, holm, mean_interval, paired_wilcoxon

ALPHA = 0.05
"""A corrected p value below it counts as a difference."""
MIN_PATIENTS = 6
"""With fewer differences than this, the signed-rank test cannot reach p < `ALPHA`: 2 / 2^5 is above it."""
METHOD = (
    "Differences are paired: each patient's value of the second set of predictions is subtracted from that of the "
    "first. Intervals are 95 % bootstrap intervals (BCa) of the mean difference. P values are of the two-sided "
    "Wilcoxon signed-rank test, corrected by Holm's method over all comparisons."
)
"""How sets of predictions are compared, in words."""


@dataclass(frozen=True)
class PairedDifference:
    """One metric of one class in two sets of predictions.

    Attributes:
        first: Name of the first set.
        second: Name of the second set.
        label: Label value of the class.
        metric: Name of the metric.
        difference: Mean of first minus second with its median and 95 % interval. Pairs in which one of the two values
            does not exist are missing.
        p_value: Of the Wilcoxon signed-rank test; NaN without pairs.
        p_holm: The same, corrected over all comparisons.
        conclusion: What can be concluded, and what cannot: one or two sentences.
    """

    first: str
    second: str
    label: int
    metric: str
    difference: Interval
    p_value: float
    p_holm: float = math.nan
    conclusion: str = ""


@dataclass(frozen=True)
class Comparison:
    """Several sets of predictions for the same cases.

    Attributes:
        evaluations: Name of a set -> its evaluation. All have the same cases and labels.
        folders: Name of a set -> its path as given.
        differences: For every pair of sets, class and metric that is `Metric.compared`.
        left_out: Case name -> why it is not compared.
        warnings: Facts that the reader should know, one sentence each.
    """

    evaluations: Mapping[str, Evaluation]
    folders: Mapping[str, str]
    differences: tuple[PairedDifference, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def first(self) -> Evaluation:
        """The evaluation of the first set, for what all have in common: cases, labels, patients, metrics."""
        return next(iter(self.evaluations.values()))

    @property
    def key_metrics(self) -> list[Metric]:
        """The metrics that say most, for short tables; lesion F1 where anything in any set has several lesions."""
        return max((evaluation.key_metrics for evaluation in self.evaluations.values()), key=len)

    @property
    def conclusions(self) -> list[str]:
        """The sentences that a summary has: those on Dice, and those on other metrics whose corrected p is small."""
        return [one.conclusion for one in self.differences if one.metric == "dice" or one.p_holm < ALPHA]

    @property
    def n_tests(self) -> int:
        """Tests that were made, over which the p values are corrected."""
        return sum(not math.isnan(one.p_value) for one in self.differences)


def compare(evaluations: Mapping[str, Evaluation]) -> tuple[PairedDifference, ...]:
    """Compare sets of predictions in pairs, by every class and every metric that is `Metric.compared`.

    Args:
        evaluations: Name of a set -> its evaluation. All have the same cases, labels, patients and metrics.
    """
    sets = list(evaluations.items())
    shown = sets[0][1]
    differences = [
        _difference(first, second, label, metric)
        for first, second in combinations(sets, 2)
        for label in shown.labels
        for metric in shown.metrics
        # Where nothing has several lesions, lesion F1 is only detected or not, and Dice says more.
        if metric.compared and (metric.name != "lesion_f1" or any(one.several_lesions for _, one in sets))
    ]
    corrected = holm([one.p_value for one in differences])
    count = sum(not math.isnan(p) for p in corrected)
    results = []
    for one, p_holm in zip(differences, corrected, strict=True):
        values = {**vars(one), "p_holm": p_holm}
        conclusion = _conclusion(PairedDifference(**values), shown.labels[one.label], shown.unit, count)
        results.append(PairedDifference(**{**values, "conclusion": conclusion}))
    return tuple(results)


def _difference(
    first: tuple[str, Evaluation], second: tuple[str, Evaluation], label: int, metric: Metric
) -> PairedDifference:
    values = [
        np.asarray([case.results[label].metrics[metric.name] for case in evaluation.cases])
        for _, evaluation in (first, second)
    ]
    patients = first[1].patients
    groups = [patients[case.name] for case in first[1].cases] if patients else None
    paired = values[0] - values[1]
    if groups is not None:
        paired = by_patient(paired, groups)
    test = paired_wilcoxon(paired, np.zeros_like(paired))
    return PairedDifference(
        first[0], second[0], label, metric.name, mean_interval(paired, seed=first[1].seed), test.p_value
    )


def hopeless(n: int, n_tests: int) -> bool:
    """Whether so few patients cannot show a difference of any size in so many tests."""
    # The smallest p that a test of so few can have, times the number of tests: what Holm's correction makes of it.
    return 2.0 ** (1 - n) * n_tests >= ALPHA


def _conclusion(one: PairedDifference, class_name: str, unit: str, n_tests: int) -> str:
    """What the numbers of a comparison allow to say."""
    metric, difference = METRICS[one.metric], one.difference
    what = f"{metric.title} of {class_name}"
    count = f"{difference.n} {unit if difference.n != 1 else unit[:-1]}"
    # A set that misses a structure has no distance there: such cases are not in the comparison, which must be said.
    without = f", {difference.n_missing} more without a value in a set" if difference.n_missing else ""
    if difference.n == 0:
        return f"{what}: it exists for both in no {unit[:-1]}, so nothing can be concluded."
    if difference.low == difference.high == 0:
        return f"{what}: {one.first} and {one.second} are equal in all {count}{without}."
    number = f"{difference.mean:+.{metric.digits}f} {metric.unit}".rstrip()
    if difference.n < MIN_PATIENTS:
        return (
            f"{what}: too few {unit} ({difference.n}{without}) to conclude anything. {one.first} minus {one.second} is "
            f"{number} on average, but with fewer than {MIN_PATIENTS} the test cannot show a difference of any size."
        )
    interval = f"95 % interval {difference.low:+.{metric.digits}f} to {difference.high:+.{metric.digits}f}"
    tested = f"{_p_text(one.p_holm)} after correction over {n_tests} comparisons"
    numbers = f"{number}, {interval}, {count}{without}, {tested}"
    excludes_zero = difference.low > 0 or difference.high < 0
    if one.p_holm < ALPHA and excludes_zero:
        better = one.first if (difference.mean > 0) == (metric.better == "higher") else one.second
        return f"{what}: {better} is better ({one.first} minus {one.second}: {numbers})."
    if one.p_holm < ALPHA:
        return (
            f"{what}: {one.first} and {one.second} differ in most {unit}, but the mean may be the same for both "
            f"({numbers}): a few {unit} with large differences in the other direction weigh against the rest."
        )
    so_few = f" So few {unit} cannot show a difference of any size in {n_tests} comparisons."
    limit = so_few if hopeless(difference.n, n_tests) else ""
    if excludes_zero:
        return (
            f"{what}: no difference is shown. The interval leaves 0 out, but among {n_tests} comparisons it may be "
            f"chance ({one.first} minus {one.second}: {numbers}).{limit}"
        )
    return (
        f"{what}: no difference is shown, and equality is not shown either. Mean differences within the interval "
        f"remain possible ({one.first} minus {one.second}: {numbers}).{limit}"
    )


def _p_text(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
