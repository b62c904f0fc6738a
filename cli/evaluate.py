"""`medseg evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ._shared import AsJson, Quiet, Seed, print_json, print_table


def evaluate(
    prediction: Annotated[Path, typer.Argument(metavar="PRED", help="Predicted mask, or a folder of them.")],
    reference: Annotated[Path, typer.Argument(metavar="REF", help="Reference mask, or a folder of them.")],
    out: Annotated[Path, typer.Option("-o", "--output", help="Folder for summary.json, cases.csv, report.html.")],
    labels: Annotated[list[int] | None, typer.Option("--label", min=1, help="Repeatable; default: all found.")] = None,
    images: Annotated[Path | None, typer.Option("--images", help="The scans, for the report's pictures.")] = None,
    seed: Seed = 0,
    quiet: Quiet = None,
    as_json: AsJson = False,
) -> None:
    """Compare predicted with reference masks: overlap and surface distances per label, with intervals."""
    from medseg_diffusion import evaluation

    rows = evaluation.evaluate(prediction, reference, out, labels=labels, images=images, seed=seed).table()
    if as_json:
        print_json(rows)
    elif not quiet:
        print_table(rows)
        typer.echo(f"report: {out / 'report.html'}")
