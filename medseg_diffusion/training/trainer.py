"""The training loop: one visible loop for every model of the package."""

from __future__ import annotations

import csv
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.tensorboard import SummaryWriter

from medseg_diffusion.diffusion.noise import derive_seed
from medseg_diffusion.errors import InputError, MedsegError

from .ema import EMA
from .runtime import Runtime


@dataclass(frozen=True)
class TrainingOptions:
    """Settings of the optimisation.

    Attributes:
        batch_size: examples per step over all processes together.
        max_steps: optimiser steps of the whole run; the learning rate decays to 0 there.
        learning_rate: peak of AdamW's rate, after a linear warm-up.
        warmup_steps: length of the warm-up.
        weight_decay: AdamW's decoupled decay.
        ema_decay: decay of the averaged weights, with warm-up.
        gradient_clip: largest norm of the gradient.
        workers: processes that prepare examples; 0 prepares them in the training process.
        validate_every: steps between validations.
        checkpoint_minutes: minutes between resume files.
    """

    batch_size: int = 4
    max_steps: int = 10_000
    learning_rate: float = 5e-4
    warmup_steps: int = 200
    weight_decay: float = 1e-4
    ema_decay: float = 0.999
    gradient_clip: float = 1.0
    workers: int = 0
    validate_every: int = 500
    checkpoint_minutes: float = 5.0


@dataclass(frozen=True)
class Progress:
    """What a display needs: steps done and planned, the smoothed loss, seconds left, the last validation score."""

    step: int
    max_steps: int
    loss: float
    seconds_left: float
    score: float | None


@dataclass(frozen=True)
class Callbacks:
    """What differs between models: how one is validated and how one is written.

    Attributes:
        validate: averaged model -> named numbers; "score" decides which weights are the best.
        save: (averaged model, step, numbers) -> writes the loadable model.
        progress: called after every step of the main process.
    """

    validate: Callable[[nn.Module], Mapping[str, float]]
    save: Callable[[nn.Module, int, Mapping[str, float]], None]
    progress: Callable[[Progress], None] = lambda progress: None


class _Range(Sampler[int]):
    """The draws of this process: of every batch, its consecutive share."""

    def __init__(self, first_step: int, last_step: int, batch_size: int, rank: int, world_size: int) -> None:
        self.steps, self.batch_size = range(first_step, last_step), batch_size
        self.share = batch_size // world_size
        self.offset = rank * self.share

    def __iter__(self) -> Iterator[int]:
        for step in self.steps:
            start = step * self.batch_size + self.offset
            yield from range(start, start + self.share)

    def __len__(self) -> int:
        return len(self.steps) * self.share


