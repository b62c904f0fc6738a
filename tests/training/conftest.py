"""A run that other runs are compared with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.training import train


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps without interruption."""
    run = tmp_path_factory.mktemp("whole")
    train(run)
    return run
