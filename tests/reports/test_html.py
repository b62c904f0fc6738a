"""Pages: self-contained, escaped, and with the numbers."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from medseg_diffusion.reports.html import CasePicture, SegmentedCase, evaluation_report, segment_report
from medseg_diffusion.reports.plots import box_plot
from tests.helpers.masks import evaluation

EVIL = "<script>alert('x')</script>\"><img src=https://example.org/x.png>$\\frac"


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


def test_evaluation_page_holds_the_numbers() -> None:
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
