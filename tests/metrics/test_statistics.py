from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from medseg_diffusion.metrics.statistics import Interval, mean_interval, paired_wilcoxon

NAN = math.nan


def test_missing_values_are_left_out_and_counted() -> None:
    with_gaps, without = mean_interval([0.5, NAN, 0.7, 0.9, NAN]), mean_interval([0.5, 0.7, 0.9])
    assert with_gaps.mean == pytest.approx(0.7)
    assert (with_gaps.n, with_gaps.n_missing) == (3, 2)
    assert (with_gaps.low, with_gaps.high) == (without.low, without.high)
    assert 0.5 <= with_gaps.low < 0.7 < with_gaps.high <= 0.9


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], Interval(NAN, NAN, NAN, 0, 0)),
        ([NAN, NAN], Interval(NAN, NAN, NAN, 0, 2)),
        ([0.8], Interval(0.8, NAN, NAN, 1, 0)),
        ([0.25, 0.25, 0.25], Interval(0.25, 0.25, 0.25, 3, 0)),
    ],
)
def test_too_little_to_resample(values: list[float], expected: Interval) -> None:
    interval = mean_interval(values)
    np.testing.assert_equal(
        (interval.mean, interval.low, interval.high, interval.n, interval.n_missing),
        (expected.mean, expected.low, expected.high, expected.n, expected.n_missing),
    )


@pytest.mark.parametrize("values", [[0.1, 0.9], [0.0] * 9 + [1.0], [0.9] * 50 + [0.9 + 1e-9]])
def test_awkward_values_still_give_an_interval(values: list[float]) -> None:
    interval = mean_interval(values)
    assert min(values) - 1e-12 <= interval.low <= interval.mean + 1e-12
    assert interval.mean - 1e-12 <= interval.high <= max(values) + 1e-12


def test_the_seed_decides() -> None:
    values = np.random.default_rng(0).beta(8, 2, 30)
    assert mean_interval(values, seed=3) == mean_interval(values, seed=3)
    assert mean_interval(values, seed=3) != mean_interval(values, seed=4)


def test_agrees_with_the_normal_interval_where_that_holds() -> None:
    values = np.random.default_rng(5).normal(0.7, 0.05, 400)
    half = 1.96 * values.std(ddof=1) / math.sqrt(400)
    interval = mean_interval(values)
    assert interval.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_covers_the_true_mean_of_skewed_scores() -> None:
    # Dice-like values: Beta(12, 2), mean 12 / 14. 90 % of 150 intervals must lie within 4 standard errors: 0.80 to 1.
    rng = np.random.default_rng(7)
    hits = 0
    for trial in range(150):
        interval = mean_interval(rng.beta(12, 2, 25), confidence=0.9, seed=trial)
        hits += interval.low <= 12 / 14 <= interval.high
    assert 0.80 <= hits / 150 <= 0.98  # an interval that is always wide would cover all


def test_refusals() -> None:
    with pytest.raises(ValueError, match="infinity"):
        mean_interval([0.5, math.inf])
    with pytest.raises(ValueError, match="one number per case"):
        mean_interval(np.zeros((2, 2)))
    with pytest.raises(ValueError, match="confidence is 95"):
        mean_interval([0.1, 0.2], confidence=95)
    with pytest.raises(ValueError, match="pairs"):
        paired_wilcoxon([1.0], [1.0, 2.0])


def test_wilcoxon_by_hand() -> None:
    # Differences 1, 2, 3, 4, 5, all positive: the smaller rank sum is 0, and 2 of the 2^5 sign patterns are as extreme.
    result = paired_wilcoxon([2.0, 4.0, 6.0, 8.0, 10.0], [1.0, 2.0, 3.0, 4.0, 5.0])
    assert (result.statistic, result.p_value, result.median_difference) == (0.0, 2 / 2**5, 3.0)


def test_wilcoxon_leaves_incomplete_pairs_out() -> None:
    a, b = [0.9, 0.8, NAN, 0.7, 0.6], [0.7, 0.85, 0.5, NAN, 0.2]
    result = paired_wilcoxon(a, b)
    assert (result.n, result.n_missing) == (3, 2)
    assert result.p_value == stats.wilcoxon([0.2, -0.05, 0.4]).pvalue


def test_wilcoxon_without_differences_or_pairs() -> None:
    assert paired_wilcoxon([0.5, 0.6], [0.5, 0.6]).p_value == 1.0
    nothing = paired_wilcoxon([NAN], [0.5])
    assert math.isnan(nothing.p_value) and nothing.n == 0


def test_text_of_an_interval() -> None:
    assert str(mean_interval([0.5, 0.5])) == "0.500 [0.500, 0.500]"
    assert str(mean_interval([0.25])) == "0.250"


def test_the_cases_of_a_patient_count_once() -> None:
    values, patients = [0.25, 0.75, math.nan, 0.9, math.nan], ["a", "a", "a", "b", "c"]
    by_patient = mean_interval(values, patients=patients)
    assert by_patient == mean_interval([0.5, 0.9, math.nan])
    assert (by_patient.n, by_patient.n_missing) == (2, 1)
    # Eight equal slices of each patient say no more than one.
    assert mean_interval([0.25] * 8 + [0.75] * 8, patients=["a"] * 8 + ["b"] * 8) == mean_interval([0.25, 0.75])
    assert mean_interval(values, patients=list("abcde")) == mean_interval(values)
    with pytest.raises(ValueError):
        mean_interval(values, patients=["a"])
