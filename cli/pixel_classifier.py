"""`medseg train-pixel-classifier`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ._shared import AsJson, Device, Quiet, Seed, print_json, print_table, progress


class Unit(StrEnum):
    """What counts as one labelled image."""

    CASE = "case"
    SLICE = "slice"


class Select(StrEnum):
    """How the labelled images are chosen."""

    HASH = "hash"
    DIVERSE = "diverse"


def train_pixel_classifier(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A preset (`label-efficient`) or a YAML file.")],
    generator: Annotated[str, typer.Option("--generator", metavar="MODEL", help="Trained or imported generator.")],
    data: Annotated[Path, typer.Option("--data", help="Folder of labelled scans.")],
    labelled: Annotated[int, typer.Option("--labelled", metavar="K", min=1, help="How many labelled ones to use.")],
    run: Annotated[Path, typer.Option("-o", "--output", metavar="RUN", help="Run folder to write.")],
    unit: Annotated[Unit, typer.Option(help="Whether K counts cases, or slices that show something.")] = Unit.CASE,
    select: Annotated[Select, typer.Option(help="First by a hash of the name, or spread over clusters.")] = Select.HASH,
    test: Annotated[bool, typer.Option("--test/--no-test", help="Segment and score the held-out cases.")] = True,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override one key, for instance a.b=3.")
    ] = None,
    device: Device = "auto",
    seed: Seed = 0,
    quiet: Quiet = None,
    as_json: AsJson = False,
) -> None:
    """Train a segmenter on a few labelled images and the activations of a generator."""
    from medseg_diffusion.config.load import load_config
    from medseg_diffusion.config.pixel_classifier import PixelClassifierConfig
    from medseg_diffusion.errors import UsageError
    from medseg_diffusion.workflows.train_pixel_classifier import train_pixel_classifier as train

    settings = load_config(config, overrides or [])
    if not isinstance(settings, PixelClassifierConfig):
        raise UsageError(f"{config}: configures a {settings.method}, not pixel classifiers (method: label-efficient)")
    with progress(quiet) as show:
        result = train(
            settings,
            generator,
            data,
            labelled,
            run,
            unit=unit.value,
            select=select.value,
            test=test,
            device=device,
            seed=seed,
            on_progress=lambda what, done, total: show(f"{what}: {done} of {total}", done / max(total, 1)),
        )
    rows = result.test.table() if result.test is not None else []
    if as_json:
        print_json({"model": result.model, "labelled": result.labelled, "blocks": result.blocks, "test": rows})
    elif not quiet:
        typer.echo(f"labelled: {', '.join(result.labelled)}")
        typer.echo(f"blocks: {', '.join(result.blocks)}")
        if result.test is not None:
            print_table(
                [
                    {"class": name, "Dice": str(result.test.dice[label]), "cases": result.test.dice[label].n}
                    for label, name in result.test.labels.items()
                ]
            )
            typer.echo(f"report: {run / 'test' / 'report.html'}")
        elif test:
            typer.echo("no scores: no case is on the side that the generator held out")
        typer.echo(f"model: {result.model}")
