"""The training loop that every model of the package shares."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from medseg_diffusion.diffusion.noise import derive_seed

from .batches import Batches, passes
from .ema import EMA
from .health import StepHealth, StepNumbers, ValidationHealth
from .interrupt import Interrupt
from .log import TrainingLog
from .readings import Readings
from .resume import TrainingState, load_state, save_state
from .runtime import Runtime
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
        resume: continue from checkpoints/last.pt. A run that was stopped before it had one starts again.
        max_steps: stop after this step even if the run is longer; the learning rate follows
            `TrainingOptions.max_steps`.
        time_limit_min: stop this call after so many minutes.
    """

    folder: Path
    seed: int = 0
    resume: bool = False
    max_steps: int | None = None
    time_limit_min: float | None = None

    @property
    def resume_file(self) -> Path:
        return self.folder / "checkpoints" / "last.pt"


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
) -> dict[str, float]:
    """Trains ``model`` (batch -> scalar loss) until the last step, a limit, or Ctrl-C; returns the best numbers.

    ``run.folder`` receives checkpoints/last.pt (everything to resume bit-exactly), log.csv and tensorboard/.
    ``callbacks.save`` receives the averaged weights whenever a validation is the best so far. A resume file is written
    before Ctrl-C or a limit ends the call.

    Args:
        model: called with a batch, returns the loss. With `SeveralParts` it is the sum of losses of one part each.
        draws: the n-th training example by number (`medseg_diffusion.data.draws.Draws`).
        options: the optimisation.
        callbacks: validation, model writing, progress.
        run: folder, seed, resuming and limits.
        runtime: device, precision, processes.

    Raises:
        MedsegError: loss or gradient were not finite in too many steps, or the processes cannot share a batch evenly.
        InputError: nothing to resume from, or an unusable resume file.
    """
    began = time.monotonic()
    state = _initial_state(model, options, run, runtime)
    last = min(options.max_steps, run.max_steps or options.max_steps)
    batches = Batches(draws, options.batch_size, state.step, last, options.workers, runtime)
    readings = Readings(options.read_every, alone=runtime.world_size == 1)
    health = StepHealth(runtime.precision)
    recorder = _Recorder(state, last, options, callbacks, run, runtime) if runtime.is_main else None
    interrupt = Interrupt()
    between_steps = True

    def read_back() -> None:
        """Waits for the device, counts what it has done, and logs it. All processes see the same numbers."""
        numbers = readings.read()
        if recorder is not None:
            recorder.log_steps(numbers, batches.waited)
        for one in numbers:
            _count(one, state)
            if not one.finite:
                health.check(one, state.skipped_in_a_row, learning_rate(one.step - 1, options))

    # Saturated softmax heads leave gradients, and Adam's moments, full of denormals, which CPUs handle 10 to 100 times
    # slower than other numbers.
    torch.set_flush_denormal(True)
    try:
        if recorder is not None and state.step < last:
            recorder.begin(draws)
        batch_iterator = iter(batches)
        stop = state.step >= last
        while not stop:
            between_steps = False

            # Step
            loss, norms = _step(state, next(batch_iterator), options, run.seed, runtime)
            state.step += 1
            readings.add(state.step, loss, norms)
            between_steps = True

            # Decide what is next. Several processes have to agree, for which they wait for each other.
            at_end = state.step >= last
            validation_due = at_end or state.step % options.validate_every == 0
            out_of_time = interrupted = file_due = False
            if runtime.world_size == 1 or validation_due or state.step % options.read_every == 0:
                out_of_time, interrupted, file_due = runtime.any(
                    run.time_limit_min is not None and time.monotonic() - began > 60 * run.time_limit_min,
                    interrupt.requested,
                    recorder is not None and recorder.file_due,
                )
            stop = at_end or out_of_time
            validation_due = validation_due or stop

            # Read back
            if validation_due or file_due or interrupted or readings.due(state.step):
                read_back()

            # Validate and save
            if recorder is not None:
                recorder.validate_and_save(validation_due, file_due)
            if validation_due:
                runtime.wait()
            if recorder is not None:
                recorder.show()
            if interrupted:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        # A second Ctrl-C may come within a step, when weights and averages are of different steps. The resume file
        # then stays as it is.
        if between_steps and state.step:
            read_back()
            if recorder is not None:
                recorder.save_interrupted()
        raise
    finally:
        torch.set_flush_denormal(False)
        interrupt.restore()
        if recorder is not None:
            recorder.log.close()
    return state.best


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
    parts = model.optimised_parts() if isinstance(model, SeveralParts) else [list(model.parameters())]
    fused = runtime.device.type != "mps"
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(part, options.learning_rate, weight_decay=options.weight_decay, fused=fused) for part in parts
    ]
    wrapped, optimizers = runtime.prepare(model, optimizers)
    state = TrainingState(wrapped, optimizers, EMA(runtime.unwrap(wrapped), options.ema_decay))
    if run.resume and (run.resume_file.is_file() or not _has_only_begun(run.folder)):
        load_state(run.resume_file, state, runtime)
    return state


def _has_only_begun(folder: Path) -> bool:
    """Whether a run was started and stopped before its first validation and resume file."""
    return (folder / "config.yaml").is_file() and not (folder / "log.csv").is_file()


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
    ) -> None:
        self.state = state
        self.last_step = last_step
        self.options = options
        self.callbacks = callbacks
        self.run = run
        self.runtime = runtime
        self.log = TrainingLog(run.folder, state.step, run.resume)
        self.health = ValidationHealth(options.max_steps)
        self.throughput = Throughput(options.batch_size, 0.0, runtime)
        self.saved_at = time.monotonic()

    def begin(self, draws: Dataset[dict[str, Tensor]]) -> None:
        """Counts the operations of a step, on one example."""
        example = self.runtime.to_device(default_collate([draws[0]]))
        of_one = flops_of_example(self.state.ema.module, example, self.runtime)
        self.throughput.flops = of_one * self.options.batch_size / self.runtime.world_size
        self.throughput.restart()

    @property
    def file_due(self) -> bool:
        """Whether enough time has passed for a resume file."""
        return time.monotonic() - self.saved_at > 60 * self.options.checkpoint_minutes

    def validate_and_save(self, validation_due: bool, file_due: bool) -> None:
        """Validates if a validation is due, and writes the resume file after one or if that is due."""
        if validation_due:
            self._validate()
        if validation_due or file_due:
            self._save()
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

    def save_interrupted(self) -> None:
        """Writes the resume file, and the model if no validation has written one yet."""
        self._save()
        if not self.state.best:
            self.callbacks.save(self.state.ema.module, self.state.step, {})

    def _validate(self) -> None:
        state = self.state
        numbers = dict(self.callbacks.validate(state.ema.module))
        if numbers["score"] > state.best.get("score", float("-inf")):
            state.best = {**numbers, "step": float(state.step)}
            self.callbacks.save(state.ema.module, state.step, numbers)
        self.health.check(state.step, numbers, state.best)
        throughput = {**self.throughput.numbers(), "skipped_steps": float(state.skipped)}
        self.log.validation(state.step, state.loss, state.optimizers[0].param_groups[0]["lr"], numbers, throughput)
        state.score = numbers["score"]

    def _save(self) -> None:
        save_state(self.run.resume_file, self.state, self.runtime)
        self.saved_at = time.monotonic()
