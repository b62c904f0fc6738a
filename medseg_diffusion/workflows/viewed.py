"""Scans and their results, read again from their files for the viewer of a page."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from medseg_diffusion.errors import UsageError
from medseg_diffusion.files import write_files
from medseg_diffusion.volumes.outputs import require_report
from medseg_diffusion.volumes.volume import Volume

from .run_report import described
from .scans import ScanResult

MOST_VIEWED = 20
"""Largest number of scans in the viewer of a page."""
MOST_VOXELS = 250_000_000
"""Largest number of voxels of all images in the viewer, before they are made smaller: a gigabyte."""


def refuse_report(report: Path | None, run_report: Path | None, files: Mapping[Path, Sequence[Path]]) -> None:
    """UsageError if a page cannot be written, or would overwrite a scan or the report on the run.

    Args:
        report: The page.
        run_report: The report on the run.
        files: Every scan, with the files that are read for it.
    """
    if report is None:
        return
    require_report(report, [file for each in files.values() for file in each])
    if report == run_report:
        raise UsageError(f"{report}: named by --report and by --run-report; give each its own file")


def how_far(done: int, count: int, error: BaseException) -> str:
    """What a page says of a call that an error has ended before all scans were processed."""
    by = {"KeyboardInterrupt": "Ctrl-C", "SystemExit": "a signal"}.get(type(error).__name__) or described(error)
    return f"the call was stopped after {done} of {count} scans: {by}"


class BatchReport(ABC):
    """Collects the results inside a ``with`` block, and writes a page at the end, also if an error ends the block.

    Args:
        path: The page; None collects and writes nothing.
        read: Reads a scan.
        command: The command line; empty shows none.
        count: Number of scans of the call.
    """

    def __init__(self, path: Path | None, read: Callable[[Path], Volume], command: str, count: int) -> None:
        self._path, self._read, self._command, self._count = path, read, command, count
        self._results: list[ScanResult] = []
        self._made: dict[str, str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Where nothing was done, the errors say all.
        if self._path is not None and any(result.status != "failed" for result in self._results):
            stopped = "" if error is None else how_far(len(self._results), self._count, error)
            write_files(self._path.parent, {self._path.name: self._page(self._path, stopped)})

    def add(self, result: ScanResult) -> None:
        """Note the result of a scan."""
        if self._path is not None:
            self._results.append(result)

    @abstractmethod
    def _page(self, path: Path, stopped: str) -> str:
        """The text of the page; ``stopped`` says what ended the call early, if anything did."""


def remarks_of(result: ScanResult) -> tuple[str, ...]:
    """What a page says of a scan: its warnings, or its error without the path, which stands beside it."""
    if result.error is None:
        return result.warnings
    return (result.error.removeprefix(f"{result.scan}: "),)


def made_by(result: ScanResult) -> str:
    """The model that made a result, with its weights as far as they are known; empty if it is not known."""
    return f"{result.model} (weights {result.model_sha256[:12]})" if result.model_sha256 else result.model


class ViewerCapacity:
    """How many scans fit into the viewer: at most `MOST_VIEWED`, fewer if they are large.

    All of them are in memory until the page is written.
    """

    def __init__(self) -> None:
        self._cases, self._voxels = 0, 0

    def for_more(self, volumes: Collection[Volume]) -> bool:
        """Take the volumes of a further scan, unless they are too many. The first scan is always taken."""
        self._cases += 1
        self._voxels += sum(volume.data.numel() for volume in volumes)
        return self._cases == 1 or (self._cases <= MOST_VIEWED and self._voxels <= MOST_VOXELS)
