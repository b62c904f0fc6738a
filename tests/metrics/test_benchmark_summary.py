"""Settings of a benchmark against each other: which is the best, and what the same patients leave open."""

from __future__ import annotations

import math

import numpy as np
import pytest

from medseg_diffusion.metrics.benchmark_summary import BenchmarkRow, compare
from tests.helpers.benchmarks import row


def test_differences_are_of_the_same_patients() -> None:
    """Patients differ more than settings do: the intervals overlap, but each patient is better in one of them."""
    low, high = [0.2, 0.4, 0.6, 0.8, 0.3, 0.7], [0.25, 0.45, 0.66, 0.84, 0.36, 0.74]
    first, second = row(steps=1, dice=low), row(steps=5, dice=high)
    found = compare([first, second])
    assert found is not None and found.best is second and found.score == "dice"
    (gap, own) = found.differences
    assert gap.mean == pytest.approx(-0.05) and gap.high < 0 and gap.n == 6 and math.isnan(own.mean)
    assert found.scores[0].high > found.scores[1].low, "the intervals of the means do not tell them apart"
    assert found.behind == [first] and found.undecided == []


def test_settings_that_patients_do_not_tell_apart() -> None:
    first, second = row(steps=1, dice=[0.5, 0.9, 0.7, 0.6]), row(steps=5, dice=[0.6, 0.8, 0.75, 0.6])
    found = compare([first, second])
    assert found is not None and found.best is second and found.undecided == [first] and found.behind == []


def test_few_patients_never_show_a_setting_to_be_worse() -> None:
    """Each of them is worse, and the interval says so, but five patients may agree by chance."""
    for patients in range(2, 7):
        rows = [row(steps=1, dice=[0.5] * patients), row(steps=5, dice=[0.6 + 0.01 * i for i in range(patients)])]
        found = compare(rows)
        assert found is not None and found.differences[0].high < 0
        assert found.behind == rows[: patients == 6] and found.hopeless == (patients < 6)


def test_alike_settings_are_rarely_called_worse() -> None:
    """The best of many was chosen by the same patients: differences from it are no single comparisons."""
    rng, claims, leaves_out_0 = np.random.default_rng(0), 0, 0
    for _ in range(6):
        patients = rng.uniform(0.5, 0.9, 12)
        rows = [row(steps=i + 1, dice=list(patients + rng.normal(0, 0.05, 12))) for i in range(6)]
        found = compare(rows)
        assert found is not None and found.n_tests == 15 and not found.hopeless
        claims += len(found.behind)
        leaves_out_0 += sum(gap.high < 0 for gap in found.differences)
    assert claims == 0 and leaves_out_0 > 5


def test_equal_scores_prefer_fewer_evaluations() -> None:
    slow, fast = row(steps=50, dice=[0.5, 0.7]), row(steps=2, dice=[0.5, 0.7])
    found = compare([slow, fast])
    assert found is not None and found.best is fast


def test_a_setting_of_two_factors_counts_once_and_rows_without_x_t_never() -> None:
    rows = [row(factor=factor, steps=2, dice=[0.5, 0.6]) for factor in ("steps", "sampler")]
    rows.append(row(factor="without x_t", steps=2, x_t="zeros", dice=[0.9, 0.9]))
    found = compare(rows)
    assert found is not None and found.rows == (rows[0],)


def test_cases_without_a_score_are_left_out_in_pairs() -> None:
    """A class that is absent and rightly not predicted has no Dice: the pair of that case says nothing."""
    first, second = row(steps=1, dice=[0.5, math.nan, 0.6]), row(steps=5, dice=[0.6, 0.0, 0.7])
    found = compare([first, second])
    assert found is not None and found.best is first
    assert found.differences[1].n == 2 and found.differences[1].mean == pytest.approx(0.1)


def test_rows_of_other_cases_have_no_best() -> None:
    """The second is better on the cases of both, but the first has easier cases: its mean is higher."""
    easy, hard = [0.95, 0.95, 0.7, 0.8], [0.75, 0.85, 0.2, 0.3]
    for first_case in (2, 7):  # some cases in common, and none
        rows = [row(model="runs/a", dice=easy), row(model="runs/b", dice=hard, first_case=first_case)]
        found = compare(rows)
        assert found is not None and found.best is None and not found.undecided and not found.behind
        assert all(math.isnan(gap.mean) for gap in found.differences)
        assert [score.n for score in found.scores] == [4, 4]


def test_rows_of_other_classes_have_no_best() -> None:
    lesion, organ = row(model="runs/a"), row(model="runs/b", dice=[0.8, 0.9])
    for entry in organ.by_case:
        entry["class"] = "organ"
    found = compare([lesion, organ])
    assert found is not None and found.best is None and not found.behind


def test_a_row_that_is_better_where_both_have_a_score_is_not_worse() -> None:
    """The best is so by its other cases: in one of them a class is rightly empty, and has no score."""
    first = row(steps=1, dice=[*[0.5] * 8, math.nan])
    found = compare([first, row(steps=5, dice=[*[0.51] * 8, 0.0])])
    assert found is not None and found.best is first
    assert found.differences[1].low > 0 and found.behind == []


def test_the_energy_distance_of_fewer_samples_is_not_compared() -> None:
    """It falls with the number of samples. A mask that never changes is as good as many equal ones."""

    def several(factor: str, ensemble: int, energy: list[float]) -> BenchmarkRow:
        return row(factor=factor, ensemble=ensemble, energy=energy)

    one, few = several("ensemble", 1, [0.2] * 6), several("ensemble", 2, [0.1] * 6)
    many = several("ensemble", 8, [0.40, 0.50, 0.42, 0.44, 0.46, 0.48])
    fixed = several("feed-forward", 1, [0.60, 0.71, 0.63, 0.66, 0.69, 0.72])
    found = compare([one, few, many, fixed])
    assert found is not None and found.score == "energy_distance" and found.best is many
    assert [math.isnan(gap.mean) for gap in found.differences] == [True, True, True, False]
    assert found.behind == [fixed]


def test_nothing_is_compared_without_a_score() -> None:
    assert compare([row(dice=[math.nan, math.nan])]) is None
    assert compare([]) is None
