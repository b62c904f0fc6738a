"""Evaluations as Markdown: counts, means, worst cases and conclusions; hostile names are inert."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from medseg_diffusion.metrics.case_metrics import measure
from medseg_diffusion.metrics.comparison import Comparison, compare
from medseg_diffusion.metrics.evaluation_summary import EvaluatedCase, summarise
from medseg_diffusion.reports.evaluation_markdown import comparison_markdown, evaluation_markdown
from tests.helpers.cli import medseg
from tests.helpers.masks import box, evaluation, save

EVIL = "<img src=x onerror=alert(1)>|@somebody"
INERT = "&lt;img src=x onerror=alert(1)&gt;\\|@\u2060somebody"


def test_a_summary_has_the_counts_the_means_and_the_worst_cases() -> None:
    text = evaluation_markdown(evaluation(), "medseg evaluate a b")
    assert text.startswith("### Evaluation of segmentations\n\n2 cases; means are over cases, with 95 % intervals.")
    assert "| one | 0.833 (0.667 to 1.000) |" in text and "| case\\_a | 1.000 (1 of 2 without) |" in text
    assert "```\nmedseg evaluate a b\n```" in text
    assert (
        "| Worst cases | Mean Dice | Dice one | Dice case\\_a | Dice three |" in text and "\n- about case\\_a\n" in text
    )
    single = replace(evaluation(), patients={"case_a": "p", "case_b": "p"})
    assert "2 cases of 1 patient; means are over patients" in evaluation_markdown(single)


def test_hostile_names_are_inert_and_tables_stay_tables() -> None:
    for text in (
        evaluation_markdown(evaluation(EVIL)),
        comparison_markdown(Comparison({EVIL: evaluation(EVIL), "B": evaluation(EVIL)}, {}, ())),
    ):
        assert "<img" not in text and INERT in text
        tables = [block for block in text.split("\n\n") if block.startswith("| ")]
        for table in tables:
            cells = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
            assert len(cells) == 1, table


def test_many_classes_make_no_wide_table() -> None:
    mask = np.arange(1, 101, dtype=np.uint8).reshape(10, 10)
    labels = {value: f"class {value}" for value in range(1, 61)}
    many = summarise([EvaluatedCase("a", "p", "r", measure(mask, mask, list(labels), (1.0, 1.0)))], labels)
    assert "| Worst cases | Mean Dice |\n| --- | ---: |\n| a | 1.000 |" in evaluation_markdown(many)


def test_a_comparison_says_what_can_be_concluded() -> None:
    sets = {"A": evaluation(), "B": evaluation()}
    differences = compare(sets)
    text = comparison_markdown(Comparison(sets, {"A": "a", "B": "b"}, differences), "medseg evaluate a b")
    shown = [one for one in differences if one.metric == "dice"]
    assert shown and all(one.conclusion.split(".")[0] in text.replace("\\", "") for one in shown)
    assert "| Predictions | Class |" in text and text.count("| A | ") == text.count("| B | ") == 3


def test_tables_of_sets_have_lesion_f1_where_one_set_has_several_lesions(tmp_path: Path) -> None:
    """A row without the column, or a table without it, would hide what the other set is compared by."""
    whole, parts = box(8), box(8)
    parts[:, :, 4] = 0
    for folder, mask in (("one", whole), ("two", parts), ("reference", whole)):
        save(tmp_path / folder / "a.nii.gz", mask)
    folders = [tmp_path / name for name in ("one", "two", "reference")]
    printed = medseg("evaluate", *folders, "-o", tmp_path / "out", "--markdown", tmp_path / "summary.md")
    head, *rows = printed.stdout.splitlines()[:3]
    assert head.split()[-3:] == ["Lesion", "F1", "cases"]
    assert [row.split()[-2:] for row in rows] == [["1.000", "1"], ["1.000", "1"]]
    assert "| Lesion F1 | Cases |" in (tmp_path / "summary.md").read_text()


def test_the_command_prints_the_summary_alone(tmp_path: Path) -> None:
    for folder, stop in (("a", 5), ("b", 6), ("reference", 6)):
        for name in ("one", "two"):
            save(tmp_path / folder / f"{name}.nii.gz", box(stop))
    single = medseg("evaluate", tmp_path / "a", tmp_path / "reference", "-o", tmp_path / "single", "--markdown", "-")
    assert single.exit_code == 0 and single.stdout.startswith("### Evaluation of segmentations"), single.output
    folders = (tmp_path / "a", tmp_path / "b", "--reference", tmp_path / "reference")
    several = medseg("evaluate", *folders, "-o", tmp_path / "several", "--markdown", tmp_path / "summary.md")
    assert several.exit_code == 0 and "report:" in several.stdout, several.output
    assert (tmp_path / "summary.md").read_text().startswith("### Comparison of segmentations")
    refused = medseg("evaluate", *folders, "-o", tmp_path / "none", "--markdown", "-", "--json")
    assert refused.exit_code == 2 and not (tmp_path / "none").exists()
