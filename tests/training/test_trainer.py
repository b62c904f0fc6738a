"""The training loop: learning rate, logs, and above all interruptions that change nothing."""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from medseg_diffusion.errors import MedsegError
from medseg_diffusion.training.ema import EMA
from medseg_diffusion.training.resume import Checkpoints
from medseg_diffusion.training.trainer import Decay, Progress, TrainingOptions, learning_rate
from tests.helpers.training import assert_same, resume_file, rows, start, train


def test_the_learning_rate_warms_up_and_decays_to_zero() -> None:
    options = TrainingOptions(learning_rate=2.0, warmup_steps=10, max_steps=110)
    rates = [learning_rate(step, options) for step in range(111)]
    assert rates[:3] == pytest.approx([0.2, 0.4, 0.6])
    assert rates[9] == rates[10] == 2.0
    assert rates[60] == pytest.approx(2 * 0.5**0.9)
    assert rates[110] == 0 and all(a > b for a, b in pairwise(rates[10:]))
    assert learning_rate(0, TrainingOptions(warmup_steps=0)) == TrainingOptions().learning_rate
    assert learning_rate(0, TrainingOptions(warmup_steps=5, max_steps=5)) > 0


@pytest.mark.parametrize(("decay", "middle", "last"), [("linear", 1.0, 0.0), ("constant", 2.0, 2.0)])
def test_other_decays_of_the_learning_rate(decay: Decay, middle: float, last: float) -> None:
    options = TrainingOptions(learning_rate=2.0, warmup_steps=10, max_steps=110, decay=decay)
    rates = [learning_rate(step, options) for step in range(111)]
    assert (rates[0], rates[10], rates[60], rates[110]) == pytest.approx((0.2, 2.0, middle, last))


# ---- the loop --------------------------------------------------------------------------------------------------------


def test_a_run_learns_logs_and_keeps_its_best_model(tmp_path: Path) -> None:
    saved: list[tuple[int, float, float]] = []
    shown: list[Progress] = []

    def save(model: nn.Module, step: int, numbers: Mapping[str, float]) -> None:
        saved.append((step, numbers["score"], float(next(model.parameters()).sum())))

    best = train(tmp_path, save=save, progress=shown.append, changes={"max_steps": 60, "validate_every": 10})
    log = rows(tmp_path)
    assert [int(row["step"]) for row in log] == [10, 20, 30, 40, 50, 60]
    assert float(log[-1]["loss"]) < float(log[0]["loss"])
    scores = {int(row["step"]): float(row["score"]) for row in log}
    assert best["score"] == pytest.approx(max(scores.values()), rel=1e-5)
    assert scores[int(best["step"])] == max(scores.values())
    assert [step for step, _, _ in saved][-1] == best["step"]
    assert [score for _, score, _ in saved] == sorted(score for _, score, _ in saved)
    assert [p.step for p in shown] == list(range(1, 61))
    assert shown[-1].seconds_left == 0 and shown[8].score is None and shown[9].score is not None
    assert float(log[0]["learning_rate"]) == pytest.approx(
        learning_rate(9, TrainingOptions(learning_rate=1e-2, warmup_steps=3, max_steps=60)), rel=1e-3
    )
    assert list((tmp_path / "tensorboard").iterdir())


def test_the_same_run_twice_gives_the_same_weights(whole: Path, tmp_path: Path) -> None:
    """Whatever the state of the global generator was; and another dropout seed would show."""
    torch.rand(17)
    train(tmp_path)
    assert_same(resume_file(tmp_path), resume_file(whole))


@pytest.mark.parametrize("cut", [2, 4, 6])
def test_a_resumed_run_equals_an_uninterrupted_one(whole: Path, tmp_path: Path, cut) -> None:
    train(tmp_path, max_steps=cut)
    assert resume_file(tmp_path)["state"]["step"] == cut
    best = train(tmp_path, resume=True)
    assert_same(resume_file(tmp_path), resume_file(whole))
    assert (tmp_path / "log.csv").read_text() == (whole / "log.csv").read_text()
    assert best == resume_file(whole)["state"]["best"]


def test_worker_processes_change_nothing(whole: Path, tmp_path: Path) -> None:
    train(tmp_path, max_steps=4)
    train(tmp_path, resume=True, changes={"workers": 1})
    assert_same(resume_file(tmp_path), resume_file(whole))


def test_dropout_takes_part_in_the_comparison(whole: Path, tmp_path: Path) -> None:
    train(tmp_path, dropout=0.0)
    with pytest.raises(AssertionError):
        assert_same(resume_file(tmp_path)["model"], resume_file(whole)["model"])


def test_resuming_a_finished_run_does_nothing(whole: Path, tmp_path: Path) -> None:
    train(tmp_path)
    before = resume_file(tmp_path)
    assert train(tmp_path, resume=True, progress=lambda p: pytest.fail("no step is left")) == before["state"]["best"]
    assert_same(resume_file(tmp_path), before)


def test_a_time_limit_leaves_a_resume_file(whole: Path, tmp_path: Path) -> None:
    train(tmp_path, time_limit_min=0)
    assert resume_file(tmp_path)["state"]["step"] == 1
    train(tmp_path, resume=True)
    assert_same(resume_file(tmp_path)["model"], resume_file(whole)["model"])


def test_a_second_ctrl_c_within_a_step_saves_nothing_half_done(whole: Path, tmp_path: Path, monkeypatch) -> None:
    """Adam has made the step, the averages have not: what is resumed from is the file before."""
    update, calls = EMA.update, []

    def interrupted(self: EMA, model: nn.Module) -> None:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        update(self, model)

    monkeypatch.setattr(EMA, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path)
    assert resume_file(tmp_path)["state"]["step"] == 4  # that of the last validation
    monkeypatch.undo()
    train(tmp_path, resume=True)
    assert_same(resume_file(tmp_path), resume_file(whole))


@pytest.mark.parametrize("step", [1, 5])
def test_ctrl_c_leaves_a_model_and_a_resume_file(whole: Path, tmp_path: Path, step) -> None:
    saved: list[int] = []

    def interrupt(progress: Progress) -> None:
        if progress.step == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, progress=interrupt, save=lambda model, step, numbers: saved.append(step))
    assert resume_file(tmp_path)["state"]["step"] == step
    assert saved, "before the first validation the interrupted weights are the model"
    train(tmp_path, resume=True)
    assert_same(resume_file(tmp_path), resume_file(whole))
    assert (tmp_path / "log.csv").read_text() == (whole / "log.csv").read_text()


def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_resume_file(tmp_path: Path) -> None:
    with pytest.raises(MedsegError, match=r"the loss became nan .*at step 3: lower training\.learning_rate"):
        train(tmp_path, poisoned_at=4)
    content = resume_file(tmp_path)
    assert content["state"]["step"] == 2
    assert all(bool(value.isfinite().all()) for value in content["model"].values())


def test_a_killed_run_resumes_where_it_was(whole: Path, tmp_path: Path) -> None:
    process = start(f"train_slowly({str(tmp_path)!r})")
    limit = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < limit:
        if len(Checkpoints(tmp_path).files()) > 1:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL, errors
    assert 2 <= resume_file(tmp_path)["state"]["step"] < 8
    train(tmp_path, resume=True)
    assert_same(resume_file(tmp_path), resume_file(whole))
    assert (tmp_path / "log.csv").read_text() == (whole / "log.csv").read_text()
