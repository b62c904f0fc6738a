"""Sets of predictions compared in pairs: numbers by hand, and sentences that do not claim more than the numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats

from medseg_diffusion.metrics.case_metrics import ClassResult, measure
from medseg_diffusion.metrics.comparison import MIN_PATIENTS, Comparison, PairedDifference, compare
from medseg_diffusion.metrics.evaluation_summary import EvaluatedCase, Evaluation, summarise
from medseg_diffusion.metrics.statistics import holm, mean_interval


def evaluation(dice: Sequence[float], patients: Sequence[str] = (), **others: Sequence[float]) -> Evaluation:
    """One class with the given Dice in each case; all other metrics are equal in all cases, or as given."""
    full = measure(np.ones((2, 2), np.int32), np.ones((2, 2), np.int32), [1], (1, 1))[1]
    cases = [
        EvaluatedCase(
            f"case{i:02d}",
            "",
            "",
            {1: ClassResult(full.overlap, {**full.metrics, "dice": value, **{k: v[i] for k, v in others.items()}})},
        )
        for i, value in enumerate(dice)
    ]
    by_case = {case.name: patient for case, patient in zip(cases, patients, strict=True)} if patients else None
    return summarise(cases, {1: "liver"}, patients=by_case)


def difference(name: str, first: Evaluation, second: Evaluation) -> PairedDifference:
    (one,) = [one for one in compare({"A": first, "B": second}) if one.metric == name]
    return one


# ---- numbers -----------------------------------------------------------------------------------------------------


def test_holm_by_hand() -> None:
    # Ascending 0.01, 0.02, 0.03, 0.04: times 4, 3, 2, 1 gives 0.04, 0.06, 0.06, 0.04; the last rises to the one before.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == [] and holm([0.03]) == [0.03]


def test_a_test_that_was_not_made_is_not_counted_by_holm() -> None:
    corrected = holm([math.nan, 0.02, math.nan, 0.01])
    assert corrected[1] == corrected[3] == pytest.approx(0.02)
    assert math.isnan(corrected[0]) and math.isnan(corrected[2])


def test_differences_intervals_and_p_values_are_of_the_pairs() -> None:
    rng = np.random.default_rng(0)
    a = rng.uniform(0.6, 0.9, 12)
    b = a - rng.uniform(0.0, 0.1, 12)
    one = difference("dice", evaluation(a), evaluation(b))
    assert one.difference == mean_interval(a - b)
    assert one.p_value == pytest.approx(stats.wilcoxon(a - b).pvalue)
    reverse = difference("dice", evaluation(b), evaluation(a))
    assert reverse.p_value == one.p_value and reverse.difference.mean == -one.difference.mean


def test_the_correction_is_over_all_pairs_classes_and_metrics() -> None:
    rng = np.random.default_rng(1)
    sets = {name: evaluation(rng.uniform(0.5, 1, 10)) for name in "ABC"}
    differences = compare(sets)
    metrics = [metric.name for metric in sets["A"].metrics if metric.compared]
    assert [(one.first, one.second) for one in differences[:: len(metrics) - 1]] == [("A", "B"), ("A", "C"), ("B", "C")]
    assert [one.p_holm for one in differences] == pytest.approx(holm([one.p_value for one in differences]))
    assert Comparison(sets, {}, differences).n_tests == len(differences)


def test_lesions_are_compared_only_where_something_has_several() -> None:
    some = evaluation([0.5] * 3, reference_lesions=[1, 1, 1])
    several = evaluation([0.5] * 3, reference_lesions=[1, 2, 1])
    assert "lesion_f1" not in {one.metric for one in compare({"A": some, "B": some})}
    assert "lesion_f1" in {one.metric for one in compare({"A": several, "B": some})}


def test_the_cases_of_a_patient_count_once() -> None:
    a, b = [0.9, 0.7, 0.8, 0.6], [0.5, 0.5, 0.5, 0.5]
    one = difference("dice", evaluation(a, ["p", "p", "q", "q"]), evaluation(b, ["p", "p", "q", "q"]))
    assert one.difference.n == 2 and one.difference.mean == pytest.approx(0.25)
    assert one.p_value == stats.wilcoxon([0.3, 0.2]).pvalue


def test_incomplete_pairs_are_counted() -> None:
    a, b = [0.9, math.nan, 0.8], [0.5, 0.5, math.nan]
    one = difference("dice", evaluation(a), evaluation(b))
    assert (one.difference.n, one.difference.n_missing) == (1, 2)


# ---- sentences ---------------------------------------------------------------------------------------------------


def conclusion(a: Sequence[float], b: Sequence[float], name: str = "dice") -> str:
    if name == "dice":
        return difference(name, evaluation(a), evaluation(b)).conclusion
    dice = [0.5] * len(a)
    return difference(name, evaluation(dice, **{name: a}), evaluation(dice, **{name: b})).conclusion


def test_a_clear_difference_names_the_better_set() -> None:
    a, b = np.linspace(0.8, 0.9, 20), np.linspace(0.7, 0.8, 20) + np.tile([0, 0.01], 10)
    assert conclusion(a, b).startswith("Dice of liver: A is better (A minus B: +0.095, 95 % interval +0.0")
    assert conclusion(b, a).startswith("Dice of liver: B is better (A minus B: -0.095")
    assert "20 cases, p < 0.001 after correction over" in conclusion(a, b)
    assert "HD95 of liver: B is better (A minus B: +" in conclusion(10 * a, 10 * b, "hd95_mm"), "a distance is bad"


def test_too_few_cases_are_never_enough() -> None:
    for n in range(1, MIN_PATIENTS):
        text = conclusion([0.9] * n, np.linspace(0.1, 0.2, n))
        assert "too few cases" in text and "better" not in text
        assert n == 1 or stats.wilcoxon(0.9 - np.linspace(0.1, 0.2, n)).pvalue > 0.05, "the reason for the limit"
    assert stats.wilcoxon(0.9 - np.linspace(0.1, 0.2, MIN_PATIENTS)).pvalue < 0.05


def test_a_correction_that_so_few_cases_cannot_survive_is_said() -> None:
    """Every case of A is better by far, and four tests of seven cases leave nothing below 0.0625."""
    a = np.linspace(0.8, 0.9, 7)
    said = "So few cases cannot show a difference of any size in 4 comparisons."
    text = conclusion(a, a - np.linspace(0.5, 0.6, 7))
    assert text.endswith(said) and "p = 0.062 after" in text, text
    enough = conclusion(np.linspace(0.8, 0.9, 8), np.linspace(0.2, 0.35, 8))
    assert said not in enough and "A is better" in enough


def test_no_shown_difference_is_not_called_equality() -> None:
    a = np.linspace(0.7, 0.9, 20)
    text = conclusion(a, a + np.tile([0.03, -0.03], 10))
    assert "no difference is shown, and equality is not shown either" in text and "better" not in text


def test_a_difference_that_does_not_survive_the_correction_is_not_claimed() -> None:
    a = np.linspace(0.7, 0.9, 8)
    sets = {name: evaluation(values, hd95_mm=10 * values) for name, values in (("A", a), ("B", a - 0.01), ("C", a))}
    sets["B"] = evaluation(a - np.array([0.01, 0.012, 0.014, 0.016, 0.018, 0.02, 0.022, -0.001]))
    text = next(one.conclusion for one in compare(sets) if one.metric == "dice" and one.second == "B")
    assert "no difference is shown. The interval leaves 0 out, but among" in text


def test_equal_sets_and_missing_numbers() -> None:
    assert conclusion([0.5, 0.7], [0.5, 0.7]) == "Dice of liver: A and B are equal in all 2 cases."
    assert conclusion([0.5], [0.5]) == (
        "Dice of liver: too few cases (1) to conclude anything. A minus B is +0.000 on average, but with fewer than 6 "
        "the test cannot show a difference of any size."
    )
    with_gap = conclusion([0.9] * 7 + [math.nan], [*np.linspace(0.1, 0.2, 7), 0.5], "hd95_mm")
    assert "7 cases, 1 more without a value in a set, p = " in with_gap, "a missed structure is not hidden"
    assert conclusion([0.5, 0.7, math.nan], [0.5, 0.7, 0.9]) == (
        "Dice of liver: A and B are equal in all 2 cases, 1 more without a value in a set."
    )
    nothing = conclusion([math.nan] * 2, [0.5] * 2)
    assert nothing == "Dice of liver: it exists for both in no case, so nothing can be concluded."


def test_a_median_against_the_mean_is_not_called_better() -> None:
    """Most cases prefer A by a little, and a few prefer B by much: the test and the mean contradict each other."""
    gain = np.concatenate([np.linspace(0.01, 0.02, 40), [-0.4, -0.5]])
    a = np.full(42, 0.6)
    text = conclusion(a, a - gain)
    assert "differ in most cases, but the mean may be the same for both" in text and "better" not in text
