"""The table beside the results of many scans, as CSV: one row a scan, with its numbers and reasons to look at it."""

from __future__ import annotations

import csv
import io
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from medseg_diffusion.errors import UsageError, remark
from medseg_diffusion.files import write_files

from .scans import ScanResult, of_part

FIRST = ("scan", "output", "status")
"""The first columns of every table, by which it is recognised."""
LAST = ("model", "model_sha256", "seconds", "flags", "warnings", "error")
"""Columns of every table, after its numbers."""
BETWEEN = " | "
"""Stands between several flags, and between several warnings."""
EVERY_S = 10.0
"""The table is written again while scans are processed, when it is older than this: a killed run loses little."""

Row = Mapping[str, str]


class ResultsTable:
    """Collects the rows inside a ``with`` block, and writes the table now and then and at the end, always whole.

    Rows of earlier calls stay, if their output still exists, until this call comes to the scan.

    Args:
        path: The file; None collects and writes nothing.
        columns: Its columns between `FIRST` and `LAST`.
        numbers: The numbers of a scan by column. Columns that it leaves out are empty.
        outputs: The marking output of every scan of this call.

    Raises:
        UsageError: Another file stands in its place.
    """

    def __init__(
        self,
        path: Path | None,
        columns: Sequence[str],
        numbers: Callable[[ScanResult], Mapping[str, object]],
        outputs: Mapping[Path, Path],
    ) -> None:
        self._path, self._columns, self._numbers = path, list(columns), numbers
        self._written = -EVERY_S
        self._rows: list[Row] = []
        self._names: dict[Path, str] = {}
        self._earlier: dict[str, Row] = {}
        self._known: dict[str, Row] = {}
        if path is not None:
            # From the table's folder, so that both can be moved together.
            self._names = {scan: _relative(output, path.parent) for scan, output in outputs.items()}
            self._earlier = {row["output"]: row for row in read_table(path) if (path.parent / row["output"]).is_file()}
            ours = set(self._names.values())
            self._known = {
                row["output"]: row for one in _tables_beside(path) for row in read_table(one) if row["output"] in ours
            }

    def __enter__(self) -> ResultsTable:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._rows:
            self._write()

    def earlier(self, scan: Path) -> Row:
        """The row of a scan in the newest table of an earlier call, however it was divided; empty without one."""
        return self._known.get(self._names.get(scan, ""), {})

    def add(self, result: ScanResult) -> None:
        """Add the row of a scan."""
        if self._path is None:
            return
        self._earlier.pop(self._names[result.scan], None)
        self._rows.append(
            {
                "scan": str(result.scan),
                "output": "" if result.status == "failed" else self._names[result.scan],
                "status": result.status,
                **{name: _field(value) for name, value in self._numbers(result).items()},
                "model": result.model,
                "model_sha256": result.model_sha256,
                "seconds": _field(result.seconds or None),
                "flags": BETWEEN.join(result.flags),
                "warnings": BETWEEN.join(_line(warning) for warning in result.warnings),
                "error": _line(result.error or ""),
            }
        )
        if time.monotonic() - self._written >= EVERY_S:
            self._write()

    def _write(self) -> None:
        assert self._path is not None
        text = io.StringIO()
        known = (*FIRST, *self._columns, *LAST)
        further = dict.fromkeys(name for row in self._earlier.values() for name in row if name not in known)
        columns = [*FIRST, *self._columns, *further, *LAST]
        rows = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        rows.writeheader()
        rows.writerows([*self._earlier.values(), *self._rows])
        try:
            write_files(self._path.parent, {self._path.name: text.getvalue().encode(errors="surrogateescape")})
        except OSError as error:
            remark(f"{self._path}: {error.strerror or error}; the table is not written")
        self._written = time.monotonic()


def read_table(path: Path) -> list[Row]:
    """The rows of a table of an earlier call; none without a file.

    Raises:
        UsageError: The file is no such table.
    """
    if not path.exists():
        return []
    try:
        with path.open(newline="", errors="surrogateescape") as file:
            rows = csv.DictReader(file)
            if tuple(rows.fieldnames or ())[: len(FIRST)] == FIRST:
                return [{name: row[name] or "" for name in rows.fieldnames or ()} for row in rows]
    except (OSError, csv.Error):
        pass
    raise UsageError(f"{path}: is no table of results; move it, or give -o another folder")


def _tables_beside(path: Path) -> list[Path]:
    """The tables of a kind in a folder, of all scans and of parts, the oldest first."""
    name = path.name.split(".")[0]
    files = [file for pattern in (f"{name}.csv", f"{name}.*-of-*.csv") for file in path.parent.glob(pattern)]
    return sorted(files, key=lambda file: file.stat().st_mtime_ns)


def table_path(name: str, outputs: Sequence[Path], folder: Path | None, part: tuple[int, int] | None) -> Path | None:
    """The file of the table in `table_folder`, or None.

    Args:
        name: Name of the table without suffix.
        outputs: The marking outputs of all scans.
        folder: The folder given with -o.
        part: The part of the scans that this call takes. Each has its own table: volumes.1-of-4.csv.
    """
    place = table_folder(outputs, folder)
    return None if place is None else of_part(place / f"{name}.csv", part)


def table_folder(outputs: Sequence[Path], folder: Path | None) -> Path | None:
    """Where tables of several scans stand: in the folder given with -o, or else in that of all outputs.

    None for a single scan, and for outputs in several folders without -o.
    """
    folders = {output.parent for output in outputs}
    if len(outputs) < 2 or (folder is None and len(folders) > 1):
        return None
    (one,) = {folder} if folder is not None else folders
    return one


def _relative(output: Path, folder: Path) -> str:
    return Path(os.path.relpath(output, folder)).as_posix()


def _field(value: object) -> str:
    return "" if value is None else repr(value) if isinstance(value, float) else str(value)


def _line(text: str) -> str:
    return " ".join(text.split())
