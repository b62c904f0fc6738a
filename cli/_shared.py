"""Printing, warnings and the progress display, shared by the commands. No slow import at module level."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from medseg_diffusion.files import plain, write_files

if TYPE_CHECKING:
    from medseg_diffusion.workflows.scans import ScanResult

ProgressCallback = Callable[[str, float], None]


def printable(text: str) -> str:
    """The text without control characters, which could rewrite a terminal: files and cards may be a stranger's.

    Bytes of a file name that are no text stay as escapes, because names that differ should differ.
    """
    escaped = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(character for character in escaped if character.isprintable() or character in "\n\t")


def fail(message: str, kind: str = "error") -> None:
    """Print a message on stderr in one line, without its line breaks and control characters."""
    typer.echo(f"medseg: {kind}: {printable(' '.join(message.split()))}", err=True)


def print_json(value: Any, indent: int | None = 2) -> None:
    """Print strict JSON: numbers that are not finite become null, paths become strings. No indent gives one line."""
    typer.echo(json.dumps(plain(value), indent=indent))


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows as aligned columns, with "-" where a row has no number. Nothing is cut, so output can be piped."""
    if not rows:
        return
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names] + [[_cell(row.get(name)) for name in names] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else printable(str(value))


def write_markdown(path: Path | None, text: Callable[[], str]) -> None:
    """Write what ``text`` returns into a file, or print it for the path "-"; do nothing without a path."""
    if path is None:
        return
    if path == Path("-"):
        typer.echo(text(), nl=False)
    else:
        write_files(path.parent, {path.name: text()})


@contextmanager
def _warnings_at_once(quiet: bool | None = None) -> Iterator[None]:
    """Inside the block, print every warning at once as one line on stderr, and the same warning only once.

    Nothing is printed if quiet.
    """
    said: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *args: Any, **kwargs: Any) -> None:
        if not quiet and issubclass(category, UserWarning) and str(message) not in said:
            said.add(str(message))
            fail(str(message), kind="warning")

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield


@contextmanager
def progress(quiet: bool | None) -> Iterator[ProgressCallback]:
    """Yield a callback (message, fraction done in [0, 1]), and print warnings as lines (`_warnings_at_once`).

    Quiet shows neither. On a terminal the callback draws one bar on stderr; with --verbose it prints lines there, one
    a second at most.
    """
    with _warnings_at_once(quiet), _bar_or_lines(quiet) as show:
        yield show


@contextmanager
def _bar_or_lines(quiet: bool | None) -> Iterator[ProgressCallback]:
    if quiet is True:
        yield lambda message, fraction: None
    elif quiet is False:
        printed = -math.inf

        def line(message: str, fraction: float) -> None:
            nonlocal printed
            if fraction >= 1 or time.monotonic() - printed >= 1:
                printed = time.monotonic()
                typer.echo(f"[{fraction:4.0%}] {printable(message)}", err=True)

        yield line
    else:
        from rich.console import Console
        from rich.markup import escape
        from rich.progress import Progress

        console = Console(stderr=True)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("", total=1.0)

            def update(message: str, fraction: float) -> None:
                bar.update(task, description=escape(printable(message)), completed=fraction)

            yield update


def print_scan(result: ScanResult, volumes: bool) -> None:
    """Print the files of a scan, and the volumes of its classes if ``volumes``; failures are listed later."""
    if result.status == "failed":
        return
    note = "exists, skipped" if result.status == "skipped" else f"{result.seconds:.1f} s"
    typer.echo(printable(f"{result.scan} ({note})"))
    if result.headline:
        typer.echo(f"  {result.headline}")
    for warning in result.warnings:
        fail(f"{result.scan}: {warning}", kind="warning")
    for kind, path in result.outputs.items():
        typer.echo(printable(f"  {kind}: {path}"))
    if not volumes:
        return
    # Imported here: `medseg --help` does not need them.
    from medseg_diffusion.reports.batch import size_of

    size = size_of(result.scan)
    for name, volume in result.volumes_ml.items():
        ends = [size.text(end) for end in result.intervals_ml.get(name, ())]
        interval = f" ({100 * (result.level or 0):.0f} %: {' to '.join(ends)})" if ends else ""
        typer.echo(printable(f"  {name}: {size.text(volume)} {size.unit}{interval}"))


def run_scans(
    run: Callable[[Callable[[ScanResult], None], ProgressCallback], list[ScanResult]],
    quiet: bool | None,
    as_json: bool,
    failures: Path | None = None,
    go_on: str = "",
) -> None:
    """Run a command on scans and print its results.

    Failures are listed on stderr. A single failed scan decides the exit code; a failure among several scans gives 1.
    Ctrl-C (130) and SIGTERM (143) end it with one line, after the result that is being written.

    Args:
        run: Called with a function that prints a result, and with the progress callback.
        quiet: Print only failures; False also prints volumes.
        as_json: Print each result as one line of JSON.
        failures: File that lists the failures among several scans.
        go_on: The option with which the same command does the rest after a signal; empty for none.
    """

    def show(result: ScanResult) -> None:
        if as_json:
            print_json(asdict(result), indent=None)
        elif not quiet:
            print_scan(result, volumes=quiet is False)

    started = time.monotonic()
    try:
        with progress(quiet) as on_progress, _ended_by_sigterm():
            results = run(show, on_progress)
    except (KeyboardInterrupt, SystemExit) as stop:
        by, code = ("Ctrl-C", 130) if isinstance(stop, KeyboardInterrupt) else ("SIGTERM", 143)
        rest = f"; the same command with {go_on} goes on" if go_on else ""
        fail(" ".join([by, *getattr(stop, "__notes__", [])]) + rest, kind="stopped")
        raise typer.Exit(code) from stop
    failed = [result for result in results if result.status == "failed"]
    if len(results) != 1 and not quiet:
        typer.echo(_summary(results, time.monotonic() - started), err=as_json)
        if to_check := _to_check(results):
            typer.echo(printable(to_check), err=as_json)
    for result in failed:
        error = result.error or "failed"
        fail(error if result.scan.name in error else f"{result.scan}: {error}")
    if failed:
        if len(results) > 1:
            fail(f"{len(failed)} of {len(results)} scans failed{f'; see {failures}' if failures else ''}")
        raise typer.Exit(failed[0].exit_code if len(results) == 1 else 1)


def _summary(results: Sequence[ScanResult], seconds: float) -> str:
    """How many scans were done, skipped and failed, and the seconds from one scan to the next."""
    if not results:
        return "no scans in this part"
    count = Counter(result.status for result in results)
    each = f"; {seconds / count['done']:.1f} s per scan" if count["done"] else ""
    return f"{len(results)} scans: {count['done']} done, {count['skipped']} skipped, {count['failed']} failed{each}"


def _to_check(results: Sequence[ScanResult], most: int = 5) -> str:
    """The scans that somebody should look at, with the reasons; empty without any. Failed ones are listed elsewhere."""
    flagged = [result for result in results if result.flags and result.status != "failed"]
    if not flagged:
        return ""
    named = [f"{result.scan.name} ({', '.join(result.flags)})" for result in flagged[:most]]
    more = f" and {len(flagged) - most} more" if len(flagged) > most else ""
    return f"{len(flagged)} of {len(results)} scans to check: {', '.join(named)}{more}"


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Inside the block, SIGTERM ends the process as Ctrl-C does: the result that is being written is completed.

    Schedulers send it before they kill, some of them more than once. Without this, a process that is the first of its
    container ignores it.
    """

    def end(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_IGN)
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
