"""Shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

DATA = Path(os.environ.get("MEDSEG_DATA", Path(__file__).resolve().parents[1] / "../shared/data"))


@pytest.fixture
def data_folder() -> Path:
    """The folder of real data; tests that use it are marked `data` and skip where it is missing."""
    if not DATA.is_dir():
        pytest.skip(f"no data folder at {DATA}; set MEDSEG_DATA")
    return DATA
