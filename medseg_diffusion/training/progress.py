"""Progress, told in one way by everything that takes long: a text, and the share that is done."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .options import Progress

OnProgress = Callable[[str, float], None]
"""Called with what is being done, and the share of it that is done, 0 to 1."""


def silent(what: str, share: float) -> None:
    """Show no progress."""


def count_of(on_progress: OnProgress) -> Callable[[str, int, int], None]:
    """A callback (what, done, total) that tells "what: done of total"."""
    return lambda what, done, total: on_progress(f"{what}: {done} of {total}", done / max(total, 1))


def step_text(state: Progress) -> str:
    """A step of a training in words: loss, the last score, speed, and the time left.

    A wait for examples is told where it takes a tenth of the time or more.
    """
    score = f", score {state.score:.3f}" if state.score is not None else ""
    speed = f", {state.examples_per_s:.3g} examples/s"
    if state.waiting >= 0.1:
        speed += f" ({state.waiting:.0%} of the time waiting for them)"
    skipped = f", {state.skipped} steps skipped" if state.skipped else ""
    left = f", {state.seconds_left / 60:.0f} min left"
    return f"step {state.step} of {state.max_steps}, loss {state.loss:.4f}{score}{speed}{skipped}{left}"
