"""What a page loads and runs, read from its text."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser


class Page(HTMLParser):
    """Collects the tags of a page, the addresses that it loads or links, and the text that people see."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.links: list[str] = []
        self.seen = ""
        self._hidden = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._hidden += tag in ("script", "style")
        for key, value in attrs:
            if key in {"src", "srcset", "action", "data"} or key.startswith("on"):
                self.loads.append(value or "")
            elif key in {"href", "xlink:href"} and not (value or "").startswith("#"):
                self.links.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in ("script", "style")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.seen += data


def require_self_contained(text: str) -> Page:
    """Check that a page loads nothing but embedded data and that its policy forbids the rest; return it."""
    page = Page(text)
    assert all(value.startswith(("data:", "blob:")) for value in page.loads), page.loads
    assert not {"link", "iframe", "object", "embed", "base"} & set(page.tags)
    assert "default-src 'none'" in text
    assert "@import" not in text and not re.search(r"url\((?!#|data:)", text)
    return page


def viewed(text: str) -> dict[str, dict[str, str]]:
    """What the viewer of a page shows: case -> kind of image -> its voxels, encoded."""
    data = re.search(r'class="viewer-data">(.*?)</script>', text, re.DOTALL)
    assert data is not None, "a page with a viewer"
    cases = json.loads(data[1])["cases"]
    return {case["name"]: {layer["kind"]: layer["data"] for layer in case["layers"]} for case in cases}
