"""`medseg train-pixel-classifier`."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from ._options import AsJson, Config, Device, Gpus, LabelledScans, Overrides, Quiet, RunFolder, Seed, existing_model
from ._shared import print_json, print_table
from ._training import Trained, configured, start_processes, training

if TYPE_CHECKING:
    from medseg_diffusion.workflows.train_pixel_classifier import TrainedPixelClassifier


class Unit(StrEnum):
    """What counts as one labelled image."""

    CASE = "case"
    SLICE = "slice"


class Select(StrEnum):
    """How the labelled images are chosen."""

    HASH = "hash"
    DIVERSE = "diverse"


# many: one parameter for each option of the command
def train_pixel_classifier(
    config: Config,
    generator: Annotated[
        str,
        typer.Option("--generator", metavar="MODEL", help="Trained or imported generator.", callback=existing_model),
    ],
    data: LabelledScans,
    labelled: Annotated[int, typer.Option("--labelled", metavar="K", min=1, help="Number of labelled images to use.")],
    run: RunFolder,
    unit: Annotated[Unit, typer.Option(help="What K counts: cases, or slices that show a class.")] = Unit.CASE,
    select: Annotated[
        Select, typer.Option(help="Take the first images by a hash of their names, or one from each cluster.")
    ] = Select.HASH,
    test: Annotated[bool, typer.Option("--test/--no-test", help="Segment and score the held-out cases.")] = True,
    overrides: Overrides = None,
    gpus: Gpus = 1,
    device: Device = "auto",
    seed: Seed = 0,
    quiet: Quiet = None,
    as_json: AsJson = False,
) -> None:
    """Train a segmenter on the activations of a generator for a few labelled images."""
    from medseg_diffusion.config.load import load_pixel_config

    settings = configured(load_pixel_config, config, overrides, quiet)
    from medseg_diffusion.training.launch import is_first

    start_processes(gpus, device)
    with training(run, quiet, resumable=False) as show:
        from medseg_diffusion.workflows.train_pixel_classifier import train_pixel_classifier as train

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
            on_progress=show,
        )
    if is_first():
        _print(result, Trained(run, "medseg segment SCAN -m MODEL").next(result.model), test, quiet, as_json)


def _print(result: TrainedPixelClassifier, next_command: str, tested: bool, quiet: bool | None, as_json: bool) -> None:
    rows = result.test.table() if result.test is not None else []
    if as_json:
        entries = {"model": result.model, "labelled": result.labelled, "blocks": result.blocks, "test": rows}
        print_json({**entries, "next": next_command})
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
            typer.echo(f"report: {result.model.parent / 'test' / 'report.html'}")
        elif tested:
            typer.echo("no scores: the generator held out none of these cases")
        typer.echo(f"model: {result.model}")
        typer.echo(f"next: {next_command}")
