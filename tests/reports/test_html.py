from __future__ import annotations

import csv
import io
import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from scipy.ndimage import label

from medseg_diffusion.files import write_files
from medseg_diffusion.metrics.overlap import label_overlap
from medseg_diffusion.reports.html import CasePicture, SegmentedCase, evaluation_report, segment_report
from medseg_diffusion.reports.plots import box_plot, overlay
from medseg_diffusion.reports.preview import preview_png
from medseg_diffusion.reports.slices import display_range, label_colour
from medseg_diffusion.reports.summary import CaseResult, Evaluation, cases_csv, summarise, summary_json

EVIL = "<script>alert('x')</script>\"><img src=https://example.org/x.png>$\\frac"


def evaluation(name: str = "case_a") -> Evaluation:
    """Two cases, three classes: class 1 everywhere, class 2 in the first case only, class 3 in none."""
    pairs = {name: ([1, 1, 2, 0], [1, 0, 2, 0]), "case_b": ([1, 0, 0, 0], [1, 0, 0, 0])}
    cases = [
        CaseResult(key, f"{key}_seg.nii.gz", f"{key}.nii.gz", label_overlap(np.array([p]), np.array([r]), [1, 2, 3]))
        for key, (p, r) in pairs.items()
    ]
    return summarise(cases, {1: "one", 2: name, 3: "three"}, warnings=[f"about {name}"])


def pixels(png: bytes) -> np.ndarray:
    return imread(io.BytesIO(png), format="png")[..., :3]


def refuse_constant(name: str) -> float:
    raise AssertionError(f"{name} is not JSON")


