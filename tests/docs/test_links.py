"""Links between files of the repository lead somewhere, also to the right heading. Nothing is fetched."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.helpers.docs import ROOT, anchors, links, markdown_files, name_of
from tests.helpers.site import generated


def text_of(path: Path) -> str:
    """The Markdown of a file, with what is generated when the site is built."""
    return generated(path.read_text(encoding="utf-8"))


def dead(path: Path) -> list[str]:
    """The links of a file that lead nowhere."""
    found = []
    for link in links(path.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        file = (path.parent / target).resolve() if target else path
        if not file.exists() or not file.is_relative_to(ROOT):
            found.append(f"{link}: no such file")
        elif anchor and file.suffix == ".md" and anchor not in anchors(text_of(file)):
            found.append(f"{link}: no such heading")
    return found


@pytest.mark.parametrize("path", markdown_files(), ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    assert dead(path) == []


def test_a_dead_link_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "other.md").write_text("# One heading\n\n# One heading\n")
    good = "[a](other.md) [b](other.md#one-heading) [c](other.md#one-heading_1) [d](#here) `[e](nowhere)`\n\n## Here\n"
    (tmp_path / "page.md").write_text(good)
    assert dead(tmp_path / "page.md") == []
    for link in ("nowhere.md", "other.md#two", "#there", "../page.md"):
        (tmp_path / "page.md").write_text(f"{good}\n[x]({link})\n")
        assert [one.partition(":")[0] for one in dead(tmp_path / "page.md")] == [link]
