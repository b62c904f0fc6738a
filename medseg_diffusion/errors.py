"""What a user is told: exceptions, each with the exit code of the command line, and remarks on files and options.

Scans are read, computed and written in several threads at once. Python's filters of warnings belong to the whole
process: two threads that change and restore them leave them broken. Remarks are therefore collected without them.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path


class MedsegError(Exception):
    """Base of every expected failure: one line for the user, no traceback."""

    exit_code = 1


class UsageError(MedsegError):
    """The request itself is wrong: an unknown option, preset, key or combination (exit code 2)."""

    exit_code = 2


class InputError(MedsegError):
    """A file that cannot be used (exit code 3).

    The message is always one line: the file, what was found, what was expected and what to do about it.
    """

    exit_code = 3

    def __init__(self, source: Path | str | None, found: str, expected: str, remedy: str) -> None:
        self.source, self.found, self.expected, self.remedy = source, found, expected, remedy
        where = f"{source}: " if source is not None else ""
        super().__init__(f"{where}found {found}; expected {expected}; {remedy}")

    def __reduce__(self) -> tuple[type[InputError], tuple[Path | str | None, str, str, str]]:
        """Pickled by its parts: processes hand errors on, and an exception is otherwise rebuilt from its message."""
        return type(self), (self.source, self.found, self.expected, self.remedy)


class ModelError(MedsegError):
    """A model that is missing, incomplete or does not fit what is asked of it (exit code 4)."""

    exit_code = 4


class Stopped(MedsegError):
    """A scheduler has ended the work with SIGTERM or SIGUSR1, and it can be continued (exit code 75, EX_TEMPFAIL).

    The message says where the work stands.
    """

    exit_code = 75


def listed(items: Sequence[object], limit: int = 20) -> str:
    """The items separated by commas; of a long list the first items and the number of the others."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(map(str, items[:limit])) + more


# ---- remarks ---------------------------------------------------------------------------------------------------------

_collected: ContextVar[list[str] | None] = ContextVar("remarks", default=None)
_quieting = threading.Lock()
_quiet: list[warnings.catch_warnings] = []  # one entry for each block that a thread is in
_MESSAGES = ("Glyph .* missing from font",)  # of the font that measures texts of a page; the browser has another
_LIBRARIES = ("PIL", "highdicom", "nibabel", "numpy", "pydicom", r"torch\._(dynamo|inductor)")


def remark(message: str) -> None:
    """Say something that the user should know about a file or an option: to `remarks`, or else as a UserWarning."""
    said = _collected.get()
    if said is None:
        warnings.warn(message, stacklevel=3)
    elif message not in said:
        said.append(message)


@contextmanager
def remarks() -> Iterator[list[str]]:
    """The remarks made inside the block by this thread, each once, in their order."""
    said: list[str] = []
    token = _collected.set(said)
    try:
        yield said
    finally:
        _collected.reset(token)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Without the warnings of libraries that read and write files, which do not name the file, and of the compiler.

    And without those of matplotlib on letters that its own font lacks.

    Our own remarks are made all the same. Several threads may be in such a block: the first one that comes changes the
    filters, and the last one that leaves restores them.
    """
    with _quieting:
        if not _quiet:
            _quiet.append(warnings.catch_warnings())
            _quiet[0].__enter__()
            for library in _LIBRARIES:
                warnings.filterwarnings("ignore", module=library)
            for message in _MESSAGES:
                warnings.filterwarnings("ignore", message)
        else:
            _quiet.append(_quiet[0])
    try:
        yield
    finally:
        with _quieting:
            first = _quiet.pop()
            if not _quiet:
                first.__exit__(None, None, None)
