"""Runs that go on with the same, or another, number of processes: the same examples and the same losses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from medseg_diffusion.training.history import read_history
from tests.helpers.training import assert_same, finish, resume_file, start_two, train

pytestmark = pytest.mark.slow

HALF, WHOLE = list(range(16)), list(range(32))  # 8 steps of 4 examples


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs in two processes (see `train_in_parts`), and "one" in a single process."""
    root = tmp_path_factory.mktemp("runs")
    train(root / "one", dropout=0.0)
    train(root / "went-on", dropout=0.0, max_steps=4)
    finish(start_two(f"train_in_parts({str(root)!r})"))
    return root


def drawn(root: Path, name: str) -> list[list[int]]:
    """The numbers of the examples that each of the two processes has drawn."""
    return [json.loads((root / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]


def drawn_together(root: Path, name: str) -> list[int]:
    first, second = drawn(root, name)
    return sorted(first + second)


def losses(run: Path) -> np.ndarray:
    history = read_history(run)
    assert history.steps.tolist() == list(range(1, 9))
    return history.loss


def test_the_processes_draw_the_examples_of_one(runs: Path) -> None:
    first, second = drawn(runs, "whole-0")
    assert sorted(first + second) == WHOLE and len(first) == len(second)
    assert all(
        sorted(first[2 * i : 2 * i + 2] + second[2 * i : 2 * i + 2]) == WHOLE[4 * i : 4 * i + 4] for i in range(8)
    )


def test_the_same_number_of_processes_goes_on_bit_by_bit(runs: Path) -> None:
    np.testing.assert_array_equal(losses(runs / "parts"), losses(runs / "whole"))
    assert_same(resume_file(runs / "parts"), resume_file(runs / "whole"))
    assert drawn_together(runs, "parts-0") == HALF
    assert drawn_together(runs, "parts-1") == WHOLE[16:]


def test_two_processes_go_on_with_a_run_of_one(runs: Path) -> None:
    assert drawn_together(runs, "went-on-0") == WHOLE[16:]
    np.testing.assert_allclose(losses(runs / "went-on"), losses(runs / "one"), rtol=1e-5)


def test_one_process_goes_on_with_a_run_of_two(runs: Path) -> None:
    numbers: list[int] = []
    train(runs / "begun", dropout=0.0, resume=True, numbers=numbers)
    assert numbers == WHOLE[16:]
    np.testing.assert_allclose(losses(runs / "begun"), losses(runs / "one"), rtol=1e-5)
    np.testing.assert_allclose(losses(runs / "begun"), losses(runs / "whole"), rtol=1e-5)
