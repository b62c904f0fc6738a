"""Trainings that take a second: a regression on five points, and a segmenter of six scans."""

from __future__ import annotations

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from torch import Tensor, nn

from medseg_diffusion.config.segmenter import SegmenterConfig
from medseg_diffusion.data.draws import Draws
from medseg_diffusion.errors import Stopped
from medseg_diffusion.metrics.training_history import THROUGHPUT
from medseg_diffusion.training import sharding
from medseg_diffusion.training.resume import Checkpoints
from medseg_diffusion.training.runtime import Runtime
from medseg_diffusion.training.trainer import Callbacks, Progress, TrainingOptions, TrainingRun, fit
from medseg_diffusion.workflows.train_segmenter import train_segmenter

ROOT = Path(__file__).parents[2]
"""Of the repository: processes that tests start import this module from there."""


class Points:
    """Five noisy points of a plane: examples that use the generator that they are given."""

    def __len__(self) -> int:
        return 5

    def example(self, index: int, generator: torch.Generator) -> Mapping[str, Tensor]:
        x = torch.randn(4, generator=torch.Generator().manual_seed(index))
        return {"x": x + 0.1 * torch.randn(4, generator=generator), "y": x.sum()[None], "index": torch.tensor(index)}


class Recorded(Draws):
    """Draws that note the numbers of those that are asked for."""

    def __init__(self, examples: Points, seed: int, numbers: list[int] | None) -> None:
        super().__init__(examples, seed)
        self.numbers = numbers

    def __getitem__(self, draw: int) -> dict[str, Tensor]:
        if self.numbers is not None:
            self.numbers.append(draw)
        return super().__getitem__(draw)


class Regression(nn.Module):
    """A small network with dropout and a buffer: (batch) -> mean square error."""

    calls: Tensor

    def __init__(self, dropout: float = 0.5) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 16), nn.SiLU(), nn.Dropout(dropout), nn.Linear(16, 1))
        self.register_buffer("calls", torch.zeros(()))
        self.poisoned: Container[int] = ()
        self.poison: Callable[[Tensor], Tensor] = lambda loss: loss * float("nan")

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        self.calls += 1
        loss = (self.layers(batch["x"]) - batch["y"]).square().mean()
        return self.poison(loss) if int(self.calls) in self.poisoned else loss


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
    poisoned: Container[int] = (),
    prepare: Callable[[Regression], None] = lambda model: None,
    shared_out: bool = False,
    changes: Mapping[str, Any] | None = None,
    numbers: list[int] | None = None,
    **arguments: Any,
) -> dict[str, float]:
    """`fit` on the points, always from the same start. ``numbers`` receives those of the examples that are drawn."""
    torch.manual_seed(0)
    model = Regression(dropout)
    model.poisoned = poisoned
    prepare(model)
    batch = {"x": torch.eye(4), "y": torch.ones(4, 1)}

    def validate(averaged: nn.Module) -> dict[str, float]:
        with torch.no_grad():
            return {"score": -float(averaged(batch))}

    options = TrainingOptions(**{**vars(OPTIONS), **(changes or {})})
    callbacks = Callbacks(validate, save, progress)
    started = TrainingRun(run, seed=1, **arguments)
    draws, runtime = Recorded(Points(), 3, numbers), Runtime("cpu", "fp32", shared_out)
    return fit(model, draws, options, callbacks, started, runtime).best


def resume_file(run: Path) -> dict[str, Any]:
    """The content of the newest one."""
    return torch.load(Checkpoints(run).files()[0], weights_only=True)


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def scores(run: Path) -> list[dict[str, str]]:
    """The rows of log.csv without the columns of speed, which are never the same twice."""
    return [{name: value for name, value in row.items() if name not in THROUGHPUT} for row in rows(run)]


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


# ---- processes -------------------------------------------------------------------------------------------------------


def start(call: str, **environment: str) -> subprocess.Popen[str]:
    """A Python process that runs ``call``, one of the functions below."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests.helpers import training; training.{call}"
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def start_two(call: str) -> list[subprocess.Popen[str]]:
    """Two processes that know of each other."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [start(call, RANK=rank, LOCAL_RANK=rank, **shared) for rank in ("0", "1")]


def finish(processes: list[subprocess.Popen[str]]) -> None:
    """Waits until all processes have ended well; if one has not, none is left."""
    try:
        for process in processes:
            _, errors = process.communicate(timeout=600)
            assert process.returncode == 0, errors[-2000:]
    finally:
        for process in processes:
            process.kill()
            process.communicate(timeout=60)  # closes its pipes, which would fail a later test


def train_slowly(run: str) -> None:
    """Writes a resume file after every step, and takes its time."""
    train(Path(run), progress=lambda progress: time.sleep(0.1), changes={"checkpoint_minutes": 1e-9})


def train_without_dropout(run: str, **changes: Any) -> None:
    """Writes this process's weights as RUN/RANK.pt in the end."""
    models: list[Regression] = []
    train(Path(run), dropout=0.0, prepare=models.append, changes=changes)
    torch.save(models[0].state_dict(), Path(run) / f"{os.environ.get('RANK', '0')}.pt")


