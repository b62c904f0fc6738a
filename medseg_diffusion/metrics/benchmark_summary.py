"""The numbers of a benchmark: one row per model and setting, and what the same patients say about two rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from statistics import fmean
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .ambiguity import ReaderSummary
from .comparison import ALPHA, hopeless
from .statistics import Interval, by_patient, holm, mean_interval, paired_wilcoxon


@dataclass(frozen=True)
class Setting:
    """How a model samples; ``factor`` is the one that varies in this row.

    ``x_t`` is what the network sees: its own noised mask, or a replacement (`medseg_diffusion.methods.ablation`).
    """

    factor: Literal["steps", "ensemble", "sampler", "setting", "without x_t", "feed-forward"]
    sampler: str
    steps: int
    ensemble: int
    x_t: Literal["own", "fresh", "shared", "zeros"] = "own"

    def __str__(self) -> str:
        """Such as "dpm++, 20 steps, 5 samples"; the factor is left out."""
        samples = f"{self.ensemble} sample{'s' * (self.ensemble > 1)}"
        if self.factor == "feed-forward":
            return f"feed-forward, {samples.replace('sample', 'member')}" if self.ensemble > 1 else "feed-forward"
        return f"{self.sampler}, {self.steps} step{'s' * (self.steps > 1)}, {samples}" if self.sampler else samples


@dataclass(frozen=True)
class BenchmarkRow:
    """The numbers of one model at one setting.

    Attributes:
        model: The name as given.
        setting: See `Setting`; ``steps`` is the number of distinct steps that were taken.
        dice: Class name -> mean Dice over patients, as the following two.
        iou: Class name -> mean IoU.
        hd95_mm: Class name -> mean 95th percentile Hausdorff distance.
        ece: Expected calibration error of the probabilities that `medseg segment` writes, over the voxels around the
            references of all cases.
        ece_uncalibrated: ``ece`` without the model's temperature, which was fitted to its own sampler and steps.
        ece_everywhere: ``ece`` over all voxels, most of which are certain background.
        evaluations: Network evaluations per case and window.
        seconds: Time per case from the loaded scan to the mask on its grid; median over cases.
        cases: Number of cases.
        patients: Number of patients.
        pairwise_dice: Mean Dice of pairs of members, over cases; 1 for members that are equal or all empty.
        readers: The members compared with several readers; None for data of one reader.
        by_case: The numbers behind the means, and volumes: one entry per case and class. The energy distance is of all
            classes together.
        calibrated_on: Number of these cases that the model's calibration was fitted to.
    """

    model: str
    setting: Setting
    dice: dict[str, Interval]
    iou: dict[str, Interval]
    hd95_mm: dict[str, Interval]
    ece: float
    ece_uncalibrated: float
    ece_everywhere: float
    evaluations: int
    seconds: float
    cases: int
    patients: int
    pairwise_dice: float
    readers: ReaderSummary | None
    by_case: list[dict[str, Any]] = field(repr=False)
    calibrated_on: int = 0

    @property
    def mean_dice(self) -> float:
        """Mean over the classes of the mean Dice of each."""
        return mean_of(self.dice)

    def cells(self) -> dict[str, Any]:
        """The row in the form of a printable table."""
        return {
            **self.key(),
            "evaluations": self.evaluations,
            **{f"Dice {name}": str(interval) for name, interval in self.dice.items()},
            "IoU": round(mean_of(self.iou), 4),
            "HD95 mm": round(mean_of(self.hd95_mm), 2),
            "HD95 missing": sum(interval.n_missing for interval in self.hd95_mm.values()),
            "ECE": round(self.ece, 4),
            "ECE uncalibrated": round(self.ece_uncalibrated, 4),
            "ECE everywhere": round(self.ece_everywhere, 4),
            **({} if self.setting.ensemble < 2 else {"members' Dice": round(self.pairwise_dice, 4)}),
            **({} if self.readers is None else _reader_cells(self.readers)),
            "s per case": round(self.seconds, 3),
            "cases": self.cases,
            "patients": self.patients,
        }

    def key(self) -> dict[str, Any]:
        """The columns that identify this row."""
        return {"model": self.model, **asdict(self.setting)}


def mean_of(intervals: Mapping[str, Interval]) -> float:
    """Mean over the classes that have a mean; NaN without any, for instance of distances between empty masks."""
    means = [interval.mean for interval in intervals.values() if not math.isnan(interval.mean)]
    return fmean(means) if means else math.nan


def _reader_cells(readers: ReaderSummary) -> dict[str, Any]:
    return {
        "GED^2": str(readers.energy_distance),
        "matched IoU": str(readers.matched_iou),
        "Dice of majorities": str(readers.majority_dice),
        "frequency ECE": round(readers.frequency_ece, 4),
        "empty samples": round(readers.empty_samples.mean, 3),
        "empty readers": round(readers.empty_readers.mean, 3),
    }


# ---- which row is the best, and what the patients say about it -------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """The settings of a benchmark, each once, and the differences of all from the best one.

    Attributes:
        score: What rows are compared by: "dice", the mean over the classes, or "energy_distance", with several readers.
        rows: Each setting of a model once; none of those that say what x_t is worth.
        best: The best of them; None if they were measured on different cases or classes, which says more about these
            than about the settings.
        scores: The score of each row with its interval.
        differences: The score of each row minus that of the best one: mean over patients with its interval, over the
            cases in which both have a score. NaN for the best one itself, without a best one, and for a row that cannot
            be compared: the energy distance depends on the number of samples.
        p_values: Of the signed-rank test of each difference, corrected by Holm's method over ``n_tests``; NaN as above.
        n_tests: All pairs of settings that were tested. The pairs with the best one are not enough: the same patients
            say which is the best, and of many settings that are alike one looks better than the others.
    """

    score: Literal["dice", "energy_distance"]
    rows: tuple[BenchmarkRow, ...]
    best: BenchmarkRow | None
    scores: tuple[Interval, ...]
    differences: tuple[Interval, ...]
    p_values: tuple[float, ...]
    n_tests: int

    @property
    def behind(self) -> list[BenchmarkRow]:
        """The rows that are worse than the best one, by the test and by the interval of their difference."""
        return [row for row, gap, p in self._compared if self._is_worse(gap, p)]

    @property
    def undecided(self) -> list[BenchmarkRow]:
        """The rows that these patients do not show to be worse than the best one."""
        return [row for row, gap, p in self._compared if not self._is_worse(gap, p)]

    @property
    def hopeless(self) -> bool:
        """Whether so few patients cannot show a difference of any size between so many settings."""
        return hopeless(max((gap.n for gap in self.differences), default=0), self.n_tests)

    @property
    def _compared(self) -> list[tuple[BenchmarkRow, Interval, float]]:
        """The rows that have a difference from the best one, that difference, and its p value."""
        every = zip(self.rows, self.differences, self.p_values, strict=True)
        return [(row, gap, p) for row, gap, p in every if not math.isnan(gap.low)]

    def _is_worse(self, gap: Interval, p: float) -> bool:
        worse = gap.low > 0 if self.score == "energy_distance" else gap.high < 0
        return worse and p < ALPHA and not hopeless(gap.n, self.n_tests)


def compare(rows: Sequence[BenchmarkRow]) -> Comparison | None:
    """Compare the settings; None if no row has a score.

    Rows of several readers are compared by their energy distance, of which less is better, others by their Dice.
    """
    own: dict[tuple[str, Setting], BenchmarkRow] = {}
    for row in rows:
        if row.setting.factor != "without x_t":  # which repeats a setting, and replaces its x_t
            own.setdefault((row.model, replace(row.setting, factor="setting")), row)
    distinct = tuple(own.values())
    several = bool(distinct) and all(row.readers is not None for row in distinct)
    score: Literal["dice", "energy_distance"] = "energy_distance" if several else "dice"
    samples = max((row.setting.ensemble for row in distinct), default=0)
    scores = tuple(_mean_score(row, score) for row in distinct)
    comparable = {
        id(row): mean
        for row, mean in zip(distinct, scores, strict=True)
        # One mask that never changes is as good as many equal ones.
        if not math.isnan(mean.mean)
        and (not several or row.setting.ensemble == samples or row.setting.factor == "feed-forward")
    }
    if not comparable:
        return None
    sign = 1 if several else -1
    known = [row for row in distinct if id(row) in comparable]
    measured = {frozenset((entry["case"], entry["class"]) for entry in row.by_case) for row in known}
    if len(measured) > 1:
        none = tuple(mean_interval([]) for _ in distinct)
        return Comparison(score, distinct, None, scores, none, (math.nan,) * len(distinct), 0)
    best = min(known, key=lambda row: (sign * comparable[id(row)].mean, row.evaluations))
    values = {id(row): _by_case(row, score) for row in known}
    gaps = {id(row): _gaps(values[id(row)], values[id(best)]) for row in known if row is not best}
    differences = tuple(mean_interval(gaps.get(id(row), [])) for row in distinct)
    p_values, n_tests = _tests(values, id(best))
    p_of_rows = tuple(p_values.get(id(row), math.nan) for row in distinct)
    return Comparison(score, distinct, best, scores, differences, p_of_rows, n_tests)


_Scores = Mapping[str, tuple[str, float]]
"""Case -> patient and score."""


def _by_case(row: BenchmarkRow, score: str) -> _Scores:
    """Case -> patient and score; a case in which every class is rightly empty has none."""
    values: dict[str, tuple[str, list[float]]] = {}
    for entry in row.by_case:
        values.setdefault(entry["case"], (entry["patient"], []))[1].append(entry.get(score, math.nan))
    present = {case: (who, [value for value in all_ if not math.isnan(value)]) for case, (who, all_) in values.items()}
    return {case: (who, fmean(numbers)) for case, (who, numbers) in present.items() if numbers}


def _mean_score(row: BenchmarkRow, score: str) -> Interval:
    values = _by_case(row, score).values()
    return mean_interval([value for _, value in values], patients=[patient for patient, _ in values])


def _gaps(own: _Scores, others: _Scores) -> NDArray[np.float64]:
    """Differences in the cases in which both have a score, one for each patient."""
    common = [case for case in own if case in others]
    return by_patient([own[case][1] - others[case][1] for case in common], [own[case][0] for case in common])


def _tests(values: Mapping[int, _Scores], best: int) -> tuple[dict[int, float], int]:
    """Key of a row -> corrected p value of its difference from the best one; and how many pairs were tested."""
    pairs = list(combinations(values, 2))
    gaps = [_gaps(values[first], values[second]) for first, second in pairs]
    corrected = holm([paired_wilcoxon(gap, np.zeros_like(gap)).p_value for gap in gaps])
    of_best = {key: p for pair, p in zip(pairs, corrected, strict=True) if best in pair for key in pair if key != best}
    return of_best, sum(not math.isnan(p) for p in corrected)
