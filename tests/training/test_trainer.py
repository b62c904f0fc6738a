"""The training loop: averaging, learning rate, data order, and above all interruptions that change nothing."""

from __future__ import annotations

import csv
import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from medseg_diffusion import build
from medseg_diffusion.config.load import load_segmenter_config
from medseg_diffusion.config.segmenter import SegmenterConfig
from medseg_diffusion.data.draws import Draws
from medseg_diffusion.device import autocast_dtype, choose_device
from medseg_diffusion.errors import InputError, MedsegError, ModelError, UsageError
from medseg_diffusion.models.segmenter import restore_segmenter
from medseg_diffusion.models.store import load_model_files
from medseg_diffusion.training.ema import EMA
from medseg_diffusion.training.interrupt import Interrupt
from medseg_diffusion.training.runtime import Runtime
from medseg_diffusion.training.trainer import Callbacks, Progress, TrainingOptions, TrainingRun, fit, learning_rate
from medseg_diffusion.workflows.train_segmenter import train_segmenter


class Points:
    """Five noisy points of a plane: examples that use the generator that they are given."""

    def __len__(self) -> int:
        return 5

    def example(self, index: int, generator: torch.Generator) -> Mapping[str, Tensor]:
        x = torch.randn(4, generator=torch.Generator().manual_seed(index))
        return {"x": x + 0.1 * torch.randn(4, generator=generator), "y": x.sum()[None], "index": torch.tensor(index)}


class Regression(nn.Module):
    """A small network with dropout and a buffer: (batch) -> mean square error."""

    calls: Tensor

    def __init__(self, dropout: float = 0.5) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 16), nn.SiLU(), nn.Dropout(dropout), nn.Linear(16, 1))
        self.register_buffer("calls", torch.zeros(()))
        self.poisoned_at = -1

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        self.calls += 1
        loss = (self.layers(batch["x"]) - batch["y"]).square().mean()
        return loss * float("nan") if int(self.calls) == self.poisoned_at else loss


OPTIONS = TrainingOptions(
    batch_size=4,
    max_steps=8,
    learning_rate=1e-2,
    warmup_steps=3,
    ema_decay=0.9,
    validate_every=2,
    checkpoint_minutes=60,
)


def train(
    run: Path,
    *,
    dropout: float = 0.5,
    progress: Callable[[Progress], None] = lambda progress: None,
    save: Callable[[nn.Module, int, Mapping[str, float]], None] = lambda model, step, numbers: None,
    poisoned_at: int = -1,
    changes: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> dict[str, float]:
    """`fit` on the points, always from the same start."""
    torch.manual_seed(0)
    model = Regression(dropout)
    model.poisoned_at = poisoned_at
    batch = {"x": torch.eye(4), "y": torch.ones(4, 1)}

    def validate(averaged: nn.Module) -> dict[str, float]:
        with torch.no_grad():
            return {"score": -float(averaged(batch))}

    options = TrainingOptions(**{**vars(OPTIONS), **(changes or {})})
    callbacks = Callbacks(validate, save, progress)
    started = TrainingRun(run, seed=1, **arguments)
    return fit(model, Draws(Points(), 3), options, callbacks, started, Runtime("cpu", "fp32"))


def resume_file(run: Path) -> dict[str, Any]:
    return torch.load(run / "checkpoints" / "last.pt", weights_only=True)


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def assert_same(a: Any, b: Any) -> None:
    """The same nested content, bit for bit."""
    if isinstance(a, Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, Mapping):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


@pytest.fixture(scope="module", autouse=True)
def _denormals() -> Iterator[None]:
    """`Runtime` flushes denormal numbers in the whole process: the other tests want them back."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps without interruption."""
    run = tmp_path_factory.mktemp("whole")
    train(run)
    return run


# ---- parts -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_average_warms_up() -> None:
    """min(decay, (1 + n) / (10 + n)) at the n-th update, and buffers are copied."""
    model: Any = nn.BatchNorm1d(1)
    ema = EMA(model, decay=0.4)
    averaged: Any = ema.module
    assert not averaged.training and not any(p.requires_grad for p in ema.module.parameters())
    expected = float(model.weight)
    for n in range(1, 12):
        model.weight.fill_(float(n))
        model.running_mean.fill_(float(-n))
        ema.update(model)
        decay = min(0.4, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * n
        assert float(averaged.weight) == pytest.approx(expected, rel=1e-5)
        assert float(averaged.running_mean) == -n
    assert ema.updates == 11


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0])
def test_an_average_that_never_moves_is_refused(decay) -> None:
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\)"):
        EMA(nn.Linear(1, 1), decay)