def fit(
    model: nn.Module,
    draws: Dataset[dict[str, Tensor]],
    options: TrainingOptions,
    callbacks: Callbacks,
    run: Path,
    runtime: Runtime,
    *,
    seed: int = 0,
    resume: bool = False,
    max_steps: int | None = None,
    time_limit_min: float | None = None,
) -> dict[str, float]:
    """Trains ``model`` (batch -> scalar loss) until the last step, a limit, or Ctrl-C; returns the best numbers.

    ``run`` receives checkpoints/last.pt (everything to resume bit-exactly), log.csv and tensorboard/. The best
    averaged weights by validation are handed to ``callbacks.save``. Ctrl-C and the limits write a resume file first.

    Args:
        model: called with a batch, returns the loss.
        draws: the n-th training example by number (`medseg_diffusion.data.draws.Draws`).
        options: the optimisation.
        callbacks: validation, model writing, progress.
        run: the run directory.
        runtime: device, precision, processes.
        seed: of dropout; the draws carry their own.
        resume: continue from checkpoints/last.pt; a run that was stopped before it had one starts again.
        max_steps: stop after this step even if the run is longer; the learning rate follows ``options.max_steps``.
        time_limit_min: stop after so many minutes of this call.

    Raises:
        MedsegError: the loss is not finite.
        InputError: nothing to resume from, or an unreadable resume file.
    """
    if options.batch_size % runtime.world_size:
        raise MedsegError(f"batch_size {options.batch_size} must be a multiple of the {runtime.world_size} processes")
    began = time.monotonic()
    optimizer = torch.optim.AdamW(
        model.parameters(), options.learning_rate, weight_decay=options.weight_decay, fused=runtime.device.type != "mps"
    )
    wrapped, optimizer = runtime.prepare(model, optimizer)  # type: ignore[assignment]
    ema = EMA(runtime.unwrap(wrapped), options.ema_decay)
    resume_file = run / "checkpoints" / "last.pt"
    state = _State()
    if resume and (resume_file.is_file() or not _only_begun(run)):
        state = _load(resume_file, runtime, wrapped, optimizer, ema)
    last = min(options.max_steps, max_steps or options.max_steps)
    loader = DataLoader(
        draws,
        batch_size=options.batch_size // runtime.world_size,
        sampler=_Range(state.step, last, options.batch_size, runtime.rank, runtime.world_size),
        num_workers=options.workers,
        persistent_workers=options.workers > 0,
        multiprocessing_context="spawn" if options.workers else None,
        pin_memory=runtime.device.type == "cuda",
    )
    log = _Log(run, state.step, resume) if runtime.is_main else None
    saved = time.monotonic()
    speed = 0.0
    interrupt = _Interrupt()
    whole = True  # between two steps
    # Saturated softmax heads leave gradients, and Adam's moments, full of denormals, which CPUs handle 10 to 100 times
    # slower than other numbers.
    torch.set_flush_denormal(True)
    try:
        batches = iter(loader)
        while state.step < last:
            whole = False
            started = time.monotonic()
            batch = runtime.to_device(next(batches))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(state.step, options)
            # Dropout is the only user of the global generator: seeding it by step makes resuming exact.
            torch.manual_seed(derive_seed(seed, "dropout", state.step, runtime.rank))
            wrapped.train()
            with runtime.accelerator.autocast():
                loss = wrapped(batch)
            runtime.backward(loss)
            norm = runtime.clip(wrapped, options.gradient_clip)
            value = runtime.mean(loss)
            if not torch.isfinite(torch.tensor([value, norm])).all():
                raise MedsegError(
                    f"the loss became {value} (gradient norm {norm}) at step {state.step}: "
                    "lower training.learning_rate, or use --set training.precision=fp32"
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            ema.update(runtime.unwrap(wrapped))
            state.step += 1
            whole = True
            state.loss = value if state.step == 1 else 0.98 * state.loss + 0.02 * value
            took = time.monotonic() - started
            speed = took if speed == 0 else 0.95 * speed + 0.05 * took

            out_of_time = time_limit_min is not None and time.monotonic() - began > 60 * time_limit_min
            stop = runtime.any(out_of_time) or state.step == last
            if stop or state.step % options.validate_every == 0:
                if runtime.is_main:
                    numbers = dict(callbacks.validate(ema.module))
                    if numbers["score"] > state.best.get("score", float("-inf")):
                        state.best = {**numbers, "step": float(state.step)}
                        callbacks.save(ema.module, state.step, numbers)
                    cast(_Log, log).validation(state.step, state.loss, optimizer.param_groups[0]["lr"], numbers)
                    state.score = numbers["score"]
                    _save(resume_file, state, wrapped, optimizer, ema, runtime)
                    saved = time.monotonic()
                runtime.wait()
            elif runtime.is_main and time.monotonic() - saved > 60 * options.checkpoint_minutes:
                _save(resume_file, state, wrapped, optimizer, ema, runtime)
                saved = time.monotonic()
            if runtime.is_main:
                cast(_Log, log).step(state.step, value, norm)
                left = (last - state.step) * speed
                callbacks.progress(Progress(state.step, last, state.loss, left, state.score))
            if interrupt.requested:
                raise KeyboardInterrupt
            if stop:
                break
    except KeyboardInterrupt:
        # A second Ctrl-C may come within a step, when weights and averages are of different ones: what is saved then
        # is what was saved before.
        if runtime.is_main and state.step and whole:
            _save(resume_file, state, wrapped, optimizer, ema, runtime)
            if not state.best:
                callbacks.save(ema.module, state.step, {})
        raise
    finally:
        torch.set_flush_denormal(False)
        interrupt.restore()
        if log is not None:
            log.close()
    return state.best


def _only_begun(run: Path) -> bool:
    """Whether a run was started and stopped before its first validation and resume file."""
    return (run / "config.yaml").is_file() and not (run / "log.csv").is_file()


def learning_rate(step: int, options: TrainingOptions) -> float:
    """Linear warm-up to the peak, then (1 - progress)^0.9 to 0 at ``max_steps`` (the decay of nnU-Net)."""
    if step < options.warmup_steps:
        return options.learning_rate * (step + 1) / options.warmup_steps
    progress = (step - options.warmup_steps) / max(1, options.max_steps - options.warmup_steps)
    return options.learning_rate * max(0.0, 1 - progress) ** 0.9


class _Interrupt:
    """Ctrl-C waits for the end of the step, so that what is saved is whole; a second one stops at once.

    Within a second it is the same one: a launcher passes on what its processes have had from the terminal, too.
    """

    def __init__(self) -> None:
        self.requested = False
        self.at = 0.0
        self.main = threading.current_thread() is threading.main_thread()
        self.before = signal.signal(signal.SIGINT, self._handle) if self.main else None

    def _handle(self, number: int, frame: object) -> None:
        if self.requested and time.monotonic() > self.at + 1:
            raise KeyboardInterrupt
        self.requested, self.at = True, time.monotonic()

    def restore(self) -> None:
        if self.main:
            signal.signal(signal.SIGINT, self.before)


@dataclass
class _State:
    step: int = 0
    loss: float = 0.0
    score: float | None = None
    best: dict[str, float] = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        self.best = self.best or {}


def _save(
    path: Path, state: _State, model: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA, runtime: Runtime
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    content: dict[str, Any] = {
        "state": {"step": state.step, "loss": state.loss, "score": state.score, "best": state.best},
        "model": runtime.unwrap(model).state_dict(),
        "ema": ema.module.state_dict(),
        "ema_updates": ema.updates,
        "optimizer": optimizer.state_dict(),
    }
    with temporary.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _load(path: Path, runtime: Runtime, model: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA) -> _State:
    if not path.is_file():
        raise InputError(path, "no resume file", "a run that was started before", "drop --resume to start it")
    try:
        content = torch.load(path, map_location=runtime.device, weights_only=True)
        runtime.unwrap(model).load_state_dict(content["model"])
        ema.module.load_state_dict(content["ema"])
        ema.updates = content["ema_updates"]
        optimizer.load_state_dict(content["optimizer"])
        return _State(**content["state"])
    except Exception as error:
        raise InputError(
            path,
            f"an unusable resume file ({type(error).__name__}: {str(error).partition(chr(10))[0]})",
            "the one that this configuration wrote",
            "restore it, or start a new run in another folder",
        ) from error


class _Log:
    """log.csv (one row per validation) and TensorBoard (every step)."""

    def __init__(self, run: Path, step: int, resume: bool) -> None:
        run.mkdir(parents=True, exist_ok=True)
        self.path = run / "log.csv"
        self.tensorboard = SummaryWriter(str(run / "tensorboard"), purge_step=step if resume else None)
        self.rows: list[dict[str, Any]] = []
        if resume and self.path.is_file():
            with self.path.open(newline="") as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["step"]) <= step]

    def step(self, step: int, loss: float, norm: float) -> None:
        self.tensorboard.add_scalar("train/loss", loss, step)
        self.tensorboard.add_scalar("train/gradient_norm", norm, step)

    def validation(self, step: int, loss: float, rate: float, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self.tensorboard.add_scalar(f"validation/{name}", value, step)
        row = {"step": step, "loss": f"{loss:.6g}", "learning_rate": f"{rate:.4g}"}
        self.rows.append({**row, **{name: f"{value:.6g}" for name, value in numbers.items()}})
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(key for row in self.rows for key in row)))
            writer.writeheader()
            writer.writerows(self.rows)
        temporary.replace(self.path)

    def close(self) -> None:
        self.tensorboard.close()