class Page(HTMLParser):
    """Collects the tags of a page and whatever they would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for key, value in attrs if key in {"src", "href", "srcset", "action", "data"}]


def test_summary_is_strict_json_in_nnunets_shape() -> None:
    found = json.loads(summary_json(evaluation()), parse_constant=refuse_constant)
    assert {"foreground_mean", "mean", "metric_per_case"} <= set(found)
    keys = {"Dice", "IoU", "FP", "TP", "FN", "TN", "n_pred", "n_ref"}
    assert set(found["foreground_mean"]) == keys
    assert set(found["mean"]) == {"1", "2", "3"} and all(set(values) == keys for values in found["mean"].values())
    case = found["metric_per_case"][0]
    assert case["prediction_file"] == "case_a_seg.nii.gz" and case["reference_file"] == "case_a.nii.gz"
    assert case["metrics"]["1"] == {
        "Dice": 2 / 3, "IoU": 1 / 2, "TP": 1, "FP": 1, "FN": 0, "TN": 2, "n_pred": 2, "n_ref": 1,
        "HD95_mm": None,
    }  # fmt: skip


def test_summary_averages_what_exists() -> None:
    found = json.loads(summary_json(evaluation()))
    assert found["mean"]["1"]["Dice"] == pytest.approx((2 / 3 + 1) / 2)
    assert found["mean"]["1"]["n_pred"] == 1.5
    assert found["mean"]["2"]["Dice"] == 1.0  # from the one case that has it
    assert found["mean"]["3"]["Dice"] is None and found["mean"]["3"]["TN"] == 4
    assert found["foreground_mean"]["Dice"] == pytest.approx((5 / 6 + 1) / 2)  # the class that never occurs is left out


def test_summary_says_how() -> None:
    found = json.loads(summary_json(evaluation()))
    assert found["n_cases"] == 2
    assert found["labels"] == {"1": "one", "2": "case_a", "3": "three"}
    assert found["policy"]["both_empty"] is None and found["policy"]["reference_empty"] == 0.0
    interval = found["confidence_interval_95"]["2"]["IoU"]
    assert interval == {"mean": 1.0, "low": None, "high": None, "n": 1, "n_missing": 1}
    assert {"medseg-diffusion", "numpy", "scipy", "python"} <= set(found["versions"])


def test_csv_has_one_row_per_case_and_class() -> None:
    rows = list(csv.DictReader(io.StringIO(cases_csv(evaluation('a, "b"')))))
    assert [(row["case"], row["label"]) for row in rows] == [(c, k) for c in ('a, "b"', "case_b") for k in "123"]
    assert float(rows[0]["dice"]) == 2 / 3 and rows[0]["tp"] == "1"
    assert rows[2]["dice"] == rows[2]["iou"] == "" and rows[2]["n_ref"] == "0"


def test_table_has_numbers_or_none() -> None:
    one, _, three = evaluation().table()
    assert one["class"] == "one" and one["dice"] == pytest.approx(5 / 6) and one["n"] == 2
    assert three["dice"] is three["iou_low"] is None and three["n_missing"] == 2


def test_worst_first_puts_cases_without_classes_last() -> None:
    nothing = label_overlap(np.array([[0]]), np.array([[0]]), [1])
    half = label_overlap(np.array([[1, 1]]), np.array([[0, 1]]), [1])
    full = label_overlap(np.array([[1, 1]]), np.array([[1, 1]]), [1])
    cases = [CaseResult(name, "", "", item) for name, item in (("a", nothing), ("b", full), ("c", half))]
    assert [case.name for case in summarise(cases, {1: "x"}).worst_first()] == ["c", "b", "a"]


@pytest.mark.parametrize("name", ["case", EVIL])
def test_pages_are_self_contained_and_escaped(name: str) -> None:
    png = box_plot([(name, [0.5, 1.0])])
    evaluated = evaluation_report(evaluation(name), [CasePicture("Best case", name, 0.9, png)], command=name, date=name)
    segmented = segment_report(
        [
            SegmentedCase(
                name, png, {name: 1.5}, {name: (1, 2)}, {name: (0, 3)}, 0.9, 3.2, name, {name: name}, [name], [name]
            )
        ],
        command=name,
    )
    for text, scripts in ((evaluated, 1), (segmented, 0)):
        page = Page(text)
        assert page.loads and all(value.startswith("data:image/png;base64,") for value in page.loads)
        assert page.tags.count("script") == scripts
        assert "link" not in page.tags and "iframe" not in page.tags
        assert "@import" not in text and "url(" not in text
        assert "default-src 'none'" in text
        if name == "case":
            assert re.search(r"https?://", text) is None
        else:
            assert "&lt;script&gt;alert" in text and "<script>alert" not in text


def test_evaluation_page_says_what_was_found() -> None:
    text = evaluation_report(evaluation("case_a"), command="medseg evaluate a b", date="2020-02-02")
    rows = re.findall(r'<td data-value="(case_\w)">', text)
    assert rows == ["case_a", "case_b"]  # Dice 0.833 before 1
    for expected in ("0.833", "about case_a", "left out of that class", "medseg evaluate a b", "2020-02-02"):
        assert expected in text
    assert "nan" not in re.sub(r'data-value="nan"|base64,[^"]*', "", text)


def test_segment_page_shows_intervals_only_where_there_are_some() -> None:
    case = SegmentedCase("a", volumes_ml={"x": 12.3456}, intervals_ml={"x": (11.0, 13.0)}, level=0.95)
    with_interval = segment_report([case])
    without = segment_report([SegmentedCase("a", volumes_ml={"x": 12.3456})])
    assert "12.35" in with_interval and "11.00 to 13.00" in with_interval
    assert "12.35" in without and "interval" not in without


def extent(mask: np.ndarray) -> tuple[int, int]:
    """Height and width in pixels of the largest connected part: not of the letters, which hold any shade."""
    parts, _ = label(mask)
    rows, columns = np.nonzero(parts == np.bincount(parts[mask]).argmax())
    return int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1


def test_overlay_is_to_scale() -> None:
    # 20 x 10 x 5 voxels of 1 x 2 x 6 mm: 20 mm wide, 20 mm deep, 30 mm high. Without an image the reference is grey.
    reference = np.zeros((40, 20, 10), np.uint8)
    reference[10:30, 5:15, 3:8] = 1
    picture = pixels(overlay(reference, np.zeros_like(reference), (1.0, 2.0, 6.0)))
    grey = np.all(np.abs(picture - 0.3) < 0.02, axis=-1)
    # All three planes are 40 mm wide: three equal columns.
    sizes = [extent(part) for part in np.array_split(grey, 3, axis=1)]
    # Outlines cover a few pixels at each edge.
    for (rows, columns), (tall, wide) in zip(sizes, [(20, 20), (30, 20), (30, 20)], strict=True):
        assert rows / columns == pytest.approx(tall / wide, rel=0.06)
    assert sizes[0][1] / sizes[1][1] == pytest.approx(1, rel=0.03)


def test_overlay_has_anterior_up_and_left_on_the_left() -> None:
    # A 2D image has one panel: voxel (I, J) = (2, 9) is left and near the front.
    reference = np.zeros((12, 12, 1), np.uint8)
    reference[1:4, 8:11] = 1
    picture = pixels(overlay(reference, np.zeros_like(reference), (1.0, 1.0, 1.0)))
    rows, columns = np.nonzero(np.all(np.abs(picture - 0.3) < 0.02, axis=-1))
    assert columns.mean() < picture.shape[1] / 2 and rows.mean() < picture.shape[0] / 2


def test_overlay_draws_both_outlines_in_their_colours() -> None:
    reference, prediction = np.zeros((2, 16, 16, 16), np.uint8)
    reference[2:8, 2:8, 2:8] = prediction[9:14, 9:14, 9:14] = 1

    def count(picture: np.ndarray, colour: tuple[int, int, int]) -> int:
        return int(np.all(np.abs(picture * 255 - colour) < 12, axis=-1).sum())

    orange, blue = (0xE6, 0x9F, 0x00), (0x56, 0xB4, 0xE9)
    image = np.random.default_rng(0).random(reference.shape)
    both = pixels(overlay(reference, reference * 0 + prediction, (1, 1, 1), image))
    # The legend has both colours too: compare with pictures that lack one of the masks.
    no_prediction = pixels(overlay(reference, prediction * 0, (1, 1, 1), image))
    assert count(no_prediction, orange) > 500
    assert count(both, orange) >= count(no_prediction, orange) * 0.9
    no_reference = pixels(overlay(reference * 0, prediction, (1, 1, 1), image))
    assert count(no_reference, blue) > count(no_prediction, blue) + 300
    assert count(no_reference, orange) < count(no_prediction, orange) / 2


def test_preview_is_to_scale_and_coloured() -> None:
    image = np.random.default_rng(0).random((20, 20, 10)) * 0.01
    labels = np.zeros(image.shape, np.int32)
    labels[5:15, 5:15, 2:8] = 2
    picture = pixels(preview_png(image, labels, (1.0, 1.0, 4.0), {2: "thing"}, slices_per_plane=1))
    # Orange over grey of at most white: red clearly above blue, and nothing else is coloured.
    coloured = picture[..., 0] - picture[..., 2] > 0.3
    rows = np.flatnonzero(coloured.any(axis=1))
    bands = [band for band in np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1) if len(band) > 20]
    assert len(bands) == 3, "one band per plane; the legend is thinner"
    sizes = [extent(coloured[band]) for band in bands]
    for (height, width), (tall, wide) in zip(sizes, [(10, 10), (24, 10), (24, 10)], strict=True):
        assert height / width == pytest.approx(tall / wide, rel=0.06)


def test_preview_adds_a_row_for_the_uncertainty() -> None:
    image = np.random.default_rng(0).random((12, 12, 6))
    labels = np.zeros(image.shape, np.uint8)
    plain = pixels(preview_png(image, labels, (1, 1, 1), {}))
    more = pixels(preview_png(image, labels, (1, 1, 1), {}, uncertainty=image))
    assert more.shape[0] > plain.shape[0] * 1.2 and more.shape[1] == plain.shape[1]


@pytest.mark.parametrize("shape", [(8, 8, 1), (1, 9, 7), (6, 6, 6)])
def test_preview_of_flat_and_empty_images(shape: tuple[int, int, int]) -> None:
    picture = pixels(preview_png(np.zeros(shape), np.zeros(shape, int), (1, 1, 1), {1: "a"}, np.zeros(shape)))
    assert picture.size


def test_preview_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"\(2, 2, 2\).*\(2, 2, 3\)"):
        preview_png(np.zeros((2, 2, 2)), np.zeros((2, 2, 3), int), (1, 1, 1), {})


def test_box_plot_of_nothing_and_of_one() -> None:
    assert pixels(box_plot([])).size
    assert pixels(box_plot([("a", [math.nan]), ("b", [0.5]), ("b", [0.0, 1.0])])).size


def test_many_classes_have_different_colours() -> None:
    assert len({str(label_colour(i)) for i in range(60)}) == 60


def test_display_range_ignores_background_and_outliers() -> None:
    image = np.zeros(10_000)
    image[:2000] = np.linspace(100, 200, 2000)
    image[0] = 1e6
    low, high = display_range(image)
    assert low == 0 and 190 < high < 210
    assert display_range(np.full(3, 5.0)) == (5.0, 6.0)


def test_files_appear_complete_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "new" / "folder"
    assert write_files(folder, {"a.txt": "ä", "b.bin": b"1"}) == (folder / "a.txt", folder / "b.bin")
    assert (folder / "a.txt").read_text(encoding="utf-8") == "ä"

    original = Path.write_bytes

    def full_disk(self: Path, data: bytes) -> int:
        if "b.bin" in self.name:
            original(self, data[:1])
            raise OSError("no space left")
        return original(self, data)

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_files(folder, {"a.txt": "changed", "b.bin": b"22"})
    assert sorted(os.listdir(folder)) == ["a.txt", "b.bin"]
    assert (folder / "a.txt").read_text(encoding="utf-8") == "ä" and (folder / "b.bin").read_bytes() == b"1"
