"""The training loop that every model of the package shares."""

from __future__ import annotations

import errno
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from medseg_diffusion.diffusion.noise import derive_seed
from medseg_diffusion.errors import MedsegError, Stopped

from .ema import EMA
from .interrupt import Interrupt, Interruption, apart
from .log import TrainingLog
from .resume import Checkpoints, TrainingState, bytes_of, full_disk
from .runtime import Runtime

Decay = Literal["polynomial", "linear", "constant"]


@dataclass(frozen=True)
class TrainingOptions:
    """Settings of the optimisation.

    Attributes:
        batch_size: examples per step over all processes together.
        max_steps: optimiser steps of the whole run.
        learning_rate: peak of AdamW's rate, after a linear warm-up.
        warmup_steps: length of the warm-up.
        decay: of the learning rate after the warm-up (`learning_rate`).
        weight_decay: AdamW's decoupled decay of the weights; with 0 it is Adam.
        ema_decay: decay of the averaged weights, with warm-up.
        gradient_clip: largest norm of the gradient.
        workers: processes that prepare examples; 0 prepares them in the training process.
        validate_every: steps between validations.
        checkpoint_minutes: minutes between resume files.
        checkpoint_steps: steps between resume files; 0 leaves it to the minutes alone.
        checkpoints_kept: how many resume files are kept.
    """

    batch_size: int = 4
    max_steps: int = 10_000
    learning_rate: float = 5e-4
    warmup_steps: int = 200
    decay: Decay = "polynomial"
    weight_decay: float = 1e-4
    ema_decay: float = 0.999
    gradient_clip: float = 1.0
    workers: int = 0
    validate_every: int = 500
    checkpoint_minutes: float = 5.0
    checkpoint_steps: int = 0
    checkpoints_kept: int = 2


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


@dataclass(frozen=True)
class TrainingRun:
    """Where a run is stored, and how this call of `fit` starts and stops.

    Attributes:
        folder: the run directory.
        seed: of dropout; the training examples carry their own.
        resume: continue from the newest resume file. A run that was stopped before it had one starts again.
        max_steps: stop after this step even if the run is longer; the learning rate follows
            `TrainingOptions.max_steps`.
        time_limit_min: stop this call after so many minutes.
    """

    folder: Path
    seed: int = 0
    resume: bool = False
    max_steps: int | None = None
    time_limit_min: float | None = None


Ending = Literal["finished", "max_steps", "time_limit"]
"""Why a training ended: all planned steps are done, or a limit of the call was reached."""


@dataclass(frozen=True)
class Outcome:
    """What a training has reached.

    Attributes:
        run: the run directory.
        steps: steps that are done, of ``planned``.
        planned: steps of the whole run.
        ended: why this call ended.
        best: numbers of the best validation, and its "step".
    """

    run: Path
    steps: int
    planned: int
    ended: Ending
    best: dict[str, float]


@runtime_checkable
class SeveralParts(Protocol):
    """A model whose parts have an optimiser and a gradient clip each, such as a generator and its discriminator."""

    def optimised_parts(self) -> Sequence[list[nn.Parameter]]: ...


