"""Signals end a training once, whole and soon, however often they come."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from medseg_diffusion.errors import Stopped
from medseg_diffusion.training.batches import Batches
from medseg_diffusion.training.history import read_history
from medseg_diffusion.training.interrupt import PREEMPTIONS, Interrupt, stopped_by_signals
from medseg_diffusion.training.trainer import Progress
from tests.helpers.training import assert_same, finish, resume_file, rows, scores, start_two, train

ALL = [signal.SIGINT, *PREEMPTIONS]


def test_ctrl_c_that_comes_twice_at_once_is_one() -> None:
    """From the terminal and from the launcher: the resume file is to be written all the same."""
    interrupt = Interrupt()
    try:
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
        assert interrupt.requested == signal.SIGINT
        interrupt.at -= 2
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        interrupt.restore()


def test_a_scheduler_that_insists_does_not_cut_the_step_short() -> None:
    """SLURM sends SIGUSR1, and SIGTERM later; what saves the step then is only to finish it."""
    interrupt = Interrupt()
    try:
        for number in PREEMPTIONS * 2:
            signal.raise_signal(number)
            interrupt.at -= 2
        assert interrupt.requested == PREEMPTIONS[0]
    finally:
        interrupt.restore()


def test_the_handlers_of_before_come_back() -> None:
    before = [signal.getsignal(number) for number in ALL]
    Interrupt().restore()
    with pytest.raises(Stopped, match="SIGTERM: in the middle"), stopped_by_signals("in the middle"):
        signal.raise_signal(signal.SIGTERM)
    assert [signal.getsignal(number) for number in ALL] == before


# ---- in a training ---------------------------------------------------------------------------------------------------


def ended(number: signal.Signals) -> type[BaseException]:
    return KeyboardInterrupt if number == signal.SIGINT else Stopped


@pytest.mark.parametrize("number", ALL)
@pytest.mark.parametrize("step", [1, 2, 5])
def test_a_signal_ends_the_training_after_the_next_step(
    whole: Path, tmp_path: Path, number: signal.Signals, step: int
) -> None:
    """What is written is enough to go on as if nothing had happened, a validation that was due included."""

    def send(progress: Progress) -> None:
        if progress.step == step:
            signal.raise_signal(number)

    with pytest.raises(ended(number)) as caught:
        train(tmp_path, progress=send)
    if number != signal.SIGINT:
        assert str(caught.value) == f"{number.name}: stopped after step {step + 1} of 8, which is saved"
        assert isinstance(caught.value, Stopped) and caught.value.exit_code == 75
    assert resume_file(tmp_path)["state"]["step"] == step + 1
    train(tmp_path, resume=True)
    assert_same(resume_file(tmp_path), resume_file(whole))
    assert scores(tmp_path) == scores(whole)


@pytest.mark.parametrize("number", ALL)
@pytest.mark.parametrize("step", [2, 8])
def test_a_signal_during_a_validation_ends_it(
    whole: Path, tmp_path: Path, number: signal.Signals, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A validation may take minutes. The step before it is saved, and the resumed run validates it."""
    forward, after = nn.Module.__call__, []

    def send(self: nn.Module, *args: Any) -> Any:
        # Of the averaged model; its operations are counted on an example with a seed.
        if not self.training and "calls" in dict(self.named_buffers()) and "seed" not in args[0]:
            validations.append(1)
            if len(validations) == step // 2:
                os.kill(os.getpid(), number)
                after.append(1)
        return forward(self, *args)

    validations: list[int] = []
    with monkeypatch.context() as patch, pytest.raises(ended(number)):
        patch.setattr(nn.Module, "__call__", send)
        train(tmp_path)
    assert not after, "the validation went on"
    assert resume_file(tmp_path)["state"] | {"step": step} == resume_file(tmp_path)["state"]
    assert [row["step"] for row in rows(tmp_path)] == [str(n) for n in range(2, step, 2)] if step > 2 else True
    best = train(tmp_path, resume=True)
    assert best == resume_file(whole)["state"]["best"]
    assert_same(resume_file(tmp_path), resume_file(whole))
    assert scores(tmp_path) == scores(whole)