def train_sharded(run: str, **arguments: Any) -> None:
    """The first layer is a group of its own. Writes how many weights this process holds as RUN/RANK.txt."""
    sharding.LARGE = 50
    models: list[Regression] = []
    train(Path(run), dropout=0.0, shared_out=True, prepare=models.append, **arguments)
    held = sum(part.numel() for part in sharding.local(list(models[0].parameters())))
    (Path(run) / f"{os.environ['RANK']}.txt").write_text(str(held))


def leave_while_tensors_are_exchanged() -> None:
    """Ends although the threads that add the tensors of all processes have much left to do."""
    runtime = Runtime("cpu", "fp32")
    layer = nn.Linear(1, 1)
    runtime.prepare(layer, [torch.optim.AdamW(layer.parameters())])
    tensors = [torch.ones(1000) for _ in range(2000)]
    for tensor in tensors:
        torch.distributed.all_reduce(tensor, async_op=True)


def train_with_an_infinite_loss_in_one_process(run: str) -> None:
    """At the third step, in the second process; its gradient is finite."""

    def poison(model: Regression) -> None:
        model.poisoned = [3] if os.environ["RANK"] == "1" else []
        model.poison = lambda loss: loss + float("inf")

    train(Path(run), dropout=0.0, prepare=poison)


def train_with_a_signal_to_one_process(run: str, where: str) -> None:
    """The second process gets SIGTERM. Each writes as RUN/RANK.txt what it says at its end."""
    is_second = os.environ["RANK"] == "1"
    at = {"first": 1, "step": 3, "end": 8}.get(where)

    def prepare(model: Regression) -> None:
        forward = model.forward

        def signalled(batch: Mapping[str, Tensor]) -> Tensor:
            if int(model.calls) + 1 == at:
                signal.raise_signal(signal.SIGTERM)
            return forward(batch)

        if is_second:
            model.forward = signalled  # type: ignore[method-assign]

    if where == "validation" and is_second:
        ask, asked = Runtime.any, []

        def signalled(self: Runtime, flag: bool) -> bool:
            asked.append(flag)
            if len(asked) == 2:  # after the first validation
                signal.raise_signal(signal.SIGTERM)
            return ask(self, flag)

        Runtime.any = signalled  # type: ignore[method-assign]
    try:
        train(Path(run), dropout=0.0, prepare=prepare)
    except Stopped as error:
        (Path(run) / f"{os.environ['RANK']}.txt").write_text(str(error))


def train_in_parts(root: str) -> None:
    """In several processes: a whole run, one in two parts, and the other part of a run that one process has begun.

    Each process notes the numbers of the examples that it drew.
    """
    for name, arguments in {
        "whole": [{}],
        "parts": [{"max_steps": 4}, {"resume": True}],
        "begun": [{"max_steps": 4}],
        "went-on": [{"resume": True}],
    }.items():
        for part, more in enumerate(arguments):
            numbers: list[int] = []
            train(Path(root) / name, dropout=0.0, numbers=numbers, **more)
            file = Path(root) / f"{name}-{part}-{os.environ.get('RANK', 'alone')}.json"
            file.write_text(json.dumps(numbers))


# ---- a whole segmenter -----------------------------------------------------------------------------------------------


def write_scans(folder: Path) -> None:
    """Six small scans with a bright block, and its mask."""
    generator = np.random.default_rng(0)
    for part in ("images", "labels"):
        (folder / part).mkdir()
    for i in range(6):
        label = np.zeros((9, 8, 8), np.uint8)
        label[2 : 5 + i % 3, 2:6, 3:7] = 1
        image = label + 0.2 * generator.standard_normal(label.shape)
        nib.save(nib.Nifti1Image(image.astype(np.float32), np.eye(4)), folder / "images" / f"case{i}.nii.gz")
        nib.save(nib.Nifti1Image(label, np.eye(4)), folder / "labels" / f"case{i}.nii.gz")


def config(calibration_cases: int = 0, **training: Any) -> SegmenterConfig:
    sides = {"test_cases": 1, "validation_cases": 1, "calibration_cases": calibration_cases}
    return SegmenterConfig.model_validate(
        {
            "method": "ensemdiff",
            "data": {"window": [8, 8, 8], "labels": ["block"], **sides},
            "network": {"channels": 8, "channel_mult": [1, 2], "patch_size": 2, "dropout": 0.1},
            "training": {"batch_size": 2, "max_steps": 4, "validate_every": 2, "precision": "fp32", **training},
            "inference": {"steps": 2},
        }
    )


def train_segmenter_in(run: str, data: str) -> None:
    train_segmenter(config(), Path(data), Path(run), device="cpu")


def latent_config() -> SegmenterConfig:
    content = config().model_dump(mode="json")
    content |= {
        "method": "latent-mask",
        "mask_autoencoder": {"latent_channels": 2, "channels": [32, 32], "max_steps": 6},
    }
    return SegmenterConfig.model_validate(content)


def wait_for_the_others(minutes: float) -> None:
    """Prints why a process that waits for another one gives up."""
    from medseg_diffusion.errors import MedsegError
    from medseg_diffusion.training import runtime

    runtime.MEETING_MIN = minutes
    try:
        runtime.Runtime("cpu", "fp32")
    except MedsegError as error:
        print(error, file=sys.stderr)
        return
    raise AssertionError("a single process has met itself")
