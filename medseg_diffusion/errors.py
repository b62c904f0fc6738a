"""The exceptions that a user can meet. Each carries the exit code that the command line returns for it."""

from __future__ import annotations

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


class ModelError(MedsegError):
    """A model that is missing, incomplete or does not fit what is asked of it (exit code 4)."""

    exit_code = 4
