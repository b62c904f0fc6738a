"""The loop over scans of several commands: it skips finished scans, and a scan that fails does not stop the others."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Generic, Literal, TypeVar

from medseg_diffusion.errors import MedsegError
from medseg_diffusion.volumes.inputs import find_scans
from medseg_diffusion.volumes.outputs import Outputs
from medseg_diffusion.volumes.paths import scan_name
from medseg_diffusion.volumes.volume import Volume

Model = TypeVar("Model")


@dataclass(frozen=True)
class ScanResult:
    """The result for one scan.

    Attributes:
        scan: The file, or the folder of a DICOM series.
        status: "done", "failed", or "skipped" if the result existed.
        outputs: Kind (segmentation, preview, ...) -> file that was written.
        seconds: Time taken, without reading the scan and loading the model.
        volumes_ml: Name of a class or anomaly -> its volume.
        members_ml: Class name -> smallest and largest volume of the members.
        intervals_ml: Class name -> calibrated interval of its volume.
        level: Share of scans whose interval contains the reference's volume.
        quality: Quality of a segmentation (`medseg_diffusion.models.segmentation.Segmentation`).
        error: Error message in one line, if the scan failed.
        exit_code: Exit code of that failure.
        warnings: Facts that the reader should know, one sentence each.
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
    """The scan that a command is processing.

    Attributes:
        path: The file, or the folder of a DICOM series.
        volume: The loaded scan.
        outputs: Kind -> file to write.
        on_progress: To be called with the share done.
        started: `time.monotonic` when it had been read.
    """

    path: Path
    volume: Volume
    outputs: Outputs
    on_progress: Callable[[float], None]
    started: float

    @property
    def name(self) -> str:
        """Name of the file without its suffix, from which the scan's seed is derived."""
        return scan_name(self.path)

    @property
    def seconds(self) -> float:
        """Seconds since the scan had been read."""
        return time.monotonic() - self.started


@dataclass(frozen=True)
class Work(Generic[Model]):
    """The steps of a command for each scan.

    Attributes:
        read: Reads the volume of a path.
        load: Loads the model, before the first scan that needs it.
        run: Writes the results of one scan, the output ``last`` at the end.
        last: Kind of output whose file marks a finished scan.
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
    """Process scans one after another. A scan that fails does not stop the others.

    Args:
        outputs: Scan -> kind -> file to write, in the order of processing.
        work: The steps for each scan.
        skip_existing: Skip finished scans.
        on_case: Called after every scan.
        on_progress: Called with (scan name, share done).

    Raises:
        MedsegError: An error in the model or the options, which concerns every scan.
    """
    model: Model | None = None
    results: list[ScanResult] = []
    for path, files in outputs.items():
        if skip_existing and files[work.last].exists():
            result = ScanResult(path, "skipped", {work.last: files[work.last]})
        else:
            report = _share_of(path, on_progress)
            with _remarks() as remarks:
                try:
                    # The scan is read before the model is loaded, so that a broken file is reported at once.
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
            result = replace(result, warnings=(*remarks, *result.warnings))
        results.append(result)
        if on_case is not None:
            on_case(result)
    return results


@contextmanager
def _remarks() -> Iterator[list[str]]:
    """The messages of the package's own warnings in the block, each once; all others are shown as usual."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            yield messages
        finally:
            own = [one for one in caught if one.category is UserWarning]
            messages += dict.fromkeys(str(one.message) for one in own)
    for other in caught:
        if other.category is not UserWarning:
            warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)


def all_scans(paths: Sequence[Path]) -> list[Path]:
    """The scans in files and folders, each only once.

    Raises:
        InputError: A path that does not exist, or a folder without scans.
    """
    return list(dict.fromkeys(scan for path in paths for scan in find_scans(path)))


def _share_of(path: Path, on_progress: Callable[[str, float], None] | None) -> Callable[[float], None]:
    if on_progress is None:
        return lambda done: None
    name = scan_name(path)
    return lambda done: on_progress(name, done)
