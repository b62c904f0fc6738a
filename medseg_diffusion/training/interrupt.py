"""Ctrl-C during training."""

from __future__ import annotations

import signal
import threading
import time

SAME_PRESS_S = 1.0
"""Signals closer together than this count as one Ctrl-C: a launcher forwards it to processes that have it already."""


class Interrupt:
    """Catches Ctrl-C until `restore` is called.

    The first Ctrl-C only sets ``requested``, so that the training loop can finish its step and save a consistent state.
    The second one raises `KeyboardInterrupt` at once. Outside the main thread, nothing is caught.
    """

    def __init__(self) -> None:
        self.requested = False
        self.at = 0.0
        self.main = threading.current_thread() is threading.main_thread()
        self.before = signal.signal(signal.SIGINT, self._handle) if self.main else None

    def _handle(self, number: int, frame: object) -> None:
        if self.requested and time.monotonic() > self.at + SAME_PRESS_S:
            raise KeyboardInterrupt
        self.requested, self.at = True, time.monotonic()

    def restore(self) -> None:
        """Brings back the handler that was there before."""
        if self.main:
            signal.signal(signal.SIGINT, self.before)