# long: one headed block for each part of a step, in the order in which they happen
def fit(
    model: nn.Module,
    draws: Dataset[dict[str, Tensor]],
    options: TrainingOptions,
    callbacks: Callbacks,
    run: TrainingRun,
    runtime: Runtime,
) -> Outcome:
    """Trains ``model`` (batch -> scalar loss) until the last step, a limit, or a signal.

    ``run.folder`` receives checkpoints/ (everything to resume bit-exactly), log.csv and tensorboard/.
    ``callbacks.save`` receives the averaged weights whenever a validation is the best so far. A resume file is written
    before a signal or a limit ends the call.

    Args:
        model: called with a batch, returns the loss. With `SeveralParts` it is the sum of losses of one part each.
        draws: the n-th training example by number (`medseg_diffusion.data.draws.Draws`).
        options: the optimisation.
        callbacks: validation, model writing, progress.
        run: folder, seed, resuming and limits.
        runtime: device, precision, processes.

    Raises:
        Stopped: SIGTERM or SIGUSR1.
        KeyboardInterrupt: Ctrl-C.
        MedsegError: the loss is not finite, the disk is full, or the processes cannot share a batch evenly.
        InputError: nothing to resume from, or an unusable resume file.
    """
    began = time.monotonic()
    state = _initial_state(model, options, run, runtime)
    last = min(options.max_steps, run.max_steps or options.max_steps)
    batches: Iterator[dict[str, Tensor]] = iter(())
    interrupt = Interrupt()
    between_steps = True
    recorder: _Recorder | None = None
    # Saturated softmax heads leave gradients, and Adam's moments, full of denormals, which CPUs handle 10 to 100 times
    # slower than other numbers.
    torch.set_flush_denormal(True)
    try:
        recorder = _Recorder(state, last, options, callbacks, run, runtime, interrupt) if runtime.is_main else None
        with interrupt.kept_from_workers():
            batches = iter(_loader(draws, options, state.step, last, runtime))
        stop = state.step >= last
        # A signal has kept the call before from the validation of its last step.
        validation_due = state.validated < state.step and (stop or state.step % options.validate_every == 0)
        if validation_due and recorder is not None:
            recorder.validate_and_save(True)
        if runtime.any(interrupt.requested is not None):
            raise interrupt.error(_standing(state, options))
        while not stop:
            started, between_steps = time.monotonic(), False

            # Batch
            batch = runtime.to_device(next(batches))

            # Forward. Dropout is the only user of the global generator: seeding it by step makes resuming exact.
            torch.manual_seed(derive_seed(run.seed, "dropout", state.step, runtime.rank))
            state.model.train()
            with runtime.accelerator.autocast():
                loss = state.model(batch)

            # Backward
            runtime.backward(loss)
            norms = [runtime.clip(_parameters(one), options.gradient_clip) for one in state.optimizers]
            value, norm = runtime.mean(loss), math.hypot(*norms)
            _require_finite(value, norm, state.step)

            # Step. A network whose loss has not begun has no gradient, and its moments must not count that.
            for optimizer, own_norm in zip(state.optimizers, norms, strict=True):
                _set_learning_rate(optimizer, learning_rate(state.step, options))
                if own_norm > 0:
                    optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            state.ema.update(runtime.unwrap(state.model))
            state.step += 1
            state.loss = value if state.step == 1 else 0.98 * state.loss + 0.02 * value
            between_steps = True
            took = time.monotonic() - started

            # Validate and save
            out_of_time = run.time_limit_min is not None and time.monotonic() - began > 60 * run.time_limit_min
            ending = runtime.any(out_of_time or interrupt.requested is not None)
            signalled = ending and runtime.any(interrupt.requested is not None)
            stop = ending or state.step >= last
            validation_due = not signalled and (stop or state.step % options.validate_every == 0)
            if recorder is not None:
                recorder.log.step(state.step, value, norm)  # before the resume file: a kill may come in between
                recorder.validate_and_save(validation_due)
            if validation_due:  # the others wait here, and learn whether a signal has cut it short
                signalled = runtime.any(interrupt.requested is not None)
            if recorder is not None:
                recorder.report(took)
            if signalled:
                raise interrupt.error(_standing(state, options))
        if recorder is not None:
            recorder.log.close()
    except (KeyboardInterrupt, Stopped) as error:
        # A second Ctrl-C may come within a step, when weights and averages are of different steps. The resume files
        # then stay as they are.
        if recorder is not None and state.step and between_steps:
            recorder.save_interrupted(with_model=isinstance(error, KeyboardInterrupt))
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise MedsegError(full_disk(run.folder, bytes_of(state))) from error
    finally:
        batches = iter(())  # ends the workers now; an error would keep them until the process ends
        torch.set_flush_denormal(False)
        interrupt.restore()
        if recorder is not None:
            with suppress(OSError):  # on a full disk, where another error is on its way
                recorder.log.close()
    finished = state.step >= options.max_steps
    ended: Ending = "finished" if finished else "max_steps" if state.step >= last else "time_limit"
    return Outcome(run.folder, state.step, options.max_steps, ended, state.best)


def _standing(state: TrainingState, options: TrainingOptions) -> str:
    return f"stopped after step {state.step} of {options.max_steps}, which is saved"


def learning_rate(step: int, options: TrainingOptions) -> float:
    """The rate of a step: linear warm-up to the peak, then the decay.

    "polynomial" is (1 - progress)^0.9 to 0 at ``max_steps`` (as nnU-Net), "linear" is 1 - progress. "constant" stays at
    the peak, as published for most diffusion models, whose averaged weights are used.
    """
    if step < options.warmup_steps:
        return options.learning_rate * (step + 1) / options.warmup_steps
    progress = (step - options.warmup_steps) / max(1, options.max_steps - options.warmup_steps)
    power = {"polynomial": 0.9, "linear": 1.0, "constant": 0.0}[options.decay]
    return options.learning_rate * max(0.0, 1 - progress) ** power


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def _initial_state(model: nn.Module, options: TrainingOptions, run: TrainingRun, runtime: Runtime) -> TrainingState:
    """The state that this call starts from: a new one, or that of the resume file."""
    parts = model.optimised_parts() if isinstance(model, SeveralParts) else [list(model.parameters())]
    fused = runtime.device.type != "mps"
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(part, options.learning_rate, weight_decay=options.weight_decay, fused=fused) for part in parts
    ]
    wrapped, optimizers = runtime.prepare(model, optimizers)
    state = TrainingState(wrapped, optimizers, EMA(runtime.unwrap(wrapped), options.ema_decay))
    checkpoints = Checkpoints(run.folder)
    if run.resume and (checkpoints.files() or not _has_only_begun(run.folder)):
        checkpoints.load(state, runtime)
    return state


