"""Pages of evaluations and comparisons: self-contained, escaped, worst cases first, and with the numbers."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from markupsafe import Markup

from medseg_diffusion.metrics.case_metrics import measure
from medseg_diffusion.metrics.comparison import Comparison, compare
from medseg_diffusion.metrics.evaluation_summary import EvaluatedCase, Evaluation, summarise
from medseg_diffusion.reports.comparison_page import comparison_page
from medseg_diffusion.reports.evaluation_page import (
    MAX_AGREEMENT_PLOTS,
    MAX_CLASSES_IN_OVERVIEW,
    case_flags,
    evaluation_page,
)
from medseg_diffusion.reports.viewer import Viewer
from tests.helpers.masks import evaluation
from tests.helpers.pages import Page, require_self_contained

EVIL = "<script>alert('x')</script>\"><img src=https://example.org/x.png>$\\frac"


def many(count: int, missed: int = 0) -> Evaluation:
    """Cases of one class, each worse than the one before; in the last ``missed`` cases nothing is predicted."""
    cases = []
    for number in range(count):
        reference = np.zeros((20, 20, 4), np.uint8)
        reference[2:12, 2:12, 1:3] = 1
        prediction = np.roll(reference, number // 3, axis=0)
        if number >= count - missed:
            prediction = np.zeros_like(prediction)
        cases.append(EvaluatedCase(f"case_{number}", "p", "r", measure(prediction, reference, [1], (1.0, 1.0, 2.0))))
    return summarise(cases, {1: "box"})


def test_means_say_how_many_values_they_lack() -> None:
    """A mean HD95 leaves the cases out in which nothing is predicted: without them it looks better than it is."""
    page = Page(evaluation_page(many(5, missed=2)))
    assert "Mean HD95 mm (2 without)" in page.seen and "Mean Dice" in page.seen
    sets = {"one": many(5, missed=2), "other": many(5)}
    compared = Page(comparison_page(Comparison(sets, {}, compare(sets))))
    assert "2 of 5 without" in " ".join(compared.seen.split())


@pytest.mark.parametrize("name", ["case", EVIL])
def test_pages_are_self_contained_and_escaped(name: str) -> None:
    one = evaluation(name)
    text = evaluation_page(one, links={name: "a.nii.gz"}, command=name, date=name)
    sets = {name: one, "other": one}
    compared = comparison_page(
        Comparison(sets, dict.fromkeys(sets, name), compare(sets), {name: name}, (name,)), command=name
    )
    for page_text in (text, compared):
        page = require_self_contained(page_text)
        assert page.tags.count("script") == 1  # sorting and filtering
        assert "img" not in page.tags
        assert name in page.seen
        if name == "case":
            assert re.findall(r"https?://[^\"'\s]*", page_text) == re.findall(
                r"http://www\.w3\.org/\S*?(?=\")", page_text
            )
        else:
            assert "<script>alert" not in page_text


def test_evaluation_page_holds_the_numbers() -> None:
    text = evaluation_page(evaluation("case_a"), command="medseg evaluate a b", date="2020-02-02")
    page = Page(text)
    rows = re.findall(r'<tr[^>]*>\s*<td data-value="(case_\w)"', text[: text.index("</tbody>")])
    assert rows == ["case_a", "case_b"]  # Dice 0.833 before 1
    for expected in ("0.833", "about case_a", "medseg evaluate a b", "2020-02-02", "Only reference empty"):
        assert expected in page.seen
    assert "nan" not in page.seen


def test_the_worst_case_stands_first_and_a_missed_class_is_flagged() -> None:
    result = many(9, missed=1)
    text = evaluation_page(result)
    body = text[text.index("<tbody>") :]
    assert re.findall(r'data-value="(case_\d)"', body)[0] == "case_8"
    assert "only the 1 flagged" in text
    assert "box not predicted" in Page(text).seen
    flags = {case.name: case_flags(case, result) for case in result.cases}
    assert flags.pop("case_8") == ["box not predicted"]
    assert not any(flags.values())


def test_a_dice_far_below_the_others_is_flagged_only_among_enough_cases() -> None:
    result = many(9)
    outlier = replace(result.cases[0], results=many(9, missed=0).cases[0].results)
    far = np.zeros((20, 20, 4), np.uint8)
    far[2:12, 2:12, 1:3] = 1
    outlier = EvaluatedCase("far", "p", "r", measure(np.roll(far, 8, axis=0), far, [1], (1.0, 1.0, 2.0)))
    same = [replace(result.cases[0], name=f"same_{i}") for i in range(8)]
    with_outlier = summarise([*same, outlier], {1: "box"})
    assert case_flags(outlier, with_outlier) == ["low Dice"]
    few = summarise([*same[:2], outlier], {1: "box"})
    assert case_flags(outlier, few) == []


def test_one_case_has_no_plots_of_distributions() -> None:
    text = evaluation_page(many(1))
    assert "Every case" not in text and "Bland" not in text
    assert "Every case" in evaluation_page(many(3))


def test_a_case_without_any_class_among_many_classes_has_no_worst_one() -> None:
    empty = np.zeros((6, 6), np.uint8)
    full = np.arange(36, dtype=np.uint8).reshape(6, 6) % 10
    labels = {value: f"class {value}" for value in range(1, 10)}
    cases = [
        EvaluatedCase(name, "p", "r", measure(mask, mask, list(labels), (1.0, 1.0)))
        for name, mask in (("full", full), ("empty", empty))
    ]
    assert len(labels) > MAX_CLASSES_IN_OVERVIEW
    text = evaluation_page(summarise(cases, labels))
    rows = re.findall(r'<tr>\s*<td data-value="(full|empty)">.*?</tr>', text[: text.index("</tbody>")], re.DOTALL)
    assert rows == ["full", "empty"]


def test_few_cases_and_plots_left_out_are_said() -> None:
    assert evaluation_page(many(9)).count("Intervals over as few as 9 cases are rough") == 1
    assert "are rough" not in evaluation_page(many(10)) and "are rough" not in evaluation_page(many(1))
    assert "Shown are" not in evaluation_page(many(3))
    everywhere = np.arange(1, 41, dtype=np.uint8).reshape(8, 5)
    labels = {value: f"class {value}" for value in range(1, MAX_AGREEMENT_PLOTS + 2)}
    cases = [
        EvaluatedCase(str(i), "p", "r", measure(everywhere, everywhere, list(labels), (1.0, 1.0))) for i in range(3)
    ]
    assert f"Shown are {MAX_AGREEMENT_PLOTS} of {len(labels)} classes" in evaluation_page(summarise(cases, labels))


def test_a_case_that_opens_in_the_viewer_is_marked_and_its_file_is_linked_all_the_same() -> None:
    shown = Viewer(html=Markup("<p>viewer</p>"), script=Markup(""), names=("case_a",))
    text = evaluation_page(evaluation("case_a"), shown, links={"case_a": "a.nii.gz", "case_b": "b.nii.gz"})
    assert '<button type="button" class="show-case">case_a</button> <a class="small" href="a.nii.gz">file</a>' in text
    assert '<a href="b.nii.gz">case_b</a>' in text and "before its name opens in the viewer" in Page(text).seen


def test_pairs_of_sets_without_a_plot_are_said() -> None:
    sets = {name: many(2) for name in "abcde"}
    page = comparison_page(Comparison(sets, {}, compare(sets)))
    assert "The first 6 of 10 pairs of sets." in page and page.count("<svg") == 6
    two = {name: many(2) for name in "ab"}
    assert "pairs of sets." not in comparison_page(Comparison(two, {}, compare(two)))


def test_cases_without_a_class_do_not_narrow_the_limits_of_agreement(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[list[float], list[float]]] = []

    def plot(name: str, reference: list[float], prediction: list[float], colour: str) -> Markup:
        shown.append((reference, prediction))
        return Markup("")

    monkeypatch.setattr("medseg_diffusion.reports.evaluation_page.volume_agreement", plot)
    nothing = np.zeros((20, 20, 4), np.uint8)
    absent = [EvaluatedCase(f"no_{i}", "p", "r", measure(nothing, nothing, [1], (1.0, 1.0, 2.0))) for i in range(5)]
    evaluation_page(summarise([*many(4, missed=1).cases, *absent], {1: "box"}))
    assert shown == [([0.4] * 4, [0.4, 0.4, 0.4, 0.0])]  # 10 x 10 x 2 voxels of 2 mm3


def test_comparison_page_says_what_can_be_concluded() -> None:
    sets = {"good": many(9), "bad": many(9, missed=9)}
    differences = compare(sets)
    text = comparison_page(Comparison(sets, {"good": "g", "bad": "b"}, differences))
    seen = " ".join(Page(text).seen.split())
    dice = next(one for one in differences if one.metric == "dice")
    assert " ".join(dice.conclusion.split()) in seen
    assert "good is better" in seen
