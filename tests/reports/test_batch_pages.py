"""The pages of `segment` and `anomaly` from given numbers: order, outliers, remarks, and what a single scan shows."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from medseg_diffusion.reports.anomaly_page import ScoredScan, anomaly_page, worst_first
from medseg_diffusion.reports.batch import distinct_names, linked, outliers, percent
from medseg_diffusion.reports.segment_page import MOST_CLASSES, SegmentedScan, segment_page, with_outliers

EVIL = '"><script>alert(1)</script>'


def scan(name: str, volume: float = 2.0, **changes: object) -> SegmentedScan:
    return SegmentedScan(name, "done", volumes_ml={"x": volume}, **changes)  # type: ignore[arg-type]


def test_outliers_lie_far_beyond_the_quartiles() -> None:
    ordinary = [1.0, 1.1, 0.9, 1.05, 0.95]  # quartiles 0.95 and 1.05: fences at 0.65 and 1.35
    assert outliers([*ordinary, 1.3]) == [False] * 6
    assert outliers([*ordinary, 3.0]) == [False] * 5 + [True]
    assert outliers([0.1, *ordinary]) == [True] + [False] * 5
    assert outliers([1, 1, 1, 50]) == [False] * 4, "too few to tell"
    assert outliers([1, 1, 1, 1, 1, 50]) == [False] * 6, "quartiles without a distance tell nothing"
    assert outliers([*ordinary, math.nan, 3.0]) == [False] * 6 + [True]


def test_what_needs_a_look_comes_first() -> None:
    flags = {"a": (), "b": ("warning",), "c": ("members disagree", "warning"), "d": ("empty mask",), "e": ()}
    scans = [scan(name, flags=both) for name, both in flags.items()] + [SegmentedScan("f", "failed", ("failed",))]
    assert [one.name for one in with_outliers(scans, ["x"])] == ["f", "d", "c", "b", "a", "e"]
    volumes = [2.0, 2.1, 1.9, 9.0, 2.05, 1.95]
    ordered = with_outliers([scan(f"s{i}", volume) for i, volume in enumerate(volumes)], ["x"])
    assert (ordered[0].name, ordered[0].flags) == ("s3", ("outlier: x",)) and not any(one.flags for one in ordered[1:])
    page = segment_page(ordered, {"x": "#EB3B76"}, date="today")
    assert "s3: x 9.000 ml (median of the scans 2.025 ml)" in page and "Volumes over the scans" in page


@pytest.mark.parametrize("count", [1, 2, 4, 5])
def test_what_few_scans_show(count: int) -> None:
    page = segment_page([scan(f"s{i}") for i in range(count)], {"x": "#EB3B76"}, date="today")
    assert ('id="overview"' in page) == (count > 1)
    assert ("Volumes over the scans" in page) == (count >= 5)


def test_a_remark_that_all_scans_share_is_said_once() -> None:
    scans = [scan(f"s{i}", remarks=["of the model", *(["of this scan"] if i == 1 else [])]) for i in range(4)]
    page = segment_page(scans, {"x": "#EB3B76"}, date="today")
    assert page.count("of the model</li>") == 1 and page.count("of this scan</li>") == 1
    assert "Remarks" in page and "Remarks" not in segment_page([scan("a"), scan("b")], {"x": "#EB3B76"}, date="today")


def test_many_classes_do_not_widen_the_overview() -> None:
    classes = [f"class {i}" for i in range(30)]
    many = [SegmentedScan(f"s{i}", "done", volumes_ml=dict.fromkeys(classes, 1.0 + i)) for i in range(6)]
    page = segment_page(many, dict.fromkeys(classes, "#EB3B76"), date="today")
    heading = re.search(r"<thead>(.*?)</thead>", page, re.DOTALL)
    assert heading is not None and heading[1].count("<th") == MOST_CLASSES + 3
    assert f"The first {MOST_CLASSES} of the model's 30 classes" in page and page.count("class 29") >= 6


def test_numbers_that_are_not_known_are_dashes() -> None:
    unknown = ScoredScan("old", "skipped", volume_ml=1.5)
    known = ScoredScan("new", "done", score=0.5, percentile=100.0, healthy_scans=40, volume_ml=2.0, threshold=0.2)
    page = anomaly_page(worst_first([unknown, known]), healthy=[0.1, 0.2], date="today")
    rows = re.findall(r"<tr.*?</tr>", page.split("<tbody>")[1].split("</tbody>")[0], re.DOTALL)
    assert "new" in rows[0] and "0.500" in rows[0]
    assert "old" in rows[1] and rows[1].count("\u2013") >= 3 and "1.500" in rows[1]
    assert "nan" not in re.sub(r'data-value="nan"', "", "".join(rows))
    assert "healthy scans (2)" in page


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0, "0 %"), (1e-8, "below 0.0001 %"), (1.26e-6, "0.00013 %"), (0.0123, "1.2 %"), (0.0996, "10 %"),
        (0.123, "12.3 %"), (0.996, "99.6 %"), (0.99999, "100 %"), (1, "100 %"),
    ],
)  # fmt: skip
def test_percentages_have_no_exponent(share: float, text: str) -> None:
    """100 % of the foreground was 1e+02 %."""
    assert percent(share) == text
    page = anomaly_page([ScoredScan("a", "done", score=0.5, volume_ml=1.0, share=share, threshold=0.1)])
    assert f"{text} of the foreground" in page


def test_a_failed_image_file_leaves_the_units_of_the_scans() -> None:
    """Image files are not scored. One of them among scans, which failed and so stood first, made their unit pixels."""
    failed = ScoredScan("picture", "failed", ("failed",), files={"scan": ("picture.png", "")})
    done = ScoredScan("scan", "done", score=0.5, volume_ml=0.123, share=0.01, files={"scan": ("scan.nii.gz", "")})
    page = anomaly_page(worst_first([failed, done]))
    assert "Anomalous, ml" in page and "Anomalous volume" in page and "0.123 ml" in page and "pixels" not in page


def test_the_only_scan_of_a_call_stands_open() -> None:
    one = ScoredScan("a", "done", score=0.5, compared="higher than 97 % of 40 healthy scans", volume_ml=2.0)
    page = anomaly_page([one], healthy=[0.1] * 40, date="today")
    assert "higher than 97 % of 40 healthy scans" in page and 'id="overview"' not in page
    assert "<details id=" not in page


@pytest.mark.parametrize("kind", ["segment", "anomaly"])
def test_names_and_remarks_are_text(kind: str) -> None:
    common = {"flags": ("warning",), "remarks": [EVIL], "model": EVIL, "files": {"mask": (EVIL, "a.nii.gz")}}
    if kind == "segment":
        scans = [SegmentedScan(f"{EVIL}{i}", "done", volumes_ml={EVIL: 1.0 + i}, **common) for i in range(6)]
        page = segment_page(scans, {EVIL: "#EB3B76"}, made={EVIL: EVIL}, stopped=EVIL, command=EVIL, date=EVIL)
    else:
        scored = [ScoredScan(f"{EVIL}{i}", "done", score=1.0 + i, compared=EVIL, **common) for i in range(6)]
        page = anomaly_page(scored, healthy=[0.1], made={EVIL: EVIL}, stopped=EVIL, command=EVIL, date=EVIL)
    assert "<script>alert" not in page and page.count("&lt;script&gt;alert") > 20
    assert re.search(r"https?://(?!www\.w3\.org)", page) is None


def test_files_are_linked_from_the_page_and_scans_have_distinct_names() -> None:
    files = linked({"mask": Path("out/a b_seg.nii.gz"), "scan": Path("in/a b.nii.gz")}, Path("out/page.html"))
    assert files == {"mask": ("a b_seg.nii.gz", "a%20b_seg.nii.gz"), "scan": ("a b.nii.gz", "../in/a%20b.nii.gz")}
    assert distinct_names([Path("x/a.nii"), Path("y/b.nii")]) == ["a.nii", "b.nii"]
    assert distinct_names([Path("x/1/a.nii"), Path("x/2/a.nii"), Path("x/2/b.nii")]) == [
        "1/a.nii",
        "2/a.nii",
        "2/b.nii",
    ]