def test_the_learning_rate_warms_up_and_decays_to_zero() -> None:
    options = TrainingOptions(learning_rate=2.0, warmup_steps=10, max_steps=110)
    rates = [learning_rate(step, options) for step in range(111)]
    assert rates[:3] == pytest.approx([0.2, 0.4, 0.6])
    assert rates[9] == rates[10] == 2.0
    assert rates[60] == pytest.approx(2 * 0.5**0.9)
    assert rates[110] == 0 and all(a > b for a, b in pairwise(rates[10:]))
    assert learning_rate(0, TrainingOptions(warmup_steps=0)) == TrainingOptions().learning_rate
    assert learning_rate(0, TrainingOptions(warmup_steps=5, max_steps=5)) > 0


def test_every_epoch_of_draws_is_a_permutation() -> None:
    draws = Draws(Points(), seed=0)
    epochs = [[int(draws[5 * epoch + i]["index"]) for i in range(5)] for epoch in range(6)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1, "epochs are shuffled anew"


def test_a_draw_depends_on_its_number_and_the_seed_alone() -> None:
    draws, again = Draws(Points(), seed=0), Draws(Points(), seed=0)
    torch.manual_seed(5)
    first = {n: draws[n] for n in (0, 7, 23)}
    torch.manual_seed(6)
    for n in (23, 0, 7):
        assert_same(first[n], again[n])
    same_index = [n for n in range(25) if int(draws[n]["index"]) == int(draws[0]["index"])]
    assert len(same_index) == 5
    assert len({int(draws[n]["seed"]) for n in range(25)}) == 25, "every draw has its own seed for times and noise"
    assert len({float(draws[n]["x"][0]) for n in same_index}) == 5, "augmentation differs between epochs"
    other = Draws(Points(), seed=1)
    assert [int(other[n]["seed"]) for n in range(5)] != [int(draws[n]["seed"]) for n in range(5)]


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta", "xpu"])
def test_a_device_that_is_not_there_is_refused(name) -> None:
    with pytest.raises(UsageError, match=name):
        choose_device(name)


def test_precision_is_that_asked_for() -> None:
    cpu = choose_device("cpu")
    assert autocast_dtype(cpu, "fp32") is None
    assert autocast_dtype(cpu, "bf16") is torch.bfloat16


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


def test_nothing_to_resume_from_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"last\.pt: found no resume file.*drop --resume"):
        train(tmp_path, resume=True)


@pytest.mark.parametrize("damage", ["truncated", "empty", "other model"])
def test_an_unusable_resume_file_is_refused(whole: Path, tmp_path: Path, damage) -> None:
    target = tmp_path / "checkpoints" / "last.pt"
    target.parent.mkdir()
    content = (whole / "checkpoints" / "last.pt").read_bytes()
    if damage == "other model":
        other = resume_file(whole)
        other["model"].popitem()
        torch.save(other, target)
    else:
        target.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
    with pytest.raises(InputError, match=r"last\.pt: found an unusable resume file"):
        train(tmp_path, resume=True)


# ---- processes -------------------------------------------------------------------------------------------------------


