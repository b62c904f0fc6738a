"""What a training has logged is read again: of resumed, interrupted and unfinished runs, too."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from medseg_diffusion.metrics.training_history import binned
from medseg_diffusion.training.history import is_logged, read_history
from tests.helpers.training import rows, train


@pytest.fixture
def run(tmp_path: Path) -> Path:
    train(tmp_path / "run")
    return tmp_path / "run"


def test_every_step_and_validation_is_read(run: Path) -> None:
    history = read_history(run)
    assert is_logged(run) and history.steps.tolist() == list(range(1, 9)) and history.step == 8
    assert np.isfinite(history.loss).all() and (history.gradient_norm > 0).all()
    assert np.isnan(history.step_seconds[0]) and (history.step_seconds[1:] >= 0).all()
    assert [row["step"] for row in history.validations] == [2, 4, 6, 8] and history.calls == 1
    assert history.best is not None and history.best["score"] == max(row["score"] for row in history.validations)
    assert history.validations[-1]["loss"] == float(rows(run)[-1]["loss"])


def test_a_resumed_call_replaces_the_steps_that_it_repeats(tmp_path: Path) -> None:
    """It starts at the last checkpoint, behind which the first call had logged more steps."""
    train(tmp_path / "whole")
    train(tmp_path / "run", max_steps=6)
    (tmp_path / "run" / "checkpoints" / "step-000006.pt").unlink()
    train(tmp_path / "run", resume=True, max_steps=6)
    (tmp_path / "run" / "checkpoints" / "step-000006.pt").unlink()
    train(tmp_path / "run", resume=True)
    history = read_history(tmp_path / "run")
    assert history.steps.tolist() == list(range(1, 9)) and history.calls == 3
    np.testing.assert_array_equal(history.loss, read_history(tmp_path / "whole").loss)


@pytest.mark.parametrize("left", [0.0, 0.01, 0.5, 0.999])
def test_an_entry_that_is_being_written_is_left_out(run: Path, left: float) -> None:
    file = run / "steps.csv"
    content = file.read_bytes()
    file.write_bytes(content[: int(left * len(content))])
    steps = read_history(run).steps.tolist()
    assert steps == list(range(1, len(steps) + 1)) and len(steps) <= 8 and (left < 0.5 or steps)


def test_what_is_no_number_in_the_log_is_left_out(run: Path) -> None:
    file = run / "log.csv"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines, "", "10,half", "x,1,2,3", "12,0.5,?,0.25", ""]))
    added = read_history(run).validations[4:]
    assert [row["step"] for row in added] == [10, 12] and "loss" not in added[0]
    assert added[1] == {"step": 12, "loss": 0.5, "score": 0.25}


def test_a_score_that_is_no_number_is_not_the_best(run: Path) -> None:
    file = run / "log.csv"
    head, *lines = file.read_text().splitlines()
    column = head.split(",").index("score")
    first = lines[0].split(",")
    first[column] = "nan"
    file.write_text("\n".join([head, ",".join(first), *lines[1:], ""]))
    best = read_history(run).best
    assert best is not None and best["score"] == max(float(line.split(",")[column]) for line in lines[1:])


def test_a_folder_without_a_log_has_no_history(tmp_path: Path) -> None:
    history = read_history(tmp_path)
    assert not is_logged(tmp_path) and history.step == 0 and history.best is None
    assert math.isnan(history.seconds_per_step) and math.isnan(history.written)


def test_many_steps_become_few_points_that_keep_their_range() -> None:
    steps = np.arange(1.0, 1001)
    values = np.where(steps == 500, np.nan, np.sin(steps))
    points = binned(steps, values, bins=50)
    assert len(points.steps) == 50 and (points.low <= points.middle).all() and (points.middle <= points.high).all()
    assert points.high.max() == np.nanmax(values) and points.low.min() == np.nanmin(values)
    assert len(binned(steps, np.full(1000, np.nan)).steps) == 0
