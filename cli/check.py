"""`medseg check`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ._shared import AsJson, Quiet, fail, print_json, progress


def check(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Folder or zip of images, or folder of scans.")],
    quiet: Quiet = None,
    as_json: AsJson = False,
) -> None:
    """Open every file of a data set; report counts, sizes, classes and broken files."""
    from medseg_diffusion.data.images import check_images, find_images

    collection = find_images(data)
    with progress(quiet) as show:
        found = check_images(collection, lambda done, total: show(f"file {done} of {total}", done / max(total, 1)))
    if as_json:
        print_json({**found.rows(), "broken": found.broken})
    elif not quiet:
        for name, value in found.rows().items():
            typer.echo(f"{name}: {value}")
    for line in found.broken:
        fail(line)
    if found.broken:
        raise typer.Exit(1)
