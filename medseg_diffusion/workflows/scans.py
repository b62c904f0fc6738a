"""The loop over scans that several commands share: read, skip what is finished, fail alone, report."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Literal, TypeVar

from medseg_diffusion.errors import MedsegError
from medseg_diffusion.volumes.outputs import Outputs
from medseg_diffusion.volumes.paths import find_scans, scan_name
from medseg_diffusion.volumes.volume import Volume

Model = TypeVar("Model")


@dataclass(frozen=True)
class ScanResult:
    """What became of one scan.

    Attributes:
        scan: the file, or the folder of a DICOM series.
        status: "skipped" where the result was there already.
        outputs: kind (segmentation, preview, ...) to the file written.
        seconds: time taken, without reading the scan and loading the model.
        volumes_ml: name of what was found to its volume.
        members_ml: class name to the smallest and largest volume of the members.
        intervals_ml: class name to the calibrated interval of its volume.
        level: share of scans whose interval holds the reference's volume.
        quality: of a segmentation (`medseg_diffusion.models.segmentation.Segmentation`).
        error: one line, where the scan failed.
        exit_code: of that failure.
        warnings: what the reader should know, one sentence each.
    """

    scan: Path
    status: Literal["done", "skipped", "failed"]
    outputs: Outputs = field(default_factory=dict)
    seconds: float = 0.0
    volumes_ml: dict[str, float] = field(default_factory=dict)
    members_ml: dict[str, tuple[float, float]] = field(default_factory=dict)
    intervals_ml: dict[str, tuple[float, float]] = field(default_factory=dict)
    level: float | None = None
    quality: Literal["usual", "check"] | None = None
    error: str | None = None
    exit_code: int = 0
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Scan:
    """A scan that is being worked on.

    Attributes:
        path: the file, or the folder of a DICOM series.
        volume: what was read of it.
        outputs: kind to the file to write.
        on_progress: to be called with the share done.
        started: `time.monotonic` when it had been read.
    """

    path: Path
    volume: Volume
    outputs: Outputs
    on_progress: Callable[[float], None]
    started: float

    @property
    def name(self) -> str:
        """The file's name without its suffix, which decides the scan's seed."""
        return scan_name(self.path)

    @property
    def seconds(self) -> float:
        """Time taken so far, without reading."""
        return time.monotonic() - self.started


@dataclass(frozen=True)
class Work(Generic[Model]):
    """What a command does with each scan.

    Attributes:
        read: path to volume.
        load: loads the model, before the first scan that needs it.
        run: writes the results of one scan, the output ``last`` at the end.
        last: kind of output; where its file is, the scan is finished.
    """

    read: Callable[[Path], Volume]
    load: Callable[[], Model]
    run: Callable[[Model, Scan], ScanResult]
    last: str


def each_scan(
    outputs: Mapping[Path, Outputs],
    work: Work[Model],
    *,
    skip_existing: bool = False,
    on_case: Callable[[ScanResult], None] | None = None,
    on_progress: Callable[[str, float], None] | None = None,
) -> list[ScanResult]:
    """Works on scans one after another. A scan that fails stops no other.

    Args:
        outputs: the scans, in order, with the files to write.
        work: what is done with each of them.
        skip_existing: leave finished scans alone.
        on_case: called after every scan.
        on_progress: called with (scan name, share done).

    Raises:
        MedsegError: what concerns the model or the options, and so every scan.
    """
    model: Model | None = None
    results: list[ScanResult] = []
    for path, files in outputs.items():
        if skip_existing and files[work.last].exists():
            result = ScanResult(path, "skipped", {work.last: files[work.last]})
        else:
            report = _share_of(path, on_progress)
            try:
                # The scan is read before the model is loaded: a mistyped path is answered at once.
                volume = work.read(path)
                model = work.load() if model is None else model
                result = work.run(model, Scan(path, volume, files, report, started=time.monotonic()))
            except MedsegError as error:
                if model is None and error.exit_code != 3:
                    raise
                result = ScanResult(path, "failed", error=str(error), exit_code=error.exit_code)
            except Exception as error:
                text = " ".join(str(error).split()) or type(error).__name__
                result = ScanResult(path, "failed", error=f"{path}: {type(error).__name__}: {text}", exit_code=1)
        results.append(result)
        if on_case is not None:
            on_case(result)
    return results


def all_scans(paths: Sequence[Path]) -> list[Path]:
    """The scans that files and folders stand for, each once.

    Raises:
        InputError: a path that does not exist, or a folder without scans.
    """
    return list(dict.fromkeys(scan for path in paths for scan in find_scans(path)))


def _share_of(path: Path, on_progress: Callable[[str, float], None] | None) -> Callable[[float], None]:
    if on_progress is None:
        return lambda done: None
    name = scan_name(path)
    return lambda done: on_progress(name, done)
