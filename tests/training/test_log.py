"""The log of a training: every step and validation is written, to trackers too, and a resumed call continues it."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest

from medseg_diffusion.errors import InputError, UsageError
from medseg_diffusion.training.history import read_history
from medseg_diffusion.training.log import PROJECT, TrainingLog, require_trackers
from tests.helpers.training import resume_file, rows, train


def losses(run: Path) -> list[float]:
    with (run / "steps.csv").open(newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def test_the_losses_of_the_steps_give_the_smoothed_loss(tmp_path: Path) -> None:
    """They are written with all their digits."""
    train(tmp_path)
    smoothed, *others = losses(tmp_path)
    for loss in others:
        smoothed = 0.98 * smoothed + 0.02 * loss
    assert len(others) == 7
    assert smoothed == pytest.approx(resume_file(tmp_path)["state"]["loss"], rel=1e-7)
    assert float(rows(tmp_path)[-1]["loss"]) == pytest.approx(smoothed, rel=1e-5)


def test_a_new_run_does_not_continue_an_old_log(tmp_path: Path) -> None:
    train(tmp_path)
    train(tmp_path)
    assert len(losses(tmp_path)) == 8 and read_history(tmp_path).calls == 1


def test_a_row_that_a_killed_call_left_unfinished_does_not_spoil_the_next_one(tmp_path: Path) -> None:
    train(tmp_path, max_steps=4)
    file = tmp_path / "steps.csv"
    file.write_text(file.read_text() + "5,1,17")
    train(tmp_path, resume=True)
    history = read_history(tmp_path)
    assert history.steps.tolist() == list(range(1, 9)) and history.calls == 2


def test_a_damaged_log_is_named(tmp_path: Path) -> None:
    train(tmp_path, max_steps=4)
    file = tmp_path / "log.csv"
    file.write_text(file.read_text().replace("\n2,", "\ntwo,"))
    with pytest.raises(InputError, match=r"log\.csv: found a damaged file \(.*'two'\); expected .*; restore it"):
        train(tmp_path, resume=True)


def test_tensorboard_has_every_step_and_validation(tmp_path: Path) -> None:
    """A resumed call continues the curves."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    changes = {"trackers": ("tensorboard",)}
    train(tmp_path, max_steps=4, changes=changes)
    train(tmp_path, resume=True, changes=changes)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 9))
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses(tmp_path), rel=1e-6)
    assert [event.step for event in events.Scalars("validation/score")] == [2, 4, 6, 8]


@pytest.mark.filterwarnings("ignore")  # of its own libraries
def test_mlflow_has_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    train(tmp_path / "run", changes={"trackers": ("mlflow",)})
    (run,) = mlflow.search_runs(experiment_names=[PROJECT], output_format="list")
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "train/loss")
    assert [entry.step for entry in history] == list(range(1, 9)) and run.info.run_name == "run"
    assert [entry.value for entry in history] == pytest.approx(losses(tmp_path / "run"))


@pytest.mark.filterwarnings("ignore")  # of its own libraries
def test_weights_and_biases_gets_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline: it writes what it would send."""
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setitem(os.environ, "WANDB_SILENT", "true")
    train(tmp_path, changes={"trackers": ("wandb",)})
    (written,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert written.stat().st_size > 0 and len(losses(tmp_path)) == 8


def test_a_tracker_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medseg_diffusion.training.log.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"wandb is not installed; pip install 'medseg-diffusion\[wandb\]'"):
        require_trackers(("wandb",))


def test_without_trackers_no_tracker_is_imported(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path, 0, resume=False)
    log.step(1, 0.5, 1.0)
    log.close()
    assert log.trackers == [] and losses(tmp_path) == [0.5]
