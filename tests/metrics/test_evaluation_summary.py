"""Results of cases averaged per class."""

from __future__ import annotations

import numpy as np
import pytest

from medseg_diffusion.metrics.case_metrics import measure
from medseg_diffusion.metrics.evaluation_summary import EvaluatedCase, summarise
from tests.helpers.masks import evaluation


def test_table_has_numbers_or_none() -> None:
    one, _, three = evaluation().table()
    assert one["class"] == "one" and one["dice"] == pytest.approx(5 / 6) and one["n"] == 2
    assert three["dice"] is three["iou_low"] is None and three["n_missing"] == 2


def test_worst_first_puts_cases_without_classes_last() -> None:
    nothing = measure(np.array([[0]]), np.array([[0]]), [1], (1.0, 1.0))
    half = measure(np.array([[1, 1]]), np.array([[0, 1]]), [1], (1.0, 1.0))
    full = measure(np.array([[1, 1]]), np.array([[1, 1]]), [1], (1.0, 1.0))
    cases = [EvaluatedCase(name, "", "", item) for name, item in (("a", nothing), ("b", full), ("c", half))]
    assert [case.name for case in summarise(cases, {1: "x"}).worst_first()] == ["c", "b", "a"]


def test_class_means_leave_out_what_does_not_exist() -> None:
    result = evaluation()
    means = result.class_means()
    assert means[1]["dice"] == pytest.approx((2 / 3 + 1) / 2) and means[1]["n_pred"] == 1.5
    assert np.isnan(means[3]["dice"]) and means[3]["tn"] == 4
    assert result.foreground_means()["dice"] == pytest.approx((5 / 6 + 1) / 2)
    assert result.n_with_probabilities == 0


def _cases(with_organ: int) -> list[EvaluatedCase]:
    """Twelve cases with a lesion; the first have an organ, too."""
    masks = [np.array([[1, 1, 2 if number < with_organ else 0, 0]]) for number in range(12)]
    return [EvaluatedCase(f"case_{i}", "", "", measure(mask, mask, [1, 2], (1.0, 1.0))) for i, mask in enumerate(masks)]


def test_intervals_over_few_cases_are_a_warning_of_the_numbers() -> None:
    """Not of the page alone; also of a class or a stratum that few of many cases have."""
    labels = {1: "lesion", 2: "organ"}
    few = "Intervals over as few as {} are rough, and rather too narrow.".format
    assert summarise(_cases(12), labels, warnings=["first"]).warnings == ("first",)
    assert summarise(_cases(2), labels, warnings=["first"]).warnings == ("first", few("2 cases"))
    sites = {f"case_{i}": "north" if i < 9 else "south" for i in range(12)}
    assert summarise(_cases(12), labels, strata=("sites.csv", "site", sites)).warnings == (few("3 cases"),)
    patients = {f"case_{i}": f"patient {i // 2}" for i in range(12)}
    assert summarise(_cases(12), labels, patients=patients).warnings == (few("6 patients"),)
