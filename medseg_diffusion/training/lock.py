"""A run folder belongs to one process at a time: two would take each other's files for those of a killed process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from pathlib import Path

from medseg_diffusion.errors import UsageError

_held: ContextVar[ExitStack] = ContextVar("held")


@contextmanager
def holding_runs() -> Iterator[None]:
    """Around a training: what `hold` holds inside the block is free again at its end. It serves as a decorator."""
    with ExitStack() as held:
        outer = _held.set(held)
        try:
            yield
        finally:
            _held.reset(outer)


def hold(run: Path) -> None:
    """Keeps other processes out of the run folder until the end of `holding_runs`, or of this process.

    The lock is on config.yaml, which never changes. The system takes it away from a process that ends, even a killed
    one. Without locks (Windows, some network file systems) nothing is kept out.

    Raises:
        UsageError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:
        return
    # Network file systems lock only what is open for writing.
    file = _held.get().enter_context((run / "config.yaml").open("rb+"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(
            f"{run}: is being trained by another process; wait until it has ended, or choose another folder"
        ) from error
    except OSError:
        return
