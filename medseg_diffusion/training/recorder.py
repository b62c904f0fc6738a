"""What a training does between its steps: read the device, validate, save, log and show progress."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from types import TracebackType
from typing import Any

from torch import Tensor

from medseg_diffusion.errors import Stopped

from .batches import Batches, passes
from .health import EMPTY, EQUAL, StepHealth, StepNumbers, ValidationHealth
from .interrupt import Interrupt, Interruption
from .log import TrainingLog
from .options import Callbacks, Progress, TrainingOptions, TrainingRun, learning_rate
from .readings import Readings
from .resume import Checkpoints, TrainingState, tensors_of
from .runtime import Runtime
from .throughput import Throughput, flops_of_pass


class Recorder:
    """Reads, validates, saves, logs and shows. An interrupted block saves what is not saved yet.

    All processes call the methods at the same steps: they count the same numbers, and gather weights that they share
    out. The main process alone validates, writes and shows.

    Args:
        state: of the training.
        last_step: of this call.
        options: the optimisation.
        callbacks: validation, model writing, progress.
        run: folder, and whether it is resumed.
        runtime: device and processes.
        interrupt: signals that end a validation.
        batches: for the time that was waited for them.
    """

    def __init__(
        self,
        state: TrainingState,
        last_step: int,
        options: TrainingOptions,
        callbacks: Callbacks,
        run: TrainingRun,
        runtime: Runtime,
        interrupt: Interrupt,
        batches: Batches,
    ) -> None:
        self.state, self.last_step, self.batches = state, last_step, batches
        self.options, self.callbacks = options, callbacks
        self.runtime, self.interrupt = runtime, interrupt
        self.readings = Readings(options.read_every, alone=runtime.world_size == 1)
        self.health = StepHealth(runtime.precision)
        self.validation_health = ValidationHealth(options.max_steps)
        self.throughput = Throughput(options.batch_size, 0.0, runtime)
        self.checkpoints = Checkpoints(run.folder, options.checkpoints_kept)
        self.saved_at, self.saved_step = time.monotonic(), -1
        self.is_whole = True
        self.log = TrainingLog(run.folder, state.step, run.resume, options.trackers) if runtime.is_main else None
        if runtime.is_main:
            self.checkpoints.remove_left_over()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.log is None:
            return
        try:
            if isinstance(error, KeyboardInterrupt | Stopped) and self.is_whole and self.state.step:
                self.read_back()
                self._save_interrupted(with_model=isinstance(error, KeyboardInterrupt))
        finally:
            with nullcontext() if error is None else suppress(OSError):  # on a full disk, which another error tells
                self.log.close()

    # ---- steps -------------------------------------------------------------------------------------------------------

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Around what changes the state. If it is cut short by a second Ctrl-C, the resume files stay as they are."""
        self.is_whole = False
        yield
        self.is_whole = True

    def begin(self, batch: Mapping[str, Tensor]) -> None:
        """Counts the operations of a step on the first ``batch``, and starts the clock."""
        if self.log is None:
            return
        # Of a whole pass: some networks cannot compute a single example.
        share, part = passes(batch, self.options.examples_at_once)[0]
        self.throughput.flops = flops_of_pass(self.state.ema.whole, part, self.runtime) / share
        self.throughput.begin(self.batches.waited)

    def add(self, loss: Tensor, norms: Sequence[Tensor]) -> None:
        """Takes the numbers of the step that the device computes."""
        self.readings.add(self.state.step, loss, norms)

    @property
    def reading_due(self) -> bool:
        """Whether to read the numbers back."""
        return self.readings.due(self.state.step)

    def read_back(self) -> None:
        """Waits for the device, logs the numbers of its steps, and counts them.

        Raises:
            MedsegError: they were not finite in too many steps.
        """
        numbers = self.readings.read()
        with self.changing():
            self._log(numbers)
            for one in numbers:
                _count(one, self.state)
                if not one.finite:
                    self.health.check(one, self.state.skipped_in_a_row, learning_rate(one.step - 1, self.options))

    def _log(self, numbers: Sequence[StepNumbers]) -> None:
        if self.log is None or not numbers:
            return
        seconds, now = self.throughput.read(len(numbers), self.batches.waited), time.time()
        for later, one in zip(reversed(range(len(numbers))), numbers, strict=True):
            self.log.step(one.step, one.loss, one.norm, now - later * seconds)

    def show(self) -> None:
        """Shows the progress."""
        if self.log is None:
            return
        state, speed = self.state, self.throughput
        seconds_left = (self.last_step - state.step) * speed.seconds_per_step
        rate = speed.examples / speed.seconds_per_step if speed.seconds_per_step else 0.0
        self.callbacks.progress(
            Progress(
                state.step, self.last_step, state.loss, seconds_left, state.score, rate, speed.waiting, state.skipped
            )
        )

    # ---- validations and resume files --------------------------------------------------------------------------------

    @property
    def is_file_late(self) -> bool:
        """Whether enough time has passed for a resume file; the main process knows."""
        return self.log is not None and time.monotonic() - self.saved_at > 60 * self.options.checkpoint_minutes

    def save(self, validate: bool) -> None:
        """Writes a resume file, after a validation if ``validate`` is set. All numbers have to be read back before."""
        tensors = tensors_of(self.state, self.runtime)
        if self.log is None:
            return
        if validate:
            self._validate(self.log)
        self._write(tensors)
        self.throughput.restart()

    def _validate(self, log: TrainingLog) -> None:
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
        self.validation_health.check(state.step, {**numbers, **signs}, state.best)
        throughput = {**self.throughput.numbers(), "skipped_steps": float(state.skipped)}
        rate = state.optimizers[0].param_groups[0]["lr"]
        log.validation(state.step, state.loss, rate, {**numbers, **signs}, throughput)
        state.score, state.validated = numbers["score"], state.step

    def _write(self, tensors: dict[str, Any]) -> None:
        self.checkpoints.save(self.state, tensors)
        self.saved_at, self.saved_step = time.monotonic(), self.state.step

    def _save_interrupted(self, with_model: bool) -> None:
        """Writes a resume file, and the model if it is wanted and no validation has written one yet."""
        # Processes that share the weights out had to gather them together.
        if self.saved_step != self.state.step and not self.runtime.sharded:
            self._write(tensors_of(self.state, self.runtime))
        if with_model and not self.state.best and self.saved_step == self.state.step:
            self.callbacks.save(self.state.ema.whole, self.state.step, {})


def _count(numbers: StepNumbers, state: TrainingState) -> None:
    """Takes the numbers of a step into the smoothed loss and into the counts of skipped steps."""
    if not numbers.finite:
        state.skipped += 1
        state.skipped_in_a_row += 1
        return
    state.skipped_in_a_row = 0
    is_first = numbers.step == state.skipped + 1
    state.loss = numbers.loss if is_first else 0.98 * state.loss + 0.02 * numbers.loss
