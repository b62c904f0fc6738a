"""The loop over scans of several commands.

While one scan is computed, the next one is read and the results of the last one are written. Finished scans are
skipped, and a scan that fails does not stop the others.
"""

from __future__ import annotations

import csv
import hashlib
import io
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Generic, Literal, TypeVar

from medseg_diffusion.errors import MedsegError, ModelError, UsageError, remark, remarks
from medseg_diffusion.files import remove_left_over
from medseg_diffusion.training.progress import OnProgress, silent
from medseg_diffusion.volumes.inputs import find_scans
from medseg_diffusion.volumes.io import maker_of
from medseg_diffusion.volumes.outputs import Outputs
from medseg_diffusion.volumes.paths import scan_name
from medseg_diffusion.volumes.volume import Volume

Model = TypeVar("Model")
_LISTED = ("scan", "exit_code", "error")  # columns of the list of failed scans
Before = TypeVar("Before")
After = TypeVar("After")
Write = Callable[[], "ScanResult"]
"""Writes the results of one scan."""


@dataclass(frozen=True)
class ScanResult:
    """The result for one scan.

    Attributes:
        scan: The file, or the folder of a DICOM series.
        status: "done", "failed", or "skipped" if the result existed.
        outputs: Kind (segmentation, preview, ...) -> file that was written.
        seconds: Time taken, without reading, writing and loading the model.
        volumes_ml: Name of a class or anomaly -> its volume.
        members_ml: Class name -> smallest and largest volume of the members.
        intervals_ml: Class name -> calibrated interval of its volume.
        level: Share of scans whose interval contains the reference's volume.
        quality: Quality of a segmentation (`medseg_diffusion.models.segmentation.Segmentation`).
        error: Error message in one line, if the scan failed.
        exit_code: Exit code of that failure.
        warnings: Facts that the reader should know, one sentence each.
        flags: Reasons to look at the scan, in one or two words each: "failed", "empty mask", "unlike training",
            "members disagree", "above healthy", or "warning" for a remark on its files.
        model: Name of the model that computed the result; empty if that is not known.
        model_sha256: Hash of that model's weights; empty if it is not known.
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
    flags: tuple[str, ...] = ()
    model: str = ""
    model_sha256: str = ""

    @property
    def headline(self) -> str:
        """The numbers of the scan that are always printed; empty for none."""
        return ""


@dataclass(eq=False)
class Scan:
    """The scan that a command is processing.

    Attributes:
        path: The file, or the folder of a DICOM series.
        volume: The loaded scan.
        outputs: Kind -> file to write.
        on_progress: To be called with the share done.
        seconds: Time that it took to compute the results, in hundredths; known when they are written.
    """

    path: Path
    volume: Volume
    outputs: Outputs
    on_progress: Callable[[float], None]
    seconds: float = 0.0

    @property
    def name(self) -> str:
        """Name of the file without its suffix, from which the scan's seed is derived."""
        return scan_name(self.path)


@dataclass(frozen=True)
class Work(Generic[Model]):
    """The steps of a command for each scan.

    Attributes:
        read: Reads the volume of a path.
        load: Loads the model, before the first scan that needs it.
        compute: Computes the results of one scan, and returns the function that writes them, the output ``last`` at the
            end. Whatever that function holds stays in memory while the next scan is computed.
        last: Kind of output whose file marks a finished scan.
        finished: The result of a finished scan, which is not read; None tells no numbers.
    """

    read: Callable[[Path], Volume]
    load: Callable[[], Model]
    compute: Callable[[Model, Scan], Write]
    last: str
    finished: Callable[[Path, Outputs], ScanResult] | None = None