def _has_only_begun(folder: Path) -> bool:
    """Whether a run was started and stopped before its first validation and resume file."""
    return (folder / "config.yaml").is_file() and not (folder / "log.csv").is_file()


class _StepSampler(Sampler[int]):
    """Numbers of the examples that this process draws: of every step's batch, its consecutive share."""

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


def _loader(
    draws: Dataset[dict[str, Tensor]], options: TrainingOptions, first_step: int, last_step: int, runtime: Runtime
) -> DataLoader[dict[str, Tensor]]:
    """This process's batches of the steps from ``first_step`` up to, but without, ``last_step``."""
    if options.batch_size % runtime.world_size:
        raise MedsegError(f"batch_size {options.batch_size} must be a multiple of the {runtime.world_size} processes")
    return DataLoader(
        draws,
        batch_size=options.batch_size // runtime.world_size,
        sampler=_StepSampler(first_step, last_step, options.batch_size, runtime.rank, runtime.world_size),
        num_workers=options.workers,
        persistent_workers=options.workers > 0,
        multiprocessing_context="spawn" if options.workers else None,
        worker_init_fn=apart,
        pin_memory=runtime.device.type == "cuda",
    )


def _require_finite(loss: float, norm: float, step: int) -> None:
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise MedsegError(
            f"the loss became {loss} (gradient norm {norm}) at step {step}: "
            "lower training.learning_rate, or use --set training.precision=fp32"
        )


class _Recorder:
    """What the main process does between two steps: validate, save, log and show progress."""

    def __init__(
        self,
        state: TrainingState,
        last_step: int,
        options: TrainingOptions,
        callbacks: Callbacks,
        run: TrainingRun,
        runtime: Runtime,
        interrupt: Interrupt,
    ) -> None:
        self.state = state
        self.last_step = last_step
        self.options = options
        self.callbacks = callbacks
        self.run = run
        self.runtime = runtime
        self.interrupt = interrupt
        self.checkpoints = Checkpoints(run.folder, options.checkpoints_kept)
        self.log = TrainingLog(run.folder, state.step, run.resume)
        self.saved_at, self.saved_step = time.monotonic(), -1
        self.step_seconds = 0.0

    def validate_and_save(self, validation_due: bool) -> None:
        """Validates if a validation is due, and writes a resume file after one or when it is time for one."""
        if validation_due:
            self._validate()
        steps = self.options.checkpoint_steps
        often = steps > 0 and self.state.step % steps == 0
        if validation_due or often or time.monotonic() - self.saved_at > 60 * self.options.checkpoint_minutes:
            self._save()

    def report(self, seconds: float) -> None:
        """Shows the progress after a step that took so many seconds."""
        state = self.state
        self.step_seconds = seconds if self.step_seconds == 0 else 0.95 * self.step_seconds + 0.05 * seconds
        seconds_left = (self.last_step - state.step) * self.step_seconds
        self.callbacks.progress(Progress(state.step, self.last_step, state.loss, seconds_left, state.score))

    def save_interrupted(self, with_model: bool) -> None:
        """Writes a resume file, and the model if it is wanted and no validation has written one yet."""
        if self.saved_step != self.state.step:
            self._save()
        if with_model and not self.state.best:
            self.callbacks.save(self.state.ema.module, self.state.step, {})

    def _validate(self) -> None:
        """Validates, and saves the model if it is the best; nothing changes if a signal comes meanwhile."""
        state = self.state
        try:
            with self.interrupt.at_once():
                numbers = dict(self.callbacks.validate(state.ema.module))
        except Interruption:  # the resumed run validates this step
            return
        if numbers["score"] > state.best.get("score", float("-inf")):
            state.best = {**numbers, "step": float(state.step)}
            self.callbacks.save(state.ema.module, state.step, numbers)
        self.log.validation(state.step, state.loss, state.optimizers[0].param_groups[0]["lr"], numbers)
        state.score, state.validated = numbers["score"], state.step

    def _save(self) -> None:
        self.log.flush()
        self.checkpoints.save(self.state, self.runtime)
        self.saved_at, self.saved_step = time.monotonic(), self.state.step
