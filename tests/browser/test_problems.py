"""The checks that every opened page undergoes can fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.browser import PHONE, Visits, overflow


def test_a_quiet_page_has_no_problems(visit: Visits) -> None:
    page = visit("<!doctype html><title>quiet</title><p>text", PHONE, dark=True)
    assert page.title() == "quiet" and overflow(page) == 0
    assert page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")


def test_a_wide_page_is_noticed(visit: Visits) -> None:
    assert overflow(visit("<!doctype html><div style='width: 600px'>wide</div>", PHONE)) > 100


@pytest.mark.parametrize(
    "content",
    [
        "<script>console.error('broken')</script>",
        "<script>throw new Error('broken')</script>",
        "<script>alert('broken')</script>",
        "<img src='https://example.invalid/broken.png' alt=''>",
        "<img src='broken.png' alt=''>",
    ],
)
def test_problems_are_noticed(content: str, browser: Any, tmp_path: Path) -> None:
    visits = Visits(browser, tmp_path)
    visits(f"<!doctype html><title>noisy</title>{content}")
    visits.close()
    assert any("broken" in problem for problem in visits.problems)


def test_webgl_and_scripts_can_be_switched_off(visit: Visits) -> None:
    draws = "<canvas></canvas><script>document.title = !!document.querySelector('canvas').getContext('webgl2')</script>"
    assert visit(draws).title() == "true"
    assert visit(draws, webgl=False).title() == "false"
    assert visit(draws, scripts=False).title() == ""
