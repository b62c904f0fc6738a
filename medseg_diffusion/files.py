"""Files and folders that appear whole or not at all: written under a temporary name beside the target, then renamed.

Temporary files are readable by their owner alone. Finished ones have the permissions that the umask leaves.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any
from uuid import uuid4

from medseg_diffusion.errors import UsageError


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that replaces it when the block ends without an error, and is removed otherwise.

    Raises:
        OSError: the file cannot be written.
    """
    temporary = path.with_name(_temporary_name(path.name))
    try:
        mode = _made_private(temporary)
        yield temporary
        temporary.chmod(mode)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path, replace: bool = False, private: bool = True) -> Iterator[Path]:
    """An empty folder beside ``path`` that takes its name when the block ends without an error.

    Args:
        path: the folder; its parents are made.
        replace: put the new folder in place of an existing one. Otherwise the existing one stays: another process was
            faster.
        private: keep it readable by its owner alone, as for copies of scans. Otherwise the folder and its files get
            the permissions that the umask leaves.

    Raises:
        OSError: the folder cannot be written. An existing one is left as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    old = path.with_name(f".{path.name}.old")
    try:
        yield temporary
        if not private:
            _make_usual(temporary)
        if path.exists() and not replace:
            return
        shutil.rmtree(old, ignore_errors=True)
        try:
            if path.exists():
                path.rename(old)
            temporary.rename(path)
        except BaseException:  # a signal, too, may come between the two
            if not path.exists() and old.exists():
                old.rename(path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def restore_folder(path: Path) -> None:
    """Brings back the folder that `whole_folder` was replacing when the process was killed, and removes what it left.

    No other process may be writing the folder.
    """
    old = path.with_name(f".{path.name}.old")
    if not path.exists() and old.exists():
        old.rename(path)
    for left_over in path.parent.glob(f".{path.name}.*"):
        shutil.rmtree(left_over, ignore_errors=True)


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """A folder beside ``path`` for the parts of a result before they are renamed; it is removed at the end.

    Raises:
        OSError: the folder cannot be made.
    """
    with TemporaryDirectory(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent) as folder:
        yield Path(folder)


def remove_left_over(targets: Iterable[Path], before: float) -> None:
    """Removes temporary files and folders of results that a killed process has left.

    Whether another machine still writes one cannot be asked, but what is being written changes all the time. Hence
    nothing is removed that has changed since ``before``. A process that is robbed of its file all the same reports an
    error; it never publishes half a file.

    Args:
        targets: the results of this run. Those of other runs, in the same folders, are not touched.
        before: the time at which this run began; seconds since the epoch.
    """
    names: dict[Path, set[str]] = {}
    for target in targets:
        names.setdefault(target.parent, set()).add(target.name)
    for folder, ours in names.items():
        with suppress(OSError):  # a folder that does not exist, or that another process is cleaning as well
            for entry in list(os.scandir(folder)):
                temporary = _TEMPORARY.fullmatch(entry.name)
                if temporary and temporary[1] in ours and _last_change(entry) < before:
                    if entry.is_dir(follow_symlinks=False):
                        shutil.rmtree(entry.path, ignore_errors=True)
                    else:
                        Path(entry.path).unlink(missing_ok=True)


def _last_change(entry: os.DirEntry[str]) -> float:
    """The time of the last change of a file, or of a folder and the files in it."""
    inside = list(os.scandir(entry.path)) if entry.is_dir(follow_symlinks=False) else []
    return max(one.stat(follow_symlinks=False).st_mtime for one in (entry, *inside))


def write_files(folder: Path, contents: Mapping[str, str | bytes]) -> tuple[Path, ...]:
    """Writes files into a folder. None of them is renamed before all of them are on the disk.

    Args:
        folder: made if it does not exist.
        contents: file name to content. Text becomes UTF-8; what UTF-8 cannot hold, such as a byte of a file's name that
            is no text, becomes an escape, which in JSON is an escape of JSON.

    Returns:
        The paths, in the order of ``contents``.

    Raises:
        OSError: the folder cannot be made or written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary = {name: folder / _temporary_name(name) for name in contents}
    try:
        modes = {name: _made_private(path) for name, path in temporary.items()}
        for name, content in contents.items():
            data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
            with temporary[name].open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for name, path in temporary.items():
            path.chmod(modes[name])
            path.replace(folder / name)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
    return tuple(folder / name for name in contents)


def require_table(path: Path, columns: Sequence[str]) -> None:
    """UsageError for a file in the place of a table that does not begin with its columns, such as the user's own."""
    if path.is_file():
        with path.open(errors="replace") as file:
            if file.readline().strip().split(",")[: len(columns)] != list(columns):
                raise UsageError(f"{path}: is no table of this command; move it, or give -o another folder")


def require_folder(path: Path) -> None:
    """UsageError unless ``path`` is a folder that can be written to, or can become one; nothing is made."""
    existing = path
    while not existing.exists():
        if existing.is_symlink():
            raise UsageError(f"{existing}: is a link to a path that does not exist; remove it or choose another folder")
        existing = existing.parent
    if not existing.is_dir():
        raise UsageError(f"{existing}: is a file, but results need a folder; choose another output")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"{existing}: cannot be written to; choose another output")


def require_new_folder(path: Path) -> None:
    """UsageError for a path that exists, or that cannot become a folder; nothing is made."""
    if path.exists():
        raise UsageError(f"{path}: exists; choose a new folder")
    require_folder(path)


def require_new_file(path: Path) -> None:
    """UsageError for a path that exists, or that cannot become a file; nothing is made."""
    if path.exists():
        raise UsageError(f"{path}: exists; choose a new file")
    require_folder(path.parent)


def require_replaceable(path: Path) -> None:
    """UsageError unless ``path`` is a file that can be replaced, or can become one; nothing is made."""
    if path.is_dir():
        raise UsageError(f"{path}: is a folder, but the result is a file; add a name")
    require_folder(path.parent)


def plain(value: Any) -> Any:
    """The value in the types of strict JSON: numbers that are not finite become null, paths and the like strings."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "item"):  # a numpy or torch scalar
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def as_paths(options: Any, *names: str) -> None:
    """Turns texts in these fields of a frozen dataclass into paths, and leaves other values as they are."""
    for name in names:
        if isinstance(value := getattr(options, name), str):
            object.__setattr__(options, name, Path(value))


def write_json(path: Path, content: Any) -> None:
    """Writes strict, indented JSON; ValueError for a number that is not finite."""
    write_files(path.parent, {path.name: json.dumps(content, indent=2, allow_nan=False) + "\n"})


def _made_private(path: Path) -> int:
    """Makes an empty file that only its owner can read, and returns the permissions that the umask leaves."""
    path.touch(exist_ok=False)
    mode = path.stat().st_mode & 0o777
    path.chmod(0o600)
    return mode


def _make_usual(folder: Path) -> None:
    """Gives a folder, and everything in it, the permissions that the umask leaves."""
    probe = folder / _temporary_name("mode")
    mode = _made_private(probe)
    probe.unlink()
    for path in (folder, *folder.rglob("*")):
        path.chmod(mode | (mode & 0o444) >> 2 if path.is_dir() else mode)  # who may read a folder may enter it


_TEMPORARY = re.compile(r"\.(.+)\.[^.]+\.tmp")
"""Names of `_temporary_name` and `temporary_folder`; the group is the name of the result."""


def _temporary_name(name: str) -> str:
    """A name of its own for each process and call."""
    return f".{name}.{os.getpid()}-{uuid4().hex[:8]}.tmp"
