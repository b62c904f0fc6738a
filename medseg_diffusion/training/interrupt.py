"""Signals that end a training: Ctrl-C, and those that schedulers send before they kill."""

from __future__ import annotations

import multiprocessing.resource_tracker
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from medseg_diffusion.errors import Stopped

SAME_PRESS_S = 1.0
"""Signals closer together than this count as one Ctrl-C: a launcher forwards it to processes that have it already."""

PREEMPTIONS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
"""Signals of a scheduler that takes the machine away: SIGTERM, and SIGUSR1 where the system has it."""


class Interruption(BaseException):
    """A signal has come inside `Interrupt.at_once`."""


class Interrupt:
    """Catches SIGINT (Ctrl-C), SIGTERM and SIGUSR1 inside its block, or until `restore` is called.

    A signal only sets ``requested``, so that the training loop can finish its step and save a consistent state. A
    second Ctrl-C raises `KeyboardInterrupt` at once. Outside the main thread, nothing is caught.
    """

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self.at = 0.0
        self.immediate = False
        caught = (signal.SIGINT, *PREEMPTIONS) if threading.current_thread() is threading.main_thread() else ()
        self.before = {number: signal.signal(number, self._handle) for number in caught}

    def _handle(self, number: int, frame: object) -> None:
        again = self.requested is not None and time.monotonic() > self.at + SAME_PRESS_S
        if self.requested is None:
            self.requested, self.at = signal.Signals(number), time.monotonic()
        if number == signal.SIGINT and again:
            raise KeyboardInterrupt
        if self.immediate:
            raise Interruption

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside the block, a signal raises `Interruption`: for work that can be repeated, such as a validation."""
        self.immediate = True
        try:
            if self.requested is not None:
                raise Interruption
            yield
        finally:
            self.immediate = False

    @contextmanager
    def kept_from_workers(self) -> Iterator[None]:
        """Signals wait for worker processes that are started inside the block, until these are `apart`."""
        if not self.before or not hasattr(signal, "pthread_sigmask"):
            yield
            return
        multiprocessing.resource_tracker.ensure_running()  # its start would unblock the signals
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, self.before)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def error(self, where: str) -> BaseException:
        """What ends the training after it has saved its state: `KeyboardInterrupt` for Ctrl-C, or else `Stopped`.

        ``where`` says where the run stands. Without a signal in this process, another one of the run has got it.
        """
        if self.requested == signal.SIGINT:
            return KeyboardInterrupt()
        return Stopped(f"{self.requested.name if self.requested else 'a signal to another process'}: {where}")

    def __enter__(self) -> Interrupt:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restores. A signal that came too late for the loop to end by it is left to the handlers of before."""
        self.restore()
        if error is None and self.requested is not None:
            signal.raise_signal(self.requested)

    def restore(self) -> None:
        """Brings back the handlers that were there before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)


def apart(worker: int) -> None:
    """Takes a worker process that prepares examples out of the process group; called by the worker at its start.

    Terminals and schedulers send their signals to the whole group. The worker would die of them, and the training
    process could not finish its step. Signals that the training process sends to end a worker still reach it.
    """
    if not hasattr(signal, "pthread_sigmask"):
        return
    os.setpgid(0, 0)
    caught = (signal.SIGINT, *PREEMPTIONS)
    before = [signal.signal(number, signal.SIG_IGN) for number in caught]  # forgets those that have come already
    signal.pthread_sigmask(signal.SIG_UNBLOCK, caught)
    for number, handler in zip(caught, before, strict=True):
        signal.signal(number, handler)


@contextmanager
def stopped_by_signals(where: str) -> Iterator[None]:
    """Inside the block, SIGTERM and SIGUSR1 raise `Stopped` at once; ``where`` says where the work stands.

    It is for work that leaves nothing behind or whole files only: preparing data, calibrating. `Interrupt` takes its
    place in a training loop. Outside the main thread, nothing is caught.
    """

    def stop(number: int, frame: object) -> None:
        raise Stopped(f"{signal.Signals(number).name}: {where}")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in PREEMPTIONS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
