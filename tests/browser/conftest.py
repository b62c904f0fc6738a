"""One headless Chromium for all tests of pages; they skip where it or Playwright is missing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.browser import ARGUMENTS, Visits


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium, which takes seconds to start. The environment variable CHROMIUM names another than the system's."""
    api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed (pip install playwright)")
    chromium = shutil.which(os.environ.get("CHROMIUM", "chromium"))
    if chromium is None:
        pytest.skip("no Chromium is installed (apt-get install chromium), and CHROMIUM names none")
    with api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield running
        running.close()


@pytest.fixture
def visit(browser: Any, tmp_path: Path) -> Iterator[Visits]:
    """`visit(page)` opens a page (see `Visits`). A test fails at its end if one of its pages had a problem."""
    visits = Visits(browser, tmp_path)
    yield visits
    visits.close()
    assert visits.problems == []
