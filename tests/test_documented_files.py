"""docs/files.md names the columns and keys of the files that the commands write, all of them and no others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers import documented


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
