"""The training loop: learning rate, logs, and above all interruptions that change nothing."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Mapping
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medseg_diffusion.device import process_bytes
from medseg_diffusion.errors import MedsegError
from medseg_diffusion.metrics.training_history import THROUGHPUT
from medseg_diffusion.training import readings
from medseg_diffusion.training.batches import Batches
from medseg_diffusion.training.ema import EMA
from medseg_diffusion.training.health import SKIPPED_IN_A_ROW, StepNumbers
from medseg_diffusion.training.history import read_history
from medseg_diffusion.training.log import TrainingLog
from medseg_diffusion.training.readings import Readings
from medseg_diffusion.training.resume import Checkpoints
from medseg_diffusion.training.runtime import Runtime
from medseg_diffusion.training.trainer import (
    Decay,
    Progress,
    TrainingOptions,
    TrainingRun,
    _initial_state,
    _step,
    learning_rate,
)
from tests.helpers.training import assert_same, resume_file, rows, scores, start, train


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
    assert (tmp_path / "steps.csv").is_file()


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
    assert scores(tmp_path) == scores(whole)
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

    def interrupted(self: EMA, model: nn.Module, taken: Tensor) -> None:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        update(self, model, taken)

    monkeypatch.setattr(EMA, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path)
    assert resume_file(tmp_path)["state"]["step"] == 4  # that of the last validation
    monkeypatch.undo()
    train(tmp_path, resume=True)
    assert_same(resume_file(tmp_path), resume_file(whole))


def test_a_second_ctrl_c_while_examples_are_awaited_loses_no_step(whole: Path, tmp_path: Path, monkeypatch) -> None:
    """They may take long, and the step before is whole."""
    following, calls = Batches.__next__, []

    def interrupted(self: Batches) -> Mapping[str, Tensor]:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return following(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Batches, "__next__", interrupted)
        train(tmp_path)
    assert resume_file(tmp_path)["state"]["step"] == 5
    train(tmp_path, resume=True)
    assert_same(resume_file(tmp_path), resume_file(whole))


def test_a_second_ctrl_c_while_steps_are_logged_leaves_no_gap(whole: Path, tmp_path: Path, monkeypatch) -> None:
    """Neither in the log nor in the smoothed loss: steps that are not wholly logged are repeated."""
    log = TrainingLog.step

    def interrupted(self: TrainingLog, step: int, *numbers: float) -> None:
        if step == 5:
            raise KeyboardInterrupt
        log(self, step, *numbers)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrainingLog, "step", interrupted)
        train(tmp_path)
    train(tmp_path, resume=True)
    assert_same(resume_file(tmp_path), resume_file(whole))
    assert read_history(tmp_path).steps.tolist() == list(range(1, 9))


def test_a_second_ctrl_c_while_the_best_model_is_written_loses_no_model(tmp_path: Path) -> None:
    """The resumed run repeats the validation, and writes the model again."""
    expected: list[tuple[int, Mapping[str, float]]] = []
    train(tmp_path / "whole", save=lambda model, step, numbers: expected.append((step, numbers)))
    saved: list[tuple[int, Mapping[str, float]]] = []

    def save(model: nn.Module, step: int, numbers: Mapping[str, float]) -> None:
        saved.append((step, numbers))
        if len(saved) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", save=save)
    saved.clear()
    saved.append(expected[0])  # so that nothing is interrupted any more
    train(tmp_path / "cut", save=save, resume=True)
    assert saved[1:] == expected


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
    assert scores(tmp_path) == scores(whole)


# ---- losses that are not finite --------------------------------------------------------------------------------------


def test_a_step_with_a_loss_that_is_not_finite_is_skipped_on_the_device(tmp_path: Path) -> None:
    """Weights, moments and averages stay as they are, and one warning names the step."""
    with pytest.warns(UserWarning, match="not finite at step 4, which is skipped .loss nan.*learning rate 0.01, fp32"):
        train(tmp_path, poisoned=[4], max_steps=4)
    train(tmp_path / "before", max_steps=3)
    after, before = resume_file(tmp_path), resume_file(tmp_path / "before")
    for content in (before, after):
        content["model"].pop("calls")
        content["ema"].pop("calls")
        content["optimizers"][0].pop("param_groups")  # the learning rate is that of the next step
    for part in ("model", "ema", "optimizers"):
        assert_same(after[part], before[part])
    assert (after["state"]["skipped"], after["state"]["skipped_in_a_row"]) == (1, 1)
    assert after["state"]["loss"] == before["state"]["loss"]


@pytest.mark.filterwarnings("ignore:the loss or its gradient is not finite")
def test_a_run_resumes_bit_exactly_after_skipped_steps(tmp_path: Path) -> None:
    train(tmp_path / "whole", poisoned=[1, 4, 5])
    train(tmp_path / "cut", poisoned=[1, 4, 5], max_steps=4)
    train(tmp_path / "cut", poisoned=[1, 4, 5], resume=True)
    assert resume_file(tmp_path / "whole")["state"]["skipped"] == 3
    assert_same(resume_file(tmp_path / "cut"), resume_file(tmp_path / "whole"))
    assert [row["skipped_steps"] for row in rows(tmp_path / "cut")] == ["1", "2", "3", "3"]
    assert scores(tmp_path / "cut") == scores(tmp_path / "whole")


@pytest.mark.filterwarnings("ignore:the loss or its gradient is not finite")
@pytest.mark.parametrize("read_every", [1, 7])
def test_a_run_ends_after_many_skipped_steps_and_spares_its_model(tmp_path: Path, read_every: int) -> None:
    saved: list[int] = []
    changes = {"max_steps": 60, "validate_every": 60, "read_every": read_every, "checkpoint_minutes": 1e-9}
    message = (
        f"not finite since step 11: the last {SKIPPED_IN_A_ROW} steps were skipped "
        ".loss nan, gradient norm nan, learning rate 0.0.*, fp32.; lower training.learning_rate. The last model"
    )
    with pytest.raises(MedsegError, match=message):
        train(
            tmp_path,
            poisoned=range(11, 99),
            changes=changes,
            save=lambda model, step, numbers: saved.append(step),
        )
    content = resume_file(tmp_path)
    assert 10 <= content["state"]["step"] < 11 + SKIPPED_IN_A_ROW and not saved
    train(tmp_path / "before", changes={"max_steps": 60}, max_steps=10)
    weights = [one["model"]["layers.0.weight"] for one in (content, resume_file(tmp_path / "before"))]
    assert torch.equal(*weights)


# ---- reading the device ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:the loss or its gradient is not finite")
def test_how_often_the_device_is_read_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither weights nor logged losses, also where steps are skipped; and it is read as seldom as asked for."""
    monkeypatch.setattr(readings, "LONGEST_S", 1e9)
    read, lengths = Readings.read, []

    def counted(self: Readings) -> list[StepNumbers]:
        numbers = read(self)
        lengths.append(len(numbers))
        return numbers

    monkeypatch.setattr(Readings, "read", counted)
    changes = {"max_steps": 24, "validate_every": 24}
    for every in (1, 7):
        train(tmp_path / str(every), poisoned=[5, 6, 20], changes={**changes, "read_every": every})
    assert lengths == [1] * 24 + [1, 6, 7, 7, 3]  # the first step is read at once
    assert_same(resume_file(tmp_path / "1"), resume_file(tmp_path / "7"))
    one, seven = read_history(tmp_path / "1"), read_history(tmp_path / "7")
    assert len(seven.loss) == 24
    np.testing.assert_array_equal(one.loss, seven.loss)
    np.testing.assert_array_equal(one.gradient_norm, seven.gradient_norm)
    assert scores(tmp_path / "1") == scores(tmp_path / "7")
    assert (seven.step_seconds[1:] > 0).all(), "steps that are read together share the time that they took"


