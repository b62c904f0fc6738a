"""`medseg train-segmenter`."""

from __future__ import annotations

from typing import Annotated

import typer

from ._options import (
    AsJson,
    Config,
    Device,
    Gpus,
    LabelledScans,
    Overrides,
    Quiet,
    Resume,
    RunFolder,
    Seed,
    existing_model,
    time_limit_option,
)
from ._training import Trained, configured, print_trained, start_processes, training


# many: one parameter for each option of the command
def train_segmenter(
    config: Config,
    data: LabelledScans,
    run: RunFolder,
    overrides: Overrides = None,
    resume: Resume = False,
    init: Annotated[
        str | None,
        typer.Option(
            "--init",
            metavar="MODEL",
            help="Start from the weights of this trained model; default: random weights.",
            callback=existing_model,
        ),
    ] = None,
    max_steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Stop the segmenter after this many training steps; default: the configuration's. Its finder or mask "
            "autoencoder is trained to the end.",
        ),
    ] = None,
    time_limit: Annotated[
        float | None, time_limit_option("The preparation of scans does not count, and calibration follows.")
    ] = None,
    gpus: Gpus = 1,
    device: Device = "auto",
    seed: Seed = 0,
    quiet: Quiet = None,
    as_json: AsJson = False,
) -> None:
    """Train a segmenter on labelled scans."""
    from medseg_diffusion.config.load import load_segmenter_config

    settings = configured(load_segmenter_config, config, overrides, quiet)
    start_processes(gpus, device)
    trained = Trained(run, "medseg segment SCAN -m MODEL")
    with training(run, quiet) as show:
        from medseg_diffusion.workflows.train_segmenter import train_segmenter as train

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
            on_progress=show,
            on_outcome=trained.outcomes.append,
        )
    print_trained(trained, model, quiet, as_json)
