"""Statistics over cases: means with bootstrap intervals, a paired test, and a correction for several tests."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FEW = 10
"""Intervals over fewer cases or patients are rough."""

_RESAMPLES = 4999
# Resamples drawn at a time. It limits memory to about 500 x cases floats.
_BATCH = 500


@dataclass(frozen=True)
class Interval:
    """A mean over cases with its bootstrap interval, in the unit of the values.

    Attributes:
        mean: Mean of the values that are not NaN; NaN if there are none.
        low: Lower end of the interval; NaN with fewer than two values.
        high: Upper end of the interval; NaN with fewer than two values.
        n: Number of values that entered the mean: cases, or patients if they are known.
        n_missing: Number of NaN values, left out.
        median: Median of the same values; NaN if there are none.
    """

    mean: float
    low: float
    high: float
    n: int
    n_missing: int
    median: float = math.nan

    def __str__(self) -> str:
        """Three digits: "0.864 [0.855, 0.873]", or the mean alone where there is no interval."""
        return f"{self.mean:.3f}" if math.isnan(self.low) else f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class PairedTest:
    """Result of a two-sided Wilcoxon signed-rank test.

    Attributes:
        statistic: The smaller of the two rank sums; NaN without pairs.
        p_value: In [0, 1]; 1 when all pairs are equal, NaN without pairs.
        median_difference: Median of a - b over the complete pairs.
        n: Number of complete pairs.
        n_missing: Pairs left out because one of the two is NaN.
    """

    statistic: float
    p_value: float
    median_difference: float
    n: int
    n_missing: int


def mean_interval(
    values: Sequence[float] | NDArray[np.floating],
    *,
    patients: Sequence[str] | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Mean over cases with a bootstrap interval.

    The interval is bias-corrected and accelerated (BCa; Efron, "Better bootstrap confidence intervals", JASA 1987),
    which follows the skew of Dice values near 1. Where BCa is not defined, it is the percentile interval. The result
    depends on nothing but the values, their order and `seed`.

    Special cases: NaN values are left out and counted. Without any value all numbers are NaN. A single value gives its
    mean and an interval of NaN, because one case says nothing about spread. Equal values give an interval of zero
    width.

    Args:
        values: One finite number or NaN per case, shape `(n,)`.
        patients: The patient of each case. The cases of a patient are averaged first, and mean and interval are over
            patients: two patients with ten slices each are n = 2. None takes every case as a patient of its own.
        confidence: Coverage in (0, 1).
        seed: Seed of the resampling.

    Raises:
        ValueError: `values` is not one-dimensional or holds an infinity, `patients` has another length, or `confidence`
            is not in (0, 1).
    """
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence is {confidence}; it must lie strictly between 0 and 1")
    present, n_missing = _present(values if patients is None else by_patient(values, patients))
    if len(present) == 0:
        return Interval(math.nan, math.nan, math.nan, 0, n_missing)
    mean, median = float(present.mean()), float(np.median(present))
    if len(present) == 1:
        return Interval(mean, math.nan, math.nan, 1, n_missing, median)
    if np.ptp(present) <= 1e-12 * max(1.0, abs(mean)):
        return Interval(mean, mean, mean, len(present), n_missing, median)
    low, high = _bootstrap(present, confidence, seed, "BCa")
    if not (math.isfinite(low) and math.isfinite(high)):
        low, high = _bootstrap(present, confidence, seed, "percentile")
    return Interval(mean, low, high, len(present), n_missing, median)


def rough(intervals: Iterable[Interval], unit: str) -> list[str]:
    """What is to be said about intervals over few cases or patients (``unit``); empty if none are over few."""
    # Resampling cannot show what so few do not hold. A single value has no interval.
    smallest = min((one.n for one in intervals if one.n > 1), default=FEW)
    return [f"Intervals over as few as {smallest} {unit} are rough, and rather too narrow."] if smallest < FEW else []


def paired_wilcoxon(a: Sequence[float] | NDArray[np.floating], b: Sequence[float] | NDArray[np.floating]) -> PairedTest:
    """Two-sided Wilcoxon signed-rank test of whether paired values differ (Wilcoxon, Biometrics Bulletin 1945).

    Args:
        a: One value per case, shape `(n,)`, e.g. the Dice of one model.
        b: The values of the same cases in the same order, e.g. the Dice of another model.

    Raises:
        ValueError: The lengths differ.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"a has shape {first.shape} and b has shape {second.shape}; the test needs pairs")
    difference, n_missing = _present(first - second)
    if len(difference) == 0:
        return PairedTest(math.nan, math.nan, math.nan, 0, n_missing)
    if not difference.any():
        return PairedTest(0.0, 1.0, 0.0, len(difference), n_missing)
    # Imported where used: reports on segmented scans load this module for its types alone.
    from scipy import stats

    result = stats.wilcoxon(difference)
    return PairedTest(
        float(result.statistic), float(result.pvalue), float(np.median(difference)), len(difference), n_missing
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """P values corrected for their number, in their order (Holm, Scandinavian Journal of Statistics 1979).

    The chance that any of the true null hypotheses is rejected at a corrected p below 0.05 is at most 5 %, whatever the
    tests have to do with each other. NaN stands for a test that was not made: it stays NaN and does not count.
    """
    made = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    corrected, largest = [math.nan] * len(p_values), 0.0
    for rank, i in enumerate(made):
        largest = max(largest, min(1.0, (len(made) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def by_patient(values: Sequence[float] | NDArray[np.floating], patients: Sequence[str]) -> NDArray[np.float64]:
    """The mean of each patient's values that are not NaN; NaN for a patient without any."""
    array = np.asarray(values, dtype=np.float64)
    _, index = np.unique(np.asarray(patients), return_inverse=True)
    present = ~np.isnan(array)
    counts = np.bincount(index, present)
    sums = np.bincount(index, np.where(present, array, 0))
    return np.divide(sums, counts, out=np.full(len(counts), math.nan), where=counts > 0)


def _present(values: Sequence[float] | NDArray[np.floating]) -> tuple[NDArray[np.float64], int]:
    """The values that are not NaN, and how many are."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"values have shape {array.shape}; expected one number per case")
    missing = np.isnan(array)
    if np.isinf(array).any():
        raise ValueError("values hold an infinity; a mean over cases needs finite numbers or NaN")
    return array[~missing], int(missing.sum())


def _bootstrap(values: NDArray[np.float64], confidence: float, seed: int, method: str) -> tuple[float, float]:
    from scipy import stats

    with warnings.catch_warnings():
        # scipy warns where BCa is not defined and returns NaN, which the caller handles.
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        interval = stats.bootstrap(
            (values,),
            np.mean,
            n_resamples=_RESAMPLES,
            batch=_BATCH,
            confidence_level=confidence,
            method=method,
            rng=np.random.default_rng(seed),
        ).confidence_interval
    return float(interval.low), float(interval.high)
