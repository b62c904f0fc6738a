"""The training loop that every model of the package shares."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from medseg_diffusion.diffusion.noise import derive_seed
from medseg_diffusion.errors import MedsegError, Stopped

from .batches import Batches, part_of, passes
from .ema import EMA
from .health import EMPTY, EQUAL, StepHealth, StepNumbers, ValidationHealth
from .interrupt import Interrupt, Interruption
from .log import Tracker, TrainingLog
from .readings import Readings
from .resume import Checkpoints, TrainingState, bytes_of, full_disk, tensors_of
from .runtime import Runtime
from .sharding import shard
from .throughput import Throughput, flops_of_example

Decay = Literal["polynomial", "linear", "constant"]


@dataclass(frozen=True)
class TrainingOptions:
    """Settings of the optimisation.

    Attributes:
        batch_size: examples per step over all processes together.
        examples_at_once: largest number of examples that a device computes together; None computes its share of the
            batch at once. The gradient stays that of the batch as long as the loss is a mean over its examples.
        max_steps: optimiser steps of the whole run.
        learning_rate: peak of AdamW's rate, after a linear warm-up.
        warmup_steps: length of the warm-up.
        decay: of the learning rate after the warm-up (`learning_rate`).
        weight_decay: AdamW's decoupled decay of the weights; with 0 it is Adam.
        ema_decay: decay of the averaged weights, with warm-up.
        gradient_clip: largest norm of the gradient.
        workers: processes that prepare examples; 0 prepares them in the training process.
        validate_every: steps between validations.
        read_every: steps between two readings of losses and gradient norms from the device. It changes no result.
        checkpoint_minutes: minutes between resume files.
        checkpoint_steps: steps between resume files; 0 leaves it to the minutes alone.
        checkpoints_kept: how many resume files are kept.
        trackers: also log to these (`medseg_diffusion.training.log`).
    """

    batch_size: int = 4
    examples_at_once: int | None = None
    max_steps: int = 10_000
    learning_rate: float = 5e-4
    warmup_steps: int = 200
    decay: Decay = "polynomial"
    weight_decay: float = 1e-4
    ema_decay: float = 0.999
    gradient_clip: float = 1.0
    workers: int = 0
    validate_every: int = 500
    read_every: int = 10
    checkpoint_minutes: float = 5.0
    checkpoint_steps: int = 0
    checkpoints_kept: int = 2
    trackers: tuple[Tracker, ...] = ()


@dataclass(frozen=True)
class Progress:
    """What a display needs.

    Attributes:
        step: number of steps done.
        max_steps: number of steps planned.
        loss: smoothed loss; it and the numbers below are those of the last reading of the device.
        seconds_left: for the other steps.
        score: of the last validation, None before the first.
        examples_per_s: of all processes together.
        waiting: share of the time in which the device waited for examples.
        skipped: number of steps that were skipped because their loss or gradient was not finite.
    """

    step: int
    max_steps: int
    loss: float
    seconds_left: float
    score: float | None
    examples_per_s: float = 0.0
    waiting: float = 0.0
    skipped: int = 0


@dataclass(frozen=True)
class Callbacks:
    """What differs between models: how one is validated and how one is written.

    Attributes:
        validate: averaged model -> named numbers; "score" decides which weights are the best. Those of
            `medseg_diffusion.training.health.Predictions`, if any, are looked at and logged, but not stored.
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