def test_a_signal_before_the_first_step_says_that_nothing_is_done(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers take seconds to start. Resuming starts the run again."""
    start_workers = Batches.__init__

    def send(self: Batches, *arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        start_workers(self, *arguments)

    (tmp_path / "config.yaml").touch()
    with monkeypatch.context() as patch, pytest.raises(Stopped, match=r"^SIGTERM: stopped before the first step$"):
        patch.setattr(Batches, "__init__", send)
        train(tmp_path)
    assert not (tmp_path / "checkpoints").exists()
    train(tmp_path, resume=True)
    assert_same(resume_file(tmp_path), resume_file(whole))


@pytest.mark.parametrize("number", PREEMPTIONS)
def test_a_signal_after_the_last_step_is_not_lost(whole: Path, tmp_path: Path, number: signal.Signals) -> None:
    """The training is complete; but what comes next, such as minutes of calibration, has to end."""

    def send(progress: Progress) -> None:
        if progress.step == 8:
            signal.raise_signal(number)

    with pytest.raises(Stopped, match="next"), stopped_by_signals("before what comes next"):
        train(tmp_path, progress=send)
    assert_same(resume_file(tmp_path), resume_file(whole))


@pytest.mark.slow
@pytest.mark.parametrize(("where", "step"), [("first", 2), ("step", 4), ("validation", 4), ("end", 8)])
def test_a_signal_to_one_of_two_processes_ends_both_at_one_step(tmp_path: Path, where: str, step: int) -> None:
    """Only the second one gets it: at its first step, in a step, while the main one validates, in the last step."""
    finish(start_two(f"train_with_a_signal_to_one_process({str(tmp_path)!r}, {where!r})"))
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)] == [
        f"{who}: stopped after step {step} of 8, which is saved" for who in ("a signal to another process", "SIGTERM")
    ]
    assert resume_file(tmp_path)["state"]["step"] == step
    train(tmp_path, dropout=0.0, resume=True)
    train(tmp_path / "one", dropout=0.0)
    assert resume_file(tmp_path)["state"]["step"] == 8
    assert [row["step"] for row in rows(tmp_path)] == ["2", "4", "6", "8"]
    assert read_history(tmp_path).steps.tolist() == list(range(1, 9))
    np.testing.assert_allclose(read_history(tmp_path).loss, read_history(tmp_path / "one").loss, rtol=1e-5)


def test_a_signal_while_the_model_is_written_waits_for_it(whole: Path, tmp_path: Path) -> None:
    written: list[int] = []

    def save(model: nn.Module, step: int, numbers: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        written.append(step)

    with pytest.raises(Stopped, match="stopped after step 2 of 8"):
        train(tmp_path, save=save)
    assert written == [2] and resume_file(tmp_path)["state"]["best"]["step"] == 2
    train(tmp_path, resume=True)
    assert_same(resume_file(tmp_path), resume_file(whole))


def test_worker_processes_outlive_the_signal(whole: Path, tmp_path: Path) -> None:
    """A signal to the whole process group, as srun sends it: the step at hand needs its examples."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        "from tests.helpers import training\n"
        "import os, signal\n"
        "if __name__ == '__main__':\n"
        "    def send(progress):\n"
        "        if progress.step == 3: os.killpg(0, signal.SIGUSR1)\n"
        f"    training.train(training.Path({str(tmp_path / 'run')!r}), progress=send, changes={{'workers': 1}})\n"
    )
    (tmp_path / "train.py").write_text(code)
    command = [sys.executable, str(tmp_path / "train.py")]
    done = subprocess.run(command, capture_output=True, text=True, start_new_session=True, timeout=120)
    assert "Stopped: SIGUSR1: stopped after step 4 of 8, which is saved" in done.stderr, done.stderr
    assert "DataLoader worker" not in done.stderr
    train(tmp_path / "run", resume=True)
    assert_same(resume_file(tmp_path / "run"), resume_file(whole))