def each_scan(
    outputs: Mapping[Path, Outputs],
    work: Work[Model],
    *,
    skip_existing: bool = False,
    on_case: Callable[[ScanResult], None] | None = None,
    on_progress: OnProgress = silent,
    failures: Path | None = None,
) -> list[ScanResult]:
    """Process scans in their order. A scan that fails does not stop the others.

    Three scans are in memory at most: one is read, one computed and one written. Temporary files that an earlier run
    left for these outputs when it was killed are removed at the end.

    Args:
        outputs: Scan -> kind -> file to write, in the order of processing.
        work: The steps for each scan.
        skip_existing: Skip finished scans.
        on_case: Called after every scan, in their order, from the thread that writes.
        on_progress: Called with (scan name after its place, such as "3 of 8: scan", share done).
        failures: CSV file of the scans that fail (scan, exit_code, error), each added when it fails. It does not exist
            if none does, and replaces that of an earlier run. None writes no file.

    Raises:
        MedsegError: An error in the model or the options, which concerns every scan.
        UsageError: Another file stands in the place of ``failures``.
    """
    begun, results = time.time(), list[ScanResult]()
    model: Model | None = None
    if failures is not None:
        _remove_earlier(failures)

    def read(path: Path, files: Outputs) -> _Step[Volume | None]:
        return _Step(path).then(lambda path: None if skip_existing and files[work.last].exists() else work.read(path))

    def compute(number: int, path: Path, files: Outputs, volume: Volume | None) -> Write:
        if volume is None:
            if work.finished is not None:
                return partial(work.finished, path, files)
            return lambda: ScanResult(path, "skipped", {work.last: files[work.last]})
        assert model is not None
        place = f"{number} of {len(outputs)}: " if len(outputs) > 1 else ""
        scan = Scan(path, volume, files, partial(on_progress, f"{place}{scan_name(path)}"))
        started = time.monotonic()
        write = work.compute(model, scan)
        # Rounded here: a later call's page reads it from the files and must show the same. 0 would mean unknown.
        scan.seconds = max(round(time.monotonic() - started, 2), 0.01)
        return write

    def finish(path: Path, computed: _Step[Write]) -> None:
        written = computed.then(lambda write: write())
        result = _failed(path, written.value) if isinstance(written.value, Exception) else written.value
        if written.remarks:
            warnings = tuple(dict.fromkeys((*written.remarks, *result.warnings)))
            result = replace(result, warnings=warnings, flags=tuple(dict.fromkeys((*result.flags, "warning"))))
        results.append(result)
        if result.status == "failed" and failures is not None:
            _add_failure(failures, result)
        if on_case is not None:
            on_case(result)

    behind: Future[None] | None = None
    jobs = [partial(read, *item) for item in outputs.items()]
    # At the end, also after Ctrl-C, what was computed is written, and nothing else is begun.
    with (
        _noting_how_far(results, len(outputs)),
        ThreadPoolExecutor(1, "read") as reader,
        ThreadPoolExecutor(1, "write") as writer,
        closing(_one_ahead(reader, jobs)) as steps,
    ):
        for number, ((path, files), step) in enumerate(zip(outputs.items(), steps, strict=True), 1):
            if model is None and isinstance(step.value, Volume):
                # The first scan has been read by now, so that a broken file is reported at once.
                model = _loaded(work)
            computed = step.then(partial(compute, number, path, files))
            del step  # the writer holds what it needs
            if behind is not None:
                behind.result()
            behind = writer.submit(finish, path, computed)
            del computed
        if behind is not None:
            behind.result()
    remove_left_over((file for files in outputs.values() for file in files.values()), before=begun)
    return results


@contextmanager
def _noting_how_far(results: Sequence[ScanResult], count: int) -> Iterator[None]:
    """Note on Ctrl-C, or on another end by a signal, how many of the scans have results."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        stop.add_note(f"after {len(results)} of {count} scans")
        raise


def telling(*listeners: Callable[[ScanResult], None] | None) -> Callable[[ScanResult], None]:
    """A function that tells each listener of a result, in their order."""

    def tell(result: ScanResult) -> None:
        for listener in listeners:
            if listener is not None:
                listener(result)

    return tell


def _loaded(work: Work[Model]) -> Model:
    try:
        return work.load()
    except (MedsegError, OSError):
        raise
    except Exception as error:  # no memory, for instance
        raise ModelError(f"the model cannot be loaded: {_described(error)}") from error


@dataclass(frozen=True, eq=False)
class _Step(Generic[Before]):
    """What a scan has become: the value of its last step, or the first error; and the remarks made on the way."""

    value: Before | Exception
    remarks: tuple[str, ...] = ()

    def then(self, step: Callable[[Before], After]) -> _Step[After]:
        """The next step, in the thread that calls this."""
        value: After | Exception
        if isinstance(self.value, Exception):
            return _Step(self.value, self.remarks)
        with remarks() as said:
            try:
                value = step(self.value)
            except Exception as error:
                value = error.with_traceback(None)  # which would keep the volume in memory
        return _Step(value, (*self.remarks, *said))


def _one_ahead(executor: ThreadPoolExecutor, jobs: Iterable[Callable[[], After]]) -> Generator[After, None, None]:
    """The results of jobs, in their order; while one is used, the next job runs."""
    ahead: Future[After] | None = None
    try:
        for job in jobs:
            current, ahead = ahead, executor.submit(job)
            if current is not None:
                yield current.result()
        if ahead is not None:
            yield ahead.result()
    finally:
        if ahead is not None:
            ahead.cancel()


def _failed(path: Path, error: Exception) -> ScanResult:
    if isinstance(error, MedsegError):
        return ScanResult(path, "failed", error=str(error), exit_code=error.exit_code, flags=("failed",))
    return ScanResult(path, "failed", error=f"{path}: {_described(error)}", exit_code=1, flags=("failed",))


def _described(error: Exception) -> str:
    """An unexpected error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split()) or 'without a message'}"