def start(call: str, **environment: str) -> subprocess.Popen[str]:
    """A Python process that runs ``call`` with this file imported."""
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_trainer as T; T.{call}"
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def start_two(call: str) -> list[subprocess.Popen[str]]:
    """Two processes that know of each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [start(call, RANK=rank, LOCAL_RANK=rank, **shared) for rank in ("0", "1")]


def finish(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors[-2000:]


def train_slowly(run: str) -> None:
    """Writes a resume file after every step, and takes its time."""
    train(Path(run), progress=lambda progress: time.sleep(0.1), changes={"checkpoint_minutes": 1e-9})


def test_a_killed_run_resumes_where_it_was(whole: Path, tmp_path: Path) -> None:
    process = start(f"train_slowly({str(tmp_path)!r})")
    target, limit = tmp_path / "checkpoints" / "last.pt", time.monotonic() + 120
    while process.poll() is None and time.monotonic() < limit:
        if target.is_file() and resume_file(tmp_path)["state"]["step"] >= 3:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL, errors
    assert 3 <= resume_file(tmp_path)["state"]["step"] < 8
    train(tmp_path, resume=True)
    assert_same(resume_file(tmp_path), resume_file(whole))
    assert (tmp_path / "log.csv").read_text() == (whole / "log.csv").read_text()


def train_without_dropout(run: str) -> None:
    train(Path(run), dropout=0.0)


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
    monkeypatch.setattr(runtime.accelerator, "reduce", fails)
    with pytest.raises(RuntimeError, match="the device failed"):
        runtime.mean(torch.zeros(()))


# ---- a whole segmenter -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six small scans with a bright block, and its mask."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for part in ("images", "labels"):
        (folder / part).mkdir()
    for i in range(6):
        label = np.zeros((9, 8, 8), np.uint8)
        label[2 : 5 + i % 3, 2:6, 3:7] = 1
        image = label + 0.2 * generator.standard_normal(label.shape)
        nib.save(nib.Nifti1Image(image.astype(np.float32), np.eye(4)), folder / "images" / f"case{i}.nii.gz")
        nib.save(nib.Nifti1Image(label, np.eye(4)), folder / "labels" / f"case{i}.nii.gz")
    return folder


def config(**training: Any) -> SegmenterConfig:
    return SegmenterConfig.model_validate(
        {
            "method": "ensemdiff",
            "data": {"window": [8, 8, 8], "labels": ["block"], "test_cases": 1, "validation_cases": 1},
            "network": {"channels": 8, "channel_mult": [1, 2], "patch_size": 2, "dropout": 0.1},
            "training": {"batch_size": 2, "max_steps": 4, "validate_every": 2, "precision": "fp32", **training},
            "inference": {"steps": 2},
        }
    )


def test_a_segmenter_trains_resumes_and_loads(folder: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train_segmenter(config(), folder, whole, device="cpu") == whole / "model"
    train_segmenter(config(), folder, parts, device="cpu", max_steps=2)
    train_segmenter(config(), folder, parts, device="cpu", resume=True)
    assert_same(resume_file(parts), resume_file(whole))
    saved = load_model_files(whole)
    model, restored = restore_segmenter(saved)
    assert restored == config() and saved.card["labels"] == {"0": "background", "1": "block"}
    best = load_model_files(parts).weights
    torch.testing.assert_close(dict(model.state_dict()), best, rtol=0, atol=0)
    split = yaml.safe_load((whole / "split.json").read_text())
    assert [len(split[side]) for side in ("train", "validation", "test")] == [4, 1, 1]
    with pytest.raises(UsageError, match="holds a run already; add --resume"):
        train_segmenter(config(), folder, whole, device="cpu")
    with pytest.raises(UsageError, match="was started with another training"):
        train_segmenter(config(learning_rate=1e-5), folder, whole, device="cpu", resume=True)
    # A run of a version that did not know every key yet went on as the defaults say, and with nothing else.
    content = yaml.safe_load((parts / "config.yaml").read_text())
    assert content["preprocessing"].pop("size", "missing") is None and content["augmentation"].pop("intensity") == 0.15
    assert content.pop("anchor_loss")
    (parts / "config.yaml").write_text(yaml.safe_dump(content))
    train_segmenter(config(), folder, parts, device="cpu", resume=True)
    other = config().model_copy(update={"augmentation": config().augmentation.model_copy(update={"intensity": 0.2})})
    with pytest.raises(UsageError, match="was started with another augmentation"):
        train_segmenter(other, folder, parts, device="cpu", resume=True)


def test_a_run_that_was_stopped_before_its_first_resume_file_starts_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its own configuration, which the refusal recommends."""
    run = tmp_path / "run"

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build, "segmenter", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train_segmenter(config(), folder, run, device="cpu", seed=3)
    with pytest.raises(UsageError, match=rf"resume with {run / 'config.yaml'} and seed 3, or use another folder"):
        train_segmenter(config(batch_size=1), folder, run, device="cpu", seed=3, resume=True)
    train_segmenter(load_segmenter_config(run / "config.yaml"), folder, run, device="cpu", seed=3, resume=True)
    assert resume_file(run)["state"]["step"] == 4
    (run / "checkpoints" / "last.pt").unlink()
    with pytest.raises(InputError, match="found no resume file"):
        train_segmenter(config(), folder, run, device="cpu", seed=3, resume=True)


