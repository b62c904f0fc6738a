"""What the commands share: option types, printing and the progress display. No heavy import at module level."""

from __future__ import annotations

import json
import math
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer

ProgressCallback = Callable[[str, float], None]


def _check_device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", value):
        raise typer.BadParameter(f"{value!r} is none of auto, cpu, cuda, cuda:N, mps")
    return value


Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.", callback=_check_device)]
Seed = Annotated[int, typer.Option("--seed", min=0, help="The same seed gives the same result.")]
Quiet = Annotated[
    bool | None,
    typer.Option("--quiet/--verbose", help="Errors only; or details, and progress as lines.", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]


def fail(message: str, kind: str = "error") -> None:
    """Print one line on stderr, whatever line breaks the message has."""
    typer.echo(f"medseg: {kind}: {' '.join(message.split())}", err=True)


def print_json(value: Any) -> None:
    """Print strict JSON: numbers that are not finite become null, paths become strings."""
    typer.echo(json.dumps(_plain(value), indent=2))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):  # a numpy or torch scalar
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows as aligned columns; the first row names the columns. Nothing is cut, so that output can be piped."""
    if not rows:
        return
    cells = [list(rows[0])] + [[_cell(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@contextmanager
def warnings_at_once() -> Iterator[None]:
    """Inside, a warning is one line on stderr when it is given, not after hours; the same one once."""
    said: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *args: Any, **kwargs: Any) -> None:
        if issubclass(category, UserWarning) and str(message) not in said:
            said.add(str(message))
            fail(str(message), kind="warning")

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield


@contextmanager
def progress(quiet: bool | None) -> Iterator[ProgressCallback]:
    """Yield a callback (message, fraction done in [0, 1]) that shows nothing if quiet.

    On a terminal it draws one bar on stderr; with --verbose it prints lines there, one a second at most.
    """
    if quiet is True:
        yield lambda message, fraction: None
    elif quiet is False:
        printed = -math.inf

        def line(message: str, fraction: float) -> None:
            nonlocal printed
            if fraction >= 1 or time.monotonic() - printed >= 1:
                printed = time.monotonic()
                typer.echo(f"[{fraction:4.0%}] {message}", err=True)

        yield line
    else:
        from rich.console import Console
        from rich.markup import escape
        from rich.progress import Progress

        console = Console(stderr=True)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("", total=1.0)

            def update(message: str, fraction: float) -> None:
                bar.update(task, description=escape(message), completed=fraction)

            yield update