def _remove_earlier(failures: Path) -> None:
    """Remove the list of an earlier run; UsageError for a file of the same name that is none."""
    if not failures.exists():
        return
    with failures.open(errors="replace") as file:
        if file.readline().strip() != ",".join(_LISTED):
            raise UsageError(f"{failures}: is no list of failed scans; move it, or give -o another folder")
    failures.unlink()


def _add_failure(file: Path, result: ScanResult) -> None:
    """Add a scan to the CSV file, in a single write: a run that is killed loses no failure and leaves no half line."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            rows.writerow(_LISTED)
        rows.writerow((result.scan, result.exit_code, " ".join(str(result.error).split())))
        with file.open("ab", buffering=0) as out:
            out.write(text.getvalue().encode(errors="surrogateescape"))
    except OSError as error:
        remark(f"{file}: {error.strerror or error}; failed scans are only listed here")


def refuse_foreign(results: Iterable[Path]) -> None:
    """UsageError for a result in whose place a file stands that medseg did not write, such as a mask drawn by hand.

    An empty file is replaced: nothing is lost with it, and ``mktemp`` makes one.
    """
    for path in results:
        if path.is_file() and path.stat().st_size and not maker_of(path):
            raise UsageError(
                f"{path}: a file that medseg did not write, which the result would replace; move it, give -o another "
                "name, or keep it with --skip-existing"
            )


def say_lacking(scans: Mapping[Path, Outputs], last: str, asked: Mapping[str, bool]) -> None:
    """Say in one remark which files that are asked for are missing beside the results of finished scans.

    Such scans are skipped all the same: their results may have been corrected by hand.

    Args:
        scans: Scan -> kind -> file.
        last: Kind of output whose file marks a finished scan.
        asked: Kind of output -> whether the options ask for it.
    """
    kinds = [kind for kind, wanted in asked.items() if wanted]
    finished = [files for files in scans.values() if files[last].exists()] if kinds else []
    missing = [[kind for kind in kinds if not files[kind].exists()] for files in finished]
    if any(missing):
        counts = Counter(kind for each in missing for kind in each)
        which = ", ".join(f"{kind} of {counts[kind]}" for kind in kinds if counts[kind])
        remark(
            f"{sum(map(bool, missing))} of {len(finished)} finished scans lack files that this call asks for ({which}) "
            "and stay skipped; process them with another -o, or without --skip-existing, which replaces their masks"
        )


def paths_of(scans: str | Path | Sequence[str | Path]) -> list[Path]:
    """One path, or several, as a list."""
    return [Path(scans)] if isinstance(scans, str | Path) else [Path(scan) for scan in scans]


def all_scans(paths: Sequence[Path]) -> list[Path]:
    """The scans in files and folders, each only once.

    Raises:
        InputError: A path that does not exist, or a folder without scans.
    """
    return list(dict.fromkeys(scan for path in paths for scan in find_scans(path)))


def part_of(outputs: Mapping[Path, Outputs], shard: tuple[int, int] | None) -> dict[Path, Outputs]:
    """The scans of part i of n, for a shard (i, n) with 1 <= i <= n; all for None.

    The part of a scan depends only on its whole path as given, so that further scans change no other's part.

    Raises:
        UsageError: No such part.
    """
    part, count = shard or (1, 1)
    if not 1 <= part <= count:
        raise UsageError(f"shard {shard}: expected (i, n) with 1 <= i <= n, such as (1, 4)")

    def number(scan: Path) -> int:
        return int(hashlib.sha256(scan.as_posix().encode(errors="surrogateescape")).hexdigest(), 16) % count + 1

    return {scan: files for scan, files in outputs.items() if number(scan) == part}


def of_part(file: Path | None, shard: tuple[int, int] | None) -> Path | None:
    """A file that tells of all scans of a call, by the name that it has for a part of them: report.1-of-4.html."""
    if file is None or shard is None:
        return file
    return file.with_name(f"{file.stem}.{shard[0]}-of-{shard[1]}{file.suffix}")
