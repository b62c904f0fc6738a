"""Ctrl-C asks for a stop once, however often the signal arrives at the same time."""

from __future__ import annotations

import signal

import pytest

from medseg_diffusion.training.interrupt import Interrupt


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
