"""The training loop that every model of the package shares."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from medseg_diffusion.diffusion.noise import derive_seed
from medseg_diffusion.errors import UsageError

from .batches import Batches, passes
from .ema import EMA
from .interrupt import Interrupt
from .options import Callbacks, Decay, Progress, TrainingOptions, TrainingRun, learning_rate
from .recorder import Recorder
from .resume import Checkpoints, TrainingState, full_disk_explained
from .runtime import Runtime
from .sharding import shard

__all__ = [
    "Callbacks",
    "Decay",
    "Ending",
    "KnowsStep",
    "Outcome",
    "Progress",
    "SeveralParts",
    "TrainingOptions",
    "TrainingRun",
    "fit",
    "learning_rate",
    "require_trainable",
]

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
        best: numbers of the best validation, and its "step". Of several processes, only the main one knows those of
            this call.
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


def require_trainable(model: nn.Module, batch_size: int, runtime: Runtime) -> None:
    """Raises what `fit` refuses, before any work is done. ``model`` may be without memory (device "meta").

    Raises:
        UsageError: the processes cannot share a batch evenly, or cannot share out the weights of several networks.
    """
    if batch_size % runtime.world_size:
        raise UsageError(f"batch_size {batch_size} must be a multiple of the {runtime.world_size} processes")
    if runtime.sharded and isinstance(model, SeveralParts):
        raise UsageError("a training with several networks cannot share their weights out; set training.sharding=false")


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
        MedsegError: the loss was not finite in too many steps, or the disk is full.
        UsageError: see `require_trainable`.
        InputError: nothing to resume from, or an unusable resume file.
    """
    require_trainable(model, options.batch_size, runtime)
    ends_at = math.inf if run.time_limit_min is None else time.monotonic() + 60 * run.time_limit_min
    state = _initial_state(model, options, run, runtime)
    first, last = state.step, min(options.max_steps, run.max_steps or options.max_steps)
    with (
        Interrupt() as interrupt,
        _without_denormals(),
        full_disk_explained(run.folder, state),
        _batches(draws, state.step, last, options, runtime, interrupt) as batches,
        Recorder(state, last, options, callbacks, run, runtime, interrupt, batches) as recorder,
    ):
        stop = first >= last
        # A signal has kept the call before from the validation of its last step.
        if state.validated < first and (stop or first % options.validate_every == 0):
            recorder.save(validate=True)
        signalled = runtime.any(interrupt.requested is not None)
        while not (stop or signalled):
            batch = next(batches)
            with recorder.changing():
                if state.step == first:
                    recorder.begin(batch)
                loss, norms = _step(state, batch, options, run.seed, runtime)
                state.step += 1
                recorder.add(loss, norms)

            following = _following(state.step, last, time.monotonic() > ends_at, options, recorder, interrupt, runtime)
            if following.save or recorder.reading_due:
                recorder.read_back()
            if following.save:
                recorder.save(following.validate)
            stop, signalled = following.stop, following.signalled
            if following.validate:  # the others wait here, and learn whether a signal has cut it short
                signalled = runtime.any(interrupt.requested is not None)
            recorder.show()
        if signalled:
            raise interrupt.error(_standing(state, options))
    finished = state.step >= options.max_steps
    ended: Ending = "finished" if finished else "max_steps" if state.step >= last else "time_limit"
    return Outcome(run.folder, state.step, options.max_steps, ended, state.best)


@dataclass(frozen=True)
class _Following:
    """What follows a step.

    Attributes:
        validate: whether to validate, and to write a resume file after that.
        save: whether to write a resume file.
        stop: whether this was the last step of the call.
        signalled: whether a signal has come, which ends the call.
    """

    validate: bool
    save: bool
    stop: bool
    signalled: bool


def _following(
    step: int,
    last: int,
    out_of_time: bool,
    options: TrainingOptions,
    recorder: Recorder,
    interrupt: Interrupt,
    runtime: Runtime,
) -> _Following:
    """Decides what follows a step, the same in all processes.

    Clocks and signals differ between processes. They ask each other, for which they wait, only where they have to read
    the device back anyway; a signal waits until then.
    """
    at_end = step >= last
    validate = at_end or step % options.validate_every == 0
    save = validate or (options.checkpoint_steps > 0 and step % options.checkpoint_steps == 0)
    signalled = False
    if runtime.world_size == 1 or save or step % options.read_every == 0:
        out_of_time, signalled, late = runtime.any_of(
            out_of_time, interrupt.requested is not None, recorder.is_file_late
        )
        save = save or out_of_time or signalled or late
        validate = (validate or out_of_time) and not signalled
    else:
        out_of_time = False
    return _Following(validate, save, at_end or out_of_time, signalled)


def _standing(state: TrainingState, options: TrainingOptions) -> str:
    if state.step == 0:
        return "stopped before the first step"
    return f"stopped after step {state.step} of {options.max_steps}, which is saved"


@contextmanager
def _without_denormals() -> Iterator[None]:
    """Inside the block, numbers too small for full precision are 0, in this thread and in those that it starts.

    Saturated softmax heads leave gradients, and Adam's moments, full of them, and CPUs take 10 to 100 times longer.
    """
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@contextmanager
def _batches(
    draws: Dataset[dict[str, Tensor]],
    first: int,
    last: int,
    options: TrainingOptions,
    runtime: Runtime,
    interrupt: Interrupt,
) -> Iterator[Batches]:
    """The batches of the steps from ``first`` to ``last``; the workers that prepare them end with the block."""
    with interrupt.kept_from_workers():
        batches = Batches(draws, options.batch_size, first, last, options.workers, runtime)
    try:
        yield batches
    finally:
        batches.close()


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