@runtime_checkable
class KnowsStep(Protocol):
    """A model whose loss depends on the step."""

    def begin_step(self, step: int) -> None: ...


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

    ``run.folder`` receives checkpoints/ (everything to resume bit-exactly), log.csv and steps.csv.
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
        MedsegError: the loss was not finite in too many steps, the disk is full, or the processes cannot share a batch
            evenly.
        InputError: nothing to resume from, or an unusable resume file.
    """
    began = time.monotonic()
    state = _initial_state(model, options, run, runtime)
    last = min(options.max_steps, run.max_steps or options.max_steps)
    batches: Batches | None = None
    readings, health = Readings(options.read_every, alone=runtime.world_size == 1), StepHealth(runtime.precision)
    interrupt = Interrupt()
    between_steps = True
    recorder: _Recorder | None = None

    def read_back() -> None:
        """Waits for the device, counts what it has done, and logs it. All processes read the same numbers."""
        nonlocal between_steps
        numbers = readings.read()
        between_steps = False  # a second Ctrl-C must not leave a resume file without some of the numbers
        if recorder is not None:
            recorder.log_steps(numbers, batches.waited if batches is not None else 0.0)
        for one in numbers:
            _count(one, state)
            if not one.finite:
                health.check(one, state.skipped_in_a_row, learning_rate(one.step - 1, options))
        between_steps = True

    # Saturated softmax heads leave gradients, and Adam's moments, full of denormals, which CPUs handle 10 to 100 times
    # slower than other numbers.
    torch.set_flush_denormal(True)
    try:
        recorder = _Recorder(state, last, options, callbacks, run, runtime, interrupt) if runtime.is_main else None
        with interrupt.kept_from_workers():
            batches = Batches(draws, options.batch_size, state.step, last, options.workers, runtime)
        stop = state.step >= last
        # A signal has kept the call before from the validation of its last step.
        validation_due = state.validated < state.step and (stop or state.step % options.validate_every == 0)
        if validation_due:
            tensors = tensors_of(state, runtime)
            if recorder is not None:
                recorder.validate_and_save(tensors, validation_due)
        if runtime.any(interrupt.requested is not None):
            raise interrupt.error(_standing(state, options))
        first = state.step
        while not stop:
            # Step
            batch = next(batches)
            between_steps = False
            if recorder is not None and state.step == first:
                recorder.begin(batch, batches.waited)
            loss, norms = _step(state, batch, options, run.seed, runtime)
            state.step += 1
            readings.add(state.step, loss, norms)
            between_steps = True

            # Decide what is next. Several processes have to agree, for which they wait for each other.
            at_end = state.step >= last
            validation_due = at_end or state.step % options.validate_every == 0
            file_due = options.checkpoint_steps > 0 and state.step % options.checkpoint_steps == 0
            out_of_time = signalled = False
            if runtime.world_size == 1 or validation_due or file_due or state.step % options.read_every == 0:
                out_of_time, signalled, late = runtime.any_of(
                    run.time_limit_min is not None and time.monotonic() - began > 60 * run.time_limit_min,
                    interrupt.requested is not None,
                    recorder is not None and recorder.file_due,
                )
                file_due = file_due or late or signalled
            stop = at_end or out_of_time
            validation_due = not signalled and (validation_due or stop)

            # Read back
            if validation_due or file_due or readings.due(state.step):
                read_back()

            # Validate and save
            if validation_due or file_due:
                tensors = tensors_of(state, runtime)
                if recorder is not None:
                    recorder.validate_and_save(tensors, validation_due)
            if validation_due:  # the others wait here, and learn whether a signal has cut it short
                signalled = runtime.any(interrupt.requested is not None)
            if recorder is not None:
                recorder.show()
            if signalled:
                raise interrupt.error(_standing(state, options))
        if recorder is not None:
            recorder.log.close()
    except (KeyboardInterrupt, Stopped) as error:
        # A second Ctrl-C may come within a step, when weights and averages are of different steps. The resume files
        # then stay as they are.
        if between_steps and state.step:
            read_back()
            if recorder is not None:
                recorder.save_interrupted(with_model=isinstance(error, KeyboardInterrupt))
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise MedsegError(full_disk(run.folder, bytes_of(state))) from error
    finally:
        batches = None  # ends the workers now; an error would keep them until the process ends
        torch.set_flush_denormal(False)
        interrupt.restore()
        if recorder is not None:
            with suppress(OSError):  # on a full disk, where another error is on its way
                recorder.log.close()
    finished = state.step >= options.max_steps
    ended: Ending = "finished" if finished else "max_steps" if state.step >= last else "time_limit"
    return Outcome(run.folder, state.step, options.max_steps, ended, state.best)


def _standing(state: TrainingState, options: TrainingOptions) -> str:
    if state.step == 0:
        return "stopped before the first step"
    return f"stopped after step {state.step} of {options.max_steps}, which is saved"


def _step(
    state: TrainingState, batch: Mapping[str, Tensor], options: TrainingOptions, seed: int, runtime: Runtime
) -> tuple[Tensor, list[Tensor]]:
    """One step of the optimisation: the loss over all processes, and the gradient norm of each part of the model.

    Both are scalars on the device, and so is the decision to skip the step because one of them is not finite: nothing
    here waits for the device.
    """
    model = runtime.unwrap(state.model)
    if isinstance(model, KnowsStep):
        model.begin_step(state.step)

    # Forward and backward. Dropout is the only user of the global generator: seeding it by step makes resuming exact.
    torch.manual_seed(derive_seed(seed, "dropout", state.step, runtime.rank))
    state.model.train()
    losses = []
    parts = passes(batch, options.examples_at_once)
    for number, (share, part) in enumerate(parts, start=1):
        with runtime.exchanging(state.model, number == len(parts)):
            with runtime.accelerator.autocast():
                loss = share * state.model(part)
            runtime.backward(loss)
        losses.append(loss.detach())
    total = runtime.mean(torch.stack(losses).sum())

    # Step. A network whose loss has not begun has no gradient, and its moments must not count that.
    norms = [runtime.clip(_parameters(one), options.gradient_clip) for one in state.optimizers]
    taken = torch.stack([total, *norms]).isfinite().all()
    for optimizer, norm in zip(state.optimizers, norms, strict=True):
        _set_learning_rate(optimizer, learning_rate(state.step, options))
        runtime.step(optimizer, skip=~(taken & (norm > 0)))
        optimizer.zero_grad(set_to_none=True)
    state.ema.update(model, taken)
    return total, norms


def _count(numbers: StepNumbers, state: TrainingState) -> None:
    """Takes the numbers of a step into the smoothed loss and into the counts of skipped steps."""
    if not numbers.finite:
        state.skipped += 1
        state.skipped_in_a_row += 1
        return
    state.skipped_in_a_row = 0
    is_first = numbers.step == state.skipped + 1
    state.loss = numbers.loss if is_first else 0.98 * state.loss + 0.02 * numbers.loss


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
    model = model.to(runtime.device)
    ema = EMA(model, options.ema_decay)
    if runtime.sharded:
        if isinstance(model, SeveralParts):
            raise MedsegError(
                "a training with several networks cannot share their weights out; set training.sharding=false"
            )
        if runtime.is_main:
            ema.whole = deepcopy(ema.module)
        shard(model, runtime.device)
        shard(ema.module, runtime.device)
    parts = model.optimised_parts() if isinstance(model, SeveralParts) else [list(model.parameters())]
    fused = runtime.device.type != "mps"
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(part, options.learning_rate, weight_decay=options.weight_decay, fused=fused) for part in parts
    ]
    wrapped, optimizers = runtime.prepare(model, optimizers)
    state = TrainingState(wrapped, optimizers, ema)
    checkpoints = Checkpoints(run.folder)
    if run.resume and (checkpoints.files() or not _has_only_begun(run.folder)):
        checkpoints.load(state, runtime)
    return state


def _has_only_begun(folder: Path) -> bool:
    """Whether a run was started and stopped before its first resume file, which follows the first validation."""
    log = folder / "log.csv"
    validations = len(log.read_text().splitlines()) - 1 if log.is_file() else 0
    return (folder / "config.yaml").is_file() and validations <= 1


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
        self.log = TrainingLog(run.folder, state.step, run.resume, options.trackers)
        self.health = ValidationHealth(options.max_steps)
        self.throughput = Throughput(options.batch_size, 0.0, runtime)
        self.saved_at, self.saved_step = time.monotonic(), -1

    def begin(self, batch: Mapping[str, Tensor], waited: float) -> None:
        """Counts the operations of a step on one example of the first ``batch``, for which the process ``waited``."""
        of_one = flops_of_example(self.state.ema.whole, part_of(batch, 0, 1), self.runtime)
        self.throughput.flops = of_one * self.options.batch_size / self.runtime.world_size
        self.throughput.begin(waited)

    @property
    def file_due(self) -> bool:
        """Whether enough time has passed for a resume file."""
        return time.monotonic() - self.saved_at > 60 * self.options.checkpoint_minutes

    def validate_and_save(self, tensors: dict[str, Any], validation_due: bool) -> None:
        """Validates if a validation is due, and writes a resume file with the `tensors_of` the state."""
        if validation_due:
            self._validate()
        self._save(tensors)
        self.throughput.restart()

    def log_steps(self, steps: Sequence[StepNumbers], waited: float) -> None:
        """Logs steps that the device has just finished."""
        if not steps:
            return
        seconds, now = self.throughput.read(len(steps), waited), time.time()
        for i, numbers in enumerate(steps, start=1):
            self.log.step(numbers.step, numbers.loss, numbers.norm, now - (len(steps) - i) * seconds)

    def show(self) -> None:
        """Shows the progress."""
        state, speed = self.state, self.throughput
        seconds_left = (self.last_step - state.step) * speed.seconds_per_step
        rate = speed.examples / speed.seconds_per_step if speed.seconds_per_step else 0.0
        self.callbacks.progress(
            Progress(
                state.step, self.last_step, state.loss, seconds_left, state.score, rate, speed.waiting, state.skipped
            )
        )

    def save_interrupted(self, with_model: bool) -> None:
        """Writes a resume file, and the model if it is wanted and no validation has written one yet."""
        # Processes that share the weights out had to gather them together.
        if self.saved_step != self.state.step and not self.runtime.sharded:
            self._save(tensors_of(self.state, self.runtime))
        if with_model and not self.state.best:
            self.callbacks.save(self.state.ema.whole, self.state.step, {})

    def _validate(self) -> None:
        """Validates, and saves the model if it is the best; nothing changes if a signal comes meanwhile."""
        state = self.state
        try:
            with self.interrupt.at_once():
                numbers = dict(self.callbacks.validate(state.ema.whole))
        except Interruption:  # the resumed run validates this step
            return
        signs = {name: numbers.pop(name) for name in (EMPTY, EQUAL) if name in numbers}
        if numbers["score"] > state.best.get("score", float("-inf")):
            self.callbacks.save(state.ema.whole, state.step, numbers)
            state.best = {**numbers, "step": float(state.step)}  # not before: a second Ctrl-C may end the writing
        self.health.check(state.step, {**numbers, **signs}, state.best)
        throughput = {**self.throughput.numbers(), "skipped_steps": float(state.skipped)}
        rate = state.optimizers[0].param_groups[0]["lr"]
        self.log.validation(state.step, state.loss, rate, {**numbers, **signs}, throughput)
        state.score, state.validated = numbers["score"], state.step

    def _save(self, tensors: dict[str, Any]) -> None:
        self.checkpoints.save(self.state, tensors)
        self.saved_at, self.saved_step = time.monotonic(), self.state.step
