"""What the benchmarks share: options, timings in turns, the table and the JSON file of a claim.

A benchmark measures rows. Each compares our number with that of a peer, both measured in this run, in turns.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from medseg_diffusion.files import write_files

STOPPING = 5.0
"""Seconds between asking processes to end, and ending them."""

Run = Callable[[], object]


@dataclass(frozen=True)
class Number:
    """The median of several measurements, with the smallest and the largest."""

    median: float
    low: float
    high: float
    runs: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Number:
        return cls(statistics.median(values), min(values), max(values), len(values))


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        what: what is measured.
        peer: with what ours is compared.
        ours: our number.
        theirs: the peer's number; None if the peer is not installed.
        unit: of both numbers; less is better, but for "/s".
        note: what else belongs to the row, such as the difference of the results.
    """

    what: str
    peer: str
    ours: Number
    theirs: Number | None
    unit: str = "s"
    note: str = ""

    @property
    def times_better(self) -> float | None:
        """How many times better ours is: above 1, ours is faster or smaller."""
        if self.theirs is None or self.ours.median == 0:
            return None
        quotient = self.theirs.median / self.ours.median
        return 1 / quotient if self.unit.endswith("/s") else quotient


@dataclass(frozen=True)
class Options:
    """What every benchmark is told.

    Attributes:
        quick: the smallest sizes, which rehearse the benchmark in seconds; its numbers mean nothing.
        device: cpu or cuda.
        cpu_seconds: measure the time of the CPU, for a machine that does other work, not that of the wall.
        repeats: measurements of each run.
        rest: the benchmark's own options.
    """

    quick: bool = False
    device: str = "cpu"
    cpu_seconds: bool = False
    repeats: int = 5
    rest: argparse.Namespace = field(default_factory=argparse.Namespace)

    def size(self, usual: Any, quick: Any) -> Any:
        """The usual size, or the quick one."""
        return quick if self.quick else usual

    def seconds(self, run: Run) -> float:
        """The time of one run on the device, child processes included."""
        now = _cpu_time if self.cpu_seconds else time.perf_counter
        self._wait()
        started = now()
        run()
        self._wait()
        return now() - started

    def in_turns(self, runs: Mapping[str, Run], warm: int = 1) -> dict[str, Number]:
        """Time the runs in turns, in alternating order, after ``warm`` rounds that do not count."""
        times: dict[str, list[float]] = {name: [] for name in runs}
        rounds = warm + (1 if self.quick else self.repeats)
        for i in range(rounds):
            for name, run in list(runs.items())[:: 1 if i % 2 else -1]:
                taken = self.seconds(run)
                if i >= warm:
                    times[name].append(taken)
        return {name: Number.of(values) for name, values in times.items()}

    def _wait(self) -> None:
        if self.device != "cpu":
            import torch

            torch.cuda.synchronize()


def limited(
    arguments: Sequence[str], seconds: float, log: IO[str] | None = None, cwd: Path | None = None
) -> tuple[str, int]:
    """Run a command, and end it and its children in time: how it ended (done, failed or stopped), and its status.

    The processes are asked to end `STOPPING` seconds before the time is over, so that what they write is whole. None of
    them is left afterwards, even if an exception, such as Ctrl-C, ends the wait.

    Args:
        arguments: program and arguments.
        seconds: most seconds.
        log: file for the output and the errors; without it, only errors are shown.
        cwd: folder to run in.
    """
    output, errors = (subprocess.DEVNULL, None) if log is None else (log, subprocess.STDOUT)
    process = subprocess.Popen(arguments, stdout=output, stderr=errors, cwd=cwd, start_new_session=True)
    try:
        try:
            status = process.wait(max(seconds - STOPPING, 0.0))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOPPING)
            return "stopped", -signal.SIGTERM
        return ("done" if status == 0 else "failed"), status
    finally:
        with contextlib.suppress(ProcessLookupError):  # nothing is left
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def end_at_sigterm() -> None:
    """From now on SIGTERM raises an exception, so that `limited` ends the processes that it has started."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def write_numbers(path: Path, content: object) -> None:
    """Write a JSON file, which is whole even if the process is killed meanwhile."""
    write_files(path.parent, {path.name: json.dumps(content, indent=1) + "\n"})


def _cpu_time() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def installed(name: str) -> bool:
    """Whether a peer can be imported."""
    import importlib.util

    return importlib.util.find_spec(name) is not None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside the block, the warnings of libraries are not shown."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def machine(device: str) -> dict[str, object]:
    """The computer and the versions behind the numbers."""
    import torch

    about: dict[str, object] = {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": device,
    }
    if device != "cpu":
        about["gpu"] = torch.cuda.get_device_name()
    return about


def cpu_name() -> str:
    """The name of the processor; its family and model tell where the name is general."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    lines = [line.partition(":") for line in info.read_text().splitlines()]
    about = {name.strip(): value.strip() for name, colon, value in lines if colon}
    details = [f"{name} {about[key]}" for name, key in (("family", "cpu family"), ("model", "model")) if key in about]
    details += ["AMX"] if "amx_bf16" in about.get("flags", "") else []
    return f"{about.get('model name', platform.machine())} ({', '.join(details)})"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of a claim's JSON file, as Markdown."""
    lines = ["| what | ours | peer | | times better | note |", "|---|---|---|---|---|---|"]
    for row in rows:
        better = row["times_better"]
        cells = [
            row["what"],
            _text(row["ours"], row["unit"]),
            row["peer"],
            _text(row["theirs"], row["unit"]) if row["theirs"] else "not installed",
            "" if better is None else f"{better:.3g}",
            row["note"],
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _text(number: Mapping[str, float], unit: str) -> str:
    spread = "" if number["runs"] == 1 else f" ({number['low']:.3g} to {number['high']:.3g})"
    return f"{number['median']:.3g} {unit}{spread}"


# many: a name, a question, a measurement, and how they are called
def main(
    claim: str,
    question: str,
    measure: Callable[[Options], Iterator[Row]],
    *,
    repeats: int = 5,
    add: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> None:
    """Run a benchmark from the command line: print its rows, and write OUT/CLAIM.json if a folder is given."""
    parser = argparse.ArgumentParser(description=question, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smallest sizes, to see that the benchmark works")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--cpu-seconds", action="store_true", help="time of the CPU, on a machine that does other work")
    parser.add_argument("--out", type=Path, help="folder for the JSON file")
    add(parser)
    rest = parser.parse_args()
    options = Options(rest.quick, rest.device, rest.cpu_seconds, rest.repeats, rest)
    started = time.perf_counter()
    rows: list[dict[str, Any]] = []
    content: dict[str, Any] = {
        "claim": claim,
        "question": question.partition("\n")[0],
        "quick": options.quick,
        "clock": "cpu" if options.cpu_seconds else "wall",
        "machine": machine(options.device),
        "rows": rows,
    }
    for row in measure(options):
        rows.append({**asdict(row), "times_better": row.times_better})
        print(table(rows[-1:]).splitlines()[-1], flush=True)
        content["seconds"] = time.perf_counter() - started
        if rest.out is not None:  # after every row: a benchmark that is stopped leaves what it has
            write_numbers(rest.out / f"{claim}.json", content)
    print(f"{claim}: {content['seconds']:.0f} s", file=sys.stderr)
