"""`medseg train-generator`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from ._options import (
    AsJson,
    Config,
    Device,
    Gpus,
    Images,
    MaxSteps,
    Overrides,
    Quiet,
    Resume,
    RunFolder,
    Seed,
    existing_model,
    time_limit_option,
)
from ._training import Trained, configured, print_trained, start_processes, training


class Stage(StrEnum):
    """Stages of a latent generator."""

    ALL = "all"
    AUTOENCODER = "autoencoder"


# many: one parameter for each option of the command
def train_generator(
    config: Config,
    data: Images,
    run: RunFolder,
    overrides: Overrides = None,
    autoencoder: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Trained autoencoder for a latent model; default: train one first.",
            callback=existing_model,
        ),
    ] = None,
    stage: Annotated[Stage, typer.Option(help="Latent models: train both stages, or only the first.")] = Stage.ALL,
    resume: Resume = False,
    max_steps: MaxSteps = None,
    time_limit: Annotated[float | None, time_limit_option("The preparation of images counts.")] = None,
    skip_broken: Annotated[bool, typer.Option("--skip-broken", help="Leave broken images out.")] = False,
    download: Annotated[
        bool, typer.Option("--download", help="Download the weights of LPIPS if they are missing.")
    ] = False,
    gpus: Gpus = 1,
    device: Device = "auto",
    seed: Seed = 0,
    quiet: Quiet = None,
    as_json: AsJson = False,
) -> None:
    """Train a generator, an upsampler, an autoencoder or a noisy classifier on images."""
    from medseg_diffusion.config.load import load_image_config

    settings = configured(load_image_config, config, overrides, quiet)
    start_processes(gpus, device)
    trained = Trained(run, _use(settings.method))
    with training(run, quiet) as show:
        from medseg_diffusion.workflows.train_generator import train_generator as train

        model = train(
            settings,
            data,
            run,
            autoencoder=autoencoder,
            stage=stage.value,
            resume=resume,
            max_steps=max_steps,
            time_limit_min=time_limit,
            device=device,
            seed=seed,
            skip_broken=skip_broken,
            download=download,
            on_progress=show,
            on_outcome=trained.outcomes.append,
        )
    print_trained(trained, model, quiet, as_json)


def _use(method: str) -> str:
    """The command that a trained model is for."""
    return {
        "autoencoder": "medseg train-generator CONFIG --autoencoder MODEL --data D -o RUN",
        "classifier": "medseg sample GENERATOR --classifier MODEL -n 16 -o samples",
        "upsampler": "medseg sample GENERATOR --upsampler MODEL -n 16 -o samples",
    }.get(method, "medseg sample MODEL -n 16 -o samples")
