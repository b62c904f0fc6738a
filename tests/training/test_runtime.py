"""Several processes train as one, and a failure stays that of its process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from medseg_diffusion.errors import MedsegError
from medseg_diffusion.training.runtime import Runtime
from tests.helpers.training import finish, resume_file, start_two, train


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """Each takes half of every batch; the gradients are averaged, so weights agree to rounding."""
    processes = start_two(f"train_without_dropout({str(tmp_path / 'two')!r})")
    train(tmp_path / "one", dropout=0.0)
    finish(processes)
    one, two = resume_file(tmp_path / "one"), resume_file(tmp_path / "two")
    assert two["state"]["step"] == 8
    for part in ("model", "ema"):
        weights = [{k: v for k, v in content[part].items() if k != "calls"} for content in (two, one)]
        torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-6)
    assert two["state"]["loss"] == pytest.approx(one["state"]["loss"], rel=1e-4)


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
