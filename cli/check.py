"""`medseg check`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ._options import AsJson, Quiet, existing
from ._shared import fail, print_json, printable, progress


def check(
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA",
            help="Folder or zip of images, folder of scans or DICOM series, or one scan or image.",
            callback=existing("images or scans"),
        ),
    ],
    quiet: Quiet = None,
    as_json: AsJson = False,
) -> None:
    """Open every file of a data set and report counts, sizes, classes and everything that would stop a command.

    Labels are opened, too: their grids, values and names. The exit code is 1 if anything is wrong.
    """
    from medseg_diffusion.workflows.check import check as run

    with progress(quiet) as show:
        report = run(data, show)
    if as_json:
        print_json({**report.rows(), "broken": report.broken, "remarks": report.remarks})
    elif not quiet:
        for name, value in report.rows().items():
            typer.echo(printable(f"{name}: {value}"))
    for line in report.remarks if not quiet else ():
        fail(line, kind="warning")
    for line in report.broken:
        fail(line)
    if report.broken:
        raise typer.Exit(1)