def test_what_is_refused_before_the_training_can_be_started_again(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"

    def interrupt(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(InputError, match="no such folder"):
        train_segmenter(config(), tmp_path / "none", run, device="cpu")
    with pytest.raises(KeyboardInterrupt):
        train_segmenter(config(), folder, run, device="cpu", on_prepare=interrupt)
    train_segmenter(config(), folder, run, device="cpu")
    assert resume_file(run)["state"]["step"] == 4


def test_ctrl_c_that_comes_twice_at_once_is_one() -> None:
    """From the terminal and from the launcher: the resume file is to be written all the same."""
    interrupt = Interrupt()
    try:
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
        assert interrupt.requested
        interrupt.at -= 2
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        interrupt.restore()


def test_resuming_what_was_never_started_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no run; drop --resume to start it"):
        train_segmenter(config(), folder, tmp_path / "run", device="cpu", resume=True)
    assert not (tmp_path / "run").exists()


def train_segmenter_in(run: str, data: str) -> None:
    train_segmenter(config(), Path(data), Path(run), device="cpu")


def test_two_processes_train_a_segmenter(folder: Path, tmp_path: Path) -> None:
    """One of them makes the run folder and prepares the cases for both."""
    run = tmp_path / "run"
    finish(start_two(f"train_segmenter_in({str(run)!r}, {str(folder)!r})"))
    assert resume_file(run)["state"]["step"] == 4
    assert load_model_files(run).card["calibration"]["cases"] == 1
    assert not list(run.rglob("*.tmp"))


def test_a_run_does_not_go_on_with_cases_on_other_sides(folder: Path, tmp_path: Path) -> None:
    """Split anew, a case that was trained on might be tested on."""
    data, run = shutil.copytree(folder, tmp_path / "data"), tmp_path / "run"
    train_segmenter(config(), data, run, device="cpu", max_steps=2)
    before = (run / "split.json").read_text()
    name = json.loads(before)["test"][0]
    for part in ("images", "labels"):
        (data / part / f"{name}.nii.gz").rename(tmp_path / f"{part}.nii.gz")
    with pytest.raises(InputError, match="other cases than when the run was started"):
        train_segmenter(config(), data, run, device="cpu", resume=True)
    assert (run / "split.json").read_text() == before
    for part in ("images", "labels"):
        (tmp_path / f"{part}.nii.gz").rename(data / part / f"{name}.nii.gz")
    train_segmenter(config(), data, run, device="cpu", resume=True)


def test_validation_cases_without_the_class_leave_a_model(folder: Path, tmp_path: Path) -> None:
    data = shutil.copytree(folder, tmp_path / "data")
    train_segmenter(config(), data, tmp_path / "first", device="cpu", max_steps=2)
    for name in json.loads((tmp_path / "first" / "split.json").read_text())["validation"]:
        file = data / "labels" / f"{name}.nii.gz"
        nib.save(nib.Nifti1Image(np.zeros((9, 8, 8), np.uint8), np.eye(4)), file)
    run = train_segmenter(config(), data, tmp_path / "run", device="cpu")
    assert load_model_files(run).card["calibration"]["ece"] == [None, None]
    assert "from 1 validation cases" in (run / "README.md").read_text()


def test_ctrl_c_leaves_a_segmenter_that_can_be_used(folder: Path, tmp_path: Path) -> None:
    def interrupt(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_segmenter(config(), folder, tmp_path / "run", device="cpu", on_progress=interrupt)
    model, _ = restore_segmenter(load_model_files(tmp_path / "run"))
    assert not model.training
    assert resume_file(tmp_path / "run")["state"]["step"] == 1


def test_a_run_starts_from_the_weights_of_a_trained_model(folder: Path, tmp_path: Path) -> None:
    first = train_segmenter(config(), folder, tmp_path / "first", device="cpu")
    second = train_segmenter(config(learning_rate=1e-9), folder, tmp_path / "second", device="cpu", seed=1, init=first)
    before, after = load_model_files(first), load_model_files(second)
    for name, weights in before.weights.items():
        torch.testing.assert_close(after.weights[name], weights, rtol=1e-3, atol=1e-6)
    sums = (first / "SHA256SUMS").read_text()
    assert after.card["training"]["init"]["model"] == str(first)
    assert after.card["training"]["init"]["sha256"] in sums
    # What it started from is not forgotten when it goes on, nor needed.
    content = yaml.safe_load((tmp_path / "second" / "config.yaml").read_text())
    assert content["init"] == after.card["training"]["init"]
    half = tmp_path / "half"
    train_segmenter(config(), folder, half, device="cpu", seed=1, init=first, max_steps=2)
    (half / "checkpoints" / "last.pt").rename(half / "kept.pt")
    started = restore_segmenter(load_model_files(first))[0].state_dict()
    seen: list[dict[str, torch.Tensor]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "medseg_diffusion.training.job.fit",
            lambda model, *a, **k: seen.append(dict(model.state_dict())),
        )
        train_segmenter(load_segmenter_config(half / "config.yaml"), folder, half, device="cpu", seed=1, resume=True)
    for name, weights in started.items():
        torch.testing.assert_close(seen[0][name], weights)
    (half / "kept.pt").rename(half / "checkpoints" / "last.pt")
    moved = first.rename(tmp_path / "elsewhere")
    again = train_segmenter(config(), folder, half, device="cpu", seed=1, resume=True)
    assert load_model_files(again).card["training"]["init"]["model"] == str(first)
    first = moved
    wider = config().model_copy(update={"network": config().network.model_copy(update={"channels": 16})})
    with pytest.raises(ModelError, match="its network is not that of the configuration"):
        train_segmenter(wider, folder, tmp_path / "third", device="cpu", init=first)


def latent_config() -> SegmenterConfig:
    content = config().model_dump(mode="json")
    content |= {
        "method": "latent-mask",
        "mask_autoencoder": {"latent_channels": 2, "channels": [32, 32], "max_steps": 6},
    }
    return SegmenterConfig.model_validate(content)


def test_latent_mask_diffusion_trains_its_autoencoder_first_and_states_its_ceiling(
    folder: Path, tmp_path: Path
) -> None:
    settings = latent_config()
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_segmenter(settings, folder, whole, device="cpu")
    saved = load_model_files(whole)
    ceiling = saved.card["metrics"]["autoencoder's ceiling"]
    assert set(ceiling) == {"block"} and 0 <= ceiling["block"] <= 1
    first = load_model_files(whole / "autoencoder")
    for name, value in first.weights.items():
        torch.testing.assert_close(saved.weights[f"autoencoder.{name}"], value, rtol=0, atol=0)
    assert not torch.equal(first.weights["codec.scale"], torch.ones(2)), "latents are standardised"
    train_segmenter(settings, folder, parts, device="cpu", max_steps=2)
    assert resume_file(parts / "autoencoder")["state"]["step"] == 6 and resume_file(parts)["state"]["step"] == 2
    train_segmenter(settings, folder, parts, device="cpu", resume=True)
    assert_same(resume_file(parts / "autoencoder"), resume_file(whole / "autoencoder"))
    assert_same(resume_file(parts), resume_file(whole))
    late = tmp_path / "late"
    assert train_segmenter(settings, folder, late, device="cpu", time_limit_min=0) == late / "autoencoder" / "model"
    assert not (late / "model").exists(), "nothing is built on an autoencoder that is not trained"
    train_segmenter(settings, folder, late, device="cpu", resume=True)
    again = load_model_files(late).weights
    for name, value in load_model_files(late / "autoencoder").weights.items():
        torch.testing.assert_close(again[f"autoencoder.{name}"], value, rtol=0, atol=0)
    model, _ = restore_segmenter(saved)
    image = torch.rand(1, 1, 9, 8, 7)
    sampled = model.probabilities(image, [[1, 2]], build.sampler("ddim"), [1000, 500, 0])
    assert sampled.shape == (1, 2, 2, 9, 8, 7)
    torch.testing.assert_close(sampled.sum(2), torch.ones(1, 2, 9, 8, 7))


@pytest.mark.parametrize("method", ["latent-mask", "baseline"])
def test_steps_that_fit_into_a_time_are_found(method, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Validations and calibration count: what a step alone would leave room for is too much."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    equal_time: Any = importlib.import_module("equal_time")
    for name, value in (("WARM", 1), ("TIMED", 4), ("TIMED_AUTOENCODER", 5)):
        monkeypatch.setattr(equal_time, name, value)
    settings = latent_config() if method == "latent-mask" else config().model_copy(update={"method": method})

    def measured(seconds: float) -> Callable[[Any, int], float]:
        return lambda stopwatch, max_steps: seconds if len(stopwatch.at[max_steps]) > 1 else 0.0

    monkeypatch.setattr(equal_time.Stopwatch, "seconds_per_step", measured(0.1))
    monkeypatch.setattr(equal_time.Stopwatch, "seconds_per_validation", measured(1.0))
    first = 0.1 * settings.mask_autoencoder.max_steps if method == "latent-mask" else 0.0
    calibration = 5 if method == "latent-mask" else 1  # members
    expected = (0.95 * 120 - first - (6 + calibration)) / 0.1
    assert equal_time.fitting_steps(settings, folder, minutes=2) == pytest.approx(expected, abs=1)
    assert equal_time.fitting_steps(settings, folder, minutes=0.01) == 1
