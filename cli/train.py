"""`medseg train-segmenter`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ._shared import AsJson, Device, Quiet, Seed, print_json, progress

if TYPE_CHECKING:
    from medseg_diffusion.training.trainer import Progress


def train_segmenter(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A preset (`medseg configs list`) or a YAML file.")],
    data: Annotated[Path, typer.Option("--data", help="Folder of labelled scans.")],
    run: Annotated[Path, typer.Option("-o", "--output", metavar="RUN", help="Run folder to write.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override one key, for instance a.b=3.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in RUN.")] = False,
    init: Annotated[
        str | None, typer.Option("--init", metavar="MODEL", help="Start from the weights of this trained model.")
    ] = None,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Stop after this many training steps.")] = None,
    time_limit: Annotated[float | None, typer.Option(min=0.0, metavar="MIN", help="Stop after MIN minutes.")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="Processes to train in, one a device.")] = 1,
    device: Device = "auto",
    seed: Seed = 0,
    quiet: Quiet = None,
    as_json: AsJson = False,
) -> None:
    """Train a segmentation model on labelled scans."""
    from medseg_diffusion.config.load import load_segmenter_config
    from medseg_diffusion.training.launch import is_first, launch, launched
    from medseg_diffusion.workflows.train_segmenter import train_segmenter as train

    settings = load_segmenter_config(config, overrides or [])
    if gpus > 1 and not launched():
        raise typer.Exit(launch(sys.argv, gpus))
    with progress(quiet) as show:

        def on_prepare(done: int, total: int) -> None:
            show(f"preparing case {done} of {total}", done / max(total, 1))

        def on_progress(state: Progress) -> None:
            score = "" if state.score is None else f", score {state.score:.3f}"
            left = f", {state.seconds_left / 60:.0f} min left"
            message = f"step {state.step} of {state.max_steps}, loss {state.loss:.4f}{score}{left}"
            show(message, state.step / max(state.max_steps, 1))

        model = train(
            settings,
            data,
            run,
            resume=resume,
            init=init,
            max_steps=max_steps,
            time_limit_min=time_limit,
            device=device,
            seed=seed,
            on_progress=on_progress,
            on_prepare=on_prepare,
        )
    if not is_first():
        return
    if as_json:
        print_json({"model": model})
    elif not quiet:
        typer.echo(f"model: {model}")