def test_the_log_has_the_speed(tmp_path: Path) -> None:
    shown: list[Progress] = []
    train(tmp_path, progress=shown.append)
    for row in rows(tmp_path):
        numbers = {name: float(row[name]) for name in THROUGHPUT if name != "flop_utilisation"}
        assert numbers["examples_per_s"] == pytest.approx(4 / numbers["seconds_per_step"], rel=1e-4)
        assert 0 <= numbers["waiting"] < 1 and numbers["peak_memory_gb"] > 0.05 and numbers["skipped_steps"] == 0
        # Two layers, 4 x 16 and 16 x 1, of 2 operations a weight; backward passes count twice.
        by_hand = 3 * 2 * 4 * (4 * 16 + 16)
        assert numbers["tflop_per_s"] == pytest.approx(by_hand / 1e12 / numbers["seconds_per_step"], rel=1e-3)
    assert all("flop_utilisation" not in row for row in rows(tmp_path)), "the peak of a CPU is not known"
    assert shown[-1].examples_per_s > 0 and 0 <= shown[-1].waiting < 1


def test_the_start_of_the_workers_is_no_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first batch comes only when they run, which takes seconds and belongs to no step."""
    start_workers = Batches.__init__

    def slow(self: Batches, *arguments: Any) -> None:
        start_workers(self, *arguments)
        self.waited = 1000.0

    monkeypatch.setattr(Batches, "__init__", slow)
    train(tmp_path)
    assert all(float(row["waiting"]) < 1 for row in rows(tmp_path))


@pytest.mark.slow
def test_ten_thousand_steps_do_not_take_more_memory(tmp_path: Path) -> None:
    taken: dict[int, int] = {}

    def look(progress: Progress) -> None:
        if progress.step in (1000, 10_000):
            taken[progress.step] = process_bytes()

    train(tmp_path, progress=look, changes={"max_steps": 10_000, "validate_every": 10_000, "read_every": 97})
    assert taken[10_000] - taken[1000] < 10e6


# ---- a batch in parts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [1, 3, 4, 9])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(tmp_path: Path, at_once: int) -> None:
    """Parts of unequal size as well: with 3 at once, the last of 4 examples is a part of its own."""
    train(tmp_path / "whole", dropout=0.0)
    train(tmp_path / "parts", dropout=0.0, changes={"examples_at_once": at_once})
    whole, parts = resume_file(tmp_path / "whole"), resume_file(tmp_path / "parts")
    assert int(parts["model"]["calls"]) == 8 * math.ceil(4 / at_once)
    for part in ("model", "ema"):
        for content in (whole, parts):
            content[part].pop("calls")
        torch.testing.assert_close(parts[part], whole[part], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(read_history(tmp_path / "parts").loss, read_history(tmp_path / "whole").loss, rtol=1e-5)


class TwoNetworks(nn.Module):
    """Two networks with an optimiser and a clip each, and a loss that is the sum of both."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 1), nn.Linear(4, 1)

    def optimised_parts(self) -> list[list[nn.Parameter]]:
        return [list(self.first.parameters()), list(self.second.parameters())]

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        losses = [(network(batch["x"]) - batch["y"]).square().mean() for network in (self.first, self.second)]
        return losses[0] + 100 * losses[1]


