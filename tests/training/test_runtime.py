"""Several processes train as one, and a failure stays that of its process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed

from medseg_diffusion.errors import MedsegError
from medseg_diffusion.training.history import read_history
from medseg_diffusion.training.runtime import Runtime
from tests.helpers.training import (
    Regression,
    assert_same,
    finish,
    free_port,
    resume_file,
    rows,
    start,
    start_two,
    train,
)


@pytest.mark.parametrize("changes", ["", "examples_at_once=1, read_every=3"])
def test_two_processes_train_as_one(tmp_path: Path, changes: str) -> None:
    """Each takes half of every batch, at once or in parts; the gradients are averaged, so weights agree to rounding."""
    processes = start_two(f"train_without_dropout({str(tmp_path / 'two')!r}, {changes})")
    train(tmp_path / "one", dropout=0.0)
    finish(processes)
    one, two = resume_file(tmp_path / "one"), resume_file(tmp_path / "two")
    assert two["state"]["step"] == 8
    for part in ("model", "ema"):
        weights = [{k: v for k, v in content[part].items() if k != "calls"} for content in (two, one)]
        torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)
    losses = [read_history(tmp_path / name).loss for name in ("two", "one")]
    assert len(losses[0]) == 8
    np.testing.assert_allclose(*losses, rtol=1e-5)
    assert_same(*(torch.load(tmp_path / "two" / f"{rank}.pt", weights_only=True) for rank in (0, 1)))


@pytest.mark.parametrize(
    "changes", [pytest.param({}, marks=pytest.mark.slow), {"examples_at_once": 1, "read_every": 3}]
)
def test_processes_that_share_the_weights_out_train_as_one(tmp_path: Path, changes: dict[str, int]) -> None:
    """Stopped in between; each holds a half of every layer, and the resume file is that of one process."""
    run = tmp_path / "two"
    finish(start_two(f"train_sharded({str(run)!r}, max_steps=5, changes={changes})"))
    finish(start_two(f"train_sharded({str(run)!r}, resume=True, changes={changes})"))
    train(tmp_path / "one", dropout=0.0)
    one, two = resume_file(tmp_path / "one"), resume_file(run)
    assert two["state"]["step"] == 8
    assert [int((run / f"{rank}.txt").read_text()) for rank in (0, 1)] == [8 * 5 + 17, 8 * 5]  # one row is not halved
    moments = [content["optimizers"][0]["state"] for content in (two, one)]
    for i in range(4):
        torch.testing.assert_close(moments[0][i], moments[1][i], rtol=1e-5, atol=1e-6)
    for part in ("model", "ema"):
        weights = [{k: v for k, v in content[part].items() if k != "calls"} for content in (two, one)]
        torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)
    two_losses, one_losses = (read_history(folder).loss for folder in (run, tmp_path / "one"))
    assert len(two_losses) == 8
    np.testing.assert_allclose(two_losses, one_losses, rtol=1e-5)
    train(run, dropout=0.0, resume=True, changes={"max_steps": 9})
    train(tmp_path / "one", dropout=0.0, resume=True, changes={"max_steps": 9})
    assert rows(run)[-1]["step"] == "9"
    assert float(rows(run)[-1]["score"]) == pytest.approx(float(rows(tmp_path / "one")[-1]["score"]), rel=1e-4)


@pytest.mark.filterwarnings("ignore:the loss or its gradient is not finite")
def test_all_processes_skip_the_same_steps(tmp_path: Path) -> None:
    """Also when only one of them has a bad loss, whose gradient is good."""
    finish(start_two(f"train_with_an_infinite_loss_in_one_process({str(tmp_path / 'two')!r})"))

    def poison(model: Regression) -> None:
        model.poison = lambda loss: loss + float("inf")

    train(tmp_path / "one", dropout=0.0, poisoned=[3], prepare=poison)
    one, two = resume_file(tmp_path / "one"), resume_file(tmp_path / "two")
    assert one["state"]["skipped"] == two["state"]["skipped"] == 1
    weights = [{k: v for k, v in content["model"].items() if k != "calls"} for content in (two, one)]
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)


def test_a_process_ends_well_while_the_threads_of_its_group_are_at_work() -> None:
    """It would abort after all its work was done, and the training would count as failed."""
    processes = start_two("leave_while_tensors_are_exchanged()")
    finish(processes)
    assert [process.returncode for process in processes] == [0, 0]  # not -6


def test_a_process_alone_initialises_nothing_distributed(tmp_path: Path) -> None:
    train(tmp_path, max_steps=1)
    assert not torch.distributed.is_initialized()


def test_a_batch_that_processes_cannot_share_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Runtime, "world_size", property(lambda self: 3))
    with pytest.raises(MedsegError, match="batch_size 4 must be a multiple of the 3 processes"):
        train(tmp_path)


def test_a_process_alone_keeps_its_own_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that fails is no other process that ended."""

    def fails(*args: Any, **options: Any) -> None:
        raise RuntimeError("the device failed")

    runtime = Runtime("cpu", "fp32")
    monkeypatch.setattr(runtime.accelerator, "wait_for_everyone", fails)
    with pytest.raises(RuntimeError, match="the device failed"):
        runtime.wait()


def test_a_process_that_misses_one_that_has_ended_waits_for_the_end_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one has the error that is told, and ends with its exit code."""

    def fails(*args: Any, **options: Any) -> None:
        raise RuntimeError("Connection closed by peer\nmore")

    waited: list[float] = []
    monkeypatch.setattr(torch.distributed, "init_process_group", fails)
    monkeypatch.setattr("medseg_diffusion.training.runtime.time.sleep", waited.append)
    store = torch.distributed.TCPStore("127.0.0.1", int(free_port()), 1, True)
    monkeypatch.setattr("medseg_diffusion.training.runtime.rendezvous", lambda *a, **b: iter([(store, 0, 2)]))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(MedsegError, match=r"another process ended early \(Connection closed by peer\)"):
        Runtime("cpu", "fp32")
    assert waited == [15.0]


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_process_does_not_wait_for_days_for_one_that_never_starts(rank: str) -> None:
    """As where the address of the first process is wrong, or a node of a cluster has failed."""
    port = free_port()
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    process = start("wait_for_the_others(0.02)", RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", **place)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors[-2000:]
    assert f"not all 2 processes came to 127.0.0.1:{port} within 0.02 minutes: start all of them" in errors
