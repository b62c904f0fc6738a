"""docs/files.md names the columns and keys of the files that the commands write, all of them and no others."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from medseg_diffusion.metrics.registry import METRICS
from medseg_diffusion.workflows.evaluate import EvaluateOptions, compare_predictions, evaluate
from tests.helpers import documented
from tests.helpers.documented import assert_documented
from tests.helpers.masks import box, save


def test_what_is_not_in_the_page_and_what_is_not_written_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects the comparison itself: otherwise all the tests below could pass on an empty page."""
    page = tmp_path / "files.md"
    rows = ["| `a`, `b.<class>` | numbers |", "| `rows` | list |", "| `rows[].x.y` | number |", "| `any` | anything |"]
    page.write_text("\n".join(["# Files", "## one.json", "| key | content |", "|---|---|", *rows, "## two", ""]))
    monkeypatch.setattr(documented, "PAGE", page)
    good = {"a": 1, "b": {"left lung": 2}, "rows": [{"x": {"y": 3}}], "any": {"p": [{"q": 1}]}}

    def check(content: object) -> None:
        (tmp_path / "one.json").write_text(json.dumps(content))
        documented.assert_documented("one.json", tmp_path / "one.json")

    check(good)
    for more in ({"c": 1}, {"rows": [{"x": {"y": 3, "z": 4}}]}, {"rows": [{"w": 3}]}, {"a": {"inside": 1}, "a2": 1}):
        with pytest.raises(AssertionError, match="written, but not in the page"):
            check({**good, **more})
    for name in good:
        with pytest.raises(AssertionError, match="in the page, but not written"):
            check({key: value for key, value in good.items() if key != name})


def test_the_metrics_of_an_evaluation() -> None:
    """The page repeats the registry: names, units, rules for empty masks and definitions."""
    page = documented.PAGE.read_text(encoding="utf-8")
    for metric in METRICS.values():
        values = (metric.both_empty, metric.prediction_empty, metric.reference_empty)
        rules = [value if isinstance(value, str) else f"{value:g}".replace("nan", "none") for value in values]
        cells = [f"`{metric.name}`", f"`{metric.key}`", metric.unit, metric.better, *rules, metric.definition]
        assert f"| {' | '.join(cells)} |" in page
    assert documented.documented("Metrics") == list(METRICS)


@pytest.fixture
def masks(tmp_path: Path) -> tuple[Path, Path]:
    """Two cases with a score map, probabilities and a second rater."""
    for name in ("a", "b"):
        save(tmp_path / "ref" / f"{name}.nii.gz", box(6))
        save(tmp_path / "pred" / f"{name}_seg.nii.gz", box(4))
        save(tmp_path / "other" / f"{name}_seg.nii.gz", box(5))
        p = np.where(box(4) == 1, 0.9, 0.1).astype(np.float32)
        save(tmp_path / "pred" / f"{name}_prob.nii.gz", np.stack([1 - p, p], axis=-1))
        save(tmp_path / "maps" / f"{name}_scores.nii.gz", p)
    (tmp_path / "table.csv").write_text("case,patient,site\na,p,north\nb,q,south\n")
    return tmp_path / "pred", tmp_path / "ref"


def test_the_files_of_an_evaluation(masks: tuple[Path, Path], tmp_path: Path) -> None:
    pred, ref = masks
    table = tmp_path / "table.csv"
    options = EvaluateOptions(
        raters=[ref], scores=tmp_path / "maps", patients=table, strata=(table, "site"), cldice=True
    )
    evaluate(pred, ref, tmp_path / "plain")
    evaluate(pred, ref, tmp_path / "all", options)
    for name in ("summary.json", "cases.csv"):
        assert_documented(name, tmp_path / "plain" / name, tmp_path / "all" / name)


def test_the_file_of_a_comparison(masks: tuple[Path, Path], tmp_path: Path) -> None:
    pred, ref = masks
    save(ref / "c.nii.gz", box(6))
    compare_predictions(
        [pred, tmp_path / "other"], ref, tmp_path / "out", EvaluateOptions(patients=tmp_path / "table.csv")
    )
    assert_documented("comparison.json", tmp_path / "out" / "comparison.json")