def test_a_batch_in_parts_has_the_gradient_of_the_whole_for_each_network(tmp_path: Path) -> None:
    """Weights after some steps with clipped gradients, and the norms before clipping."""
    torch.manual_seed(0)
    start, runtime = TwoNetworks(), Runtime("cpu", "fp32")
    batch = {"x": torch.randn(7, 4), "y": torch.randn(7, 1), "seed": torch.arange(7)}
    results = []
    for at_once in (None, 3):
        options = TrainingOptions(batch_size=7, examples_at_once=at_once, gradient_clip=0.5)
        state = _initial_state(deepcopy(start), options, TrainingRun(tmp_path), runtime)
        for state.step in range(5):
            loss, norms = _step(state, batch, options, 0, runtime)
        results.append([loss, *norms, *state.model.parameters(), *state.ema.module.parameters()])
    assert 0.5 < float(results[0][1]) < float(results[0][2]) / 10, "both are clipped, by different factors"
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)


def test_a_batch_in_parts_resumes_bit_exactly_with_dropout(tmp_path: Path) -> None:
    train(tmp_path / "whole", changes={"examples_at_once": 3})
    train(tmp_path / "cut", changes={"examples_at_once": 3}, max_steps=3)
    train(tmp_path / "cut", changes={"examples_at_once": 3}, resume=True)
    assert_same(resume_file(tmp_path / "cut"), resume_file(tmp_path / "whole"))


# ---- kills -----------------------------------------------------------------------------------------------------------


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
    assert scores(tmp_path) == scores(whole)
