"""The page of a benchmark says what the numbers say, and no more."""

from __future__ import annotations

import pytest

from medseg_diffusion.metrics.benchmark_summary import compare
from medseg_diffusion.reports.benchmark_page import BenchmarkInfo, benchmark_markdown, benchmark_page, sentences
from tests.helpers.benchmarks import row

INFO = BenchmarkInfo("data", "test", 2, 0, "medseg benchmark-segmenter <b>")
BETTER = [0.6, 0.7, 0.8, 0.9, 0.65, 0.75, 0.85, 0.75]


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ([[0.5, 0.6, 0.7, 0.85, 0.55, 0.65, 0.75, 0.7]], "1 other setting is worse on the same patients (signed-rank"),
        (
            [[0.7, 0.6, 0.8, 0.8] * 2],
            "1 other setting is not shown to be worse by these patients: ddim, 1 step, 1 sample,",
        ),
        ([[0.7, 0.6, 0.8, 0.8] * 2] * 2, "2 other settings are not shown to be worse by these patients; the cheapest"),
    ],
)
def test_the_best_setting_and_what_the_patients_leave_open(others: list[list[float]], expected: str) -> None:
    rows = [row(steps=steps, dice=dice) for steps, dice in enumerate(others, 1)] + [row(steps=9, dice=BETTER)]
    said = sentences(rows, compare(rows))
    assert said[0].startswith("The best mean Dice is 0.750 (95 % interval 0.")
    assert said[0].endswith("ddim, 9 steps, 1 sample, 9 network evaluations and 0.9 s a case.")
    assert len(said) == 2 and said[1].startswith(expected)


def test_models_of_other_cases_are_not_ranked() -> None:
    """The model of the easier cases is not the better one, and all cases are counted."""
    rows = [row(model="runs/a", dice=BETTER), row(model="runs/b", dice=[0.5] * 8, first_case=2)]
    page = benchmark_page(rows, INFO)
    assert "2 models on 10 cases of 10 patients" in page and "so none is called the best" in page
    assert "The best" not in page and "Difference from the best</th>" not in page
    assert "so none is called the best" in benchmark_markdown(rows, INFO)


def test_the_page_sets_rows_without_x_t_apart_and_warns() -> None:
    rows = [row(steps=1, dice=BETTER), row(steps=5, dice=[*BETTER[:7], 0.95])]
    replaced = [row(factor="without x_t", steps=5, ensemble=3, x_t=x_t, dice=BETTER) for x_t in ("own", "zeros")]
    page = benchmark_page([*rows, *replaced], INFO)
    settings, noise = page.split("<h2>What the noise is worth</h2>")
    assert "nothing: all classes alike" in noise and "all classes alike" not in settings
    assert page.count("<svg") == 2 and "choose on the validation side" in page and "8 patients are rough" in page
    assert "have been measured" not in page
    assert "Only 2 of 7 rows have been measured" in benchmark_page(rows, BenchmarkInfo("data", "validation", 7))


def test_samples_are_compared_with_readers_where_there_are_several() -> None:
    rows = [row(steps=steps, ensemble=4, energy=[0.2 / steps, 0.3 / steps]) for steps in (1, 2)]
    page = benchmark_page(rows, INFO)
    assert "<h2>Several readers</h2>" in page and "less is better" in page and "The best GED² is 0.125" in page
    assert "<h2>Several readers</h2>" not in benchmark_page([row()], INFO)


def test_hostile_names_are_inert() -> None:
    name = "<img src=x onerror=alert(1)>|$x$ @somebody"
    rows = [row(model=f"runs/{name}", dice=BETTER), row(model="runs/_b", dice=[0.5, 0.6, 0.7, 0.8])]
    page, text = benchmark_page(rows, INFO), benchmark_markdown(rows, INFO)
    assert "<img" not in page and "&lt;img src=x" in page and "<b>" not in page
    assert "_b, ddim" in page, "a name that begins with an underscore is in the legend"
    assert "<img" not in text and r"\|&#36;x&#36; @" + "\u2060somebody" in text


def test_too_few_patients_for_so_many_settings_are_said() -> None:
    """Nothing is worse than the best then, and the reader learns that no difference would have been enough."""
    rows = [row(steps=steps, dice=[0.1 * steps, 0.1 * steps + 0.1]) for steps in (1, 2, 3)]
    said = sentences(rows, compare(rows))
    assert said[1].startswith("2 other settings are not shown to be worse by these patients")
    assert said[2].startswith("So few patients cannot show a difference of any size in 3 comparisons of settings")


def test_one_row_needs_no_comparison() -> None:
    page = benchmark_page([row()], INFO)
    assert "So few patients" not in page
    assert "<svg" not in page and "other setting" not in page and "Benchmark of model" in page


def test_a_single_patient_has_no_intervals_and_few_have_rough_ones() -> None:
    one, two = benchmark_page([row(dice=[0.5])], INFO), benchmark_page([row(dice=[0.5, 0.6])], INFO)
    assert "A single patient gives no intervals" in one and "are rough" not in one
    assert "Intervals over 2 patients are rough." in two and "A single patient" not in two
