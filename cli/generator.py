"""`medseg train-generator` and `medseg sample`."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ._shared import AsJson, Device, Quiet, Seed, print_json, progress, warnings_at_once
from .segment import Sampler

if TYPE_CHECKING:
    from medseg_diffusion.training.trainer import Progress


class Stage(StrEnum):
    """Stages of a latent generator."""

    ALL = "all"
    AUTOENCODER = "autoencoder"


def train_generator(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A preset (`medseg configs list`) or a YAML file.")],
    data: Annotated[Path, typer.Option("--data", help="Folder or zip of images, or folder of scans.")],
    run: Annotated[Path, typer.Option("-o", "--output", metavar="RUN", help="Run folder to write.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override one key, for instance a.b=3.")
    ] = None,
    autoencoder: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Trained autoencoder of a latent model; default: train it.")
    ] = None,
    stage: Annotated[Stage, typer.Option(help="Of a latent model: both stages, or the first alone.")] = Stage.ALL,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in RUN.")] = False,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Stop each stage after this many steps.")] = None,
    time_limit: Annotated[float | None, typer.Option(min=0.0, metavar="MIN", help="Stop after MIN minutes.")] = None,
    skip_broken: Annotated[bool, typer.Option("--skip-broken", help="Leave broken images out.")] = False,
    download: Annotated[bool, typer.Option("--download", help="Fetch the weights of LPIPS if missing.")] = False,
    gpus: Annotated[int, typer.Option(min=1, help="Processes to train in, one a device.")] = 1,
    device: Device = "auto",
    seed: Seed = 0,
    quiet: Quiet = None,
    as_json: AsJson = False,
) -> None:
    """Train a pixel or latent generator, an upsampler, an autoencoder or a noisy classifier on images."""
    from medseg_diffusion.config.anomaly import AnomalyConfig
    from medseg_diffusion.config.load import load_config
    from medseg_diffusion.config.pixel_classifier import PixelClassifierConfig
    from medseg_diffusion.config.segmenter import SegmenterConfig
    from medseg_diffusion.errors import UsageError
    from medseg_diffusion.training.launch import is_first, launch, launched
    from medseg_diffusion.workflows.train_generator import train_generator as train

    settings = load_config(config, overrides or [])
    if isinstance(settings, SegmenterConfig | PixelClassifierConfig | AnomalyConfig):
        others = {"label-efficient": "train-pixel-classifier", "anomaly": "train-anomaly"}
        command = others.get(settings.method, "train-segmenter")
        raise UsageError(f"{config}: configures a segmenter; train it with {command}")
    if gpus > 1 and not launched():
        raise typer.Exit(launch(sys.argv, gpus))
    with progress(quiet) as show, warnings_at_once():

        def on_prepare(what: str, done: int, total: int) -> None:
            show(f"preparing {what}: {done} of {total}", done / max(total, 1))

        def on_progress(state: Progress) -> None:
            left = f", {state.seconds_left / 60:.0f} min left"
            show(
                f"step {state.step} of {state.max_steps}, loss {state.loss:.4f}{left}",
                state.step / max(state.max_steps, 1),
            )

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
            on_progress=on_progress,
            on_prepare=on_prepare,
        )
    if not is_first():
        return
    if as_json:
        print_json({"model": model})
    elif not quiet:
        typer.echo(f"model: {model}")


def sample(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Name or folder of a generator.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Folder for the images.")],
    count: Annotated[int, typer.Option("-n", min=1, help="Number of images.")] = 16,
    sampler: Annotated[Sampler | None, typer.Option(help="Default: the model's.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps; default: the model's.")] = None,
    label: Annotated[int | None, typer.Option("--class", min=0, help="Class of all; default: all in turn.")] = None,
    guidance: Annotated[float, typer.Option(help="Strength of classifier-free guidance; 1 is none.")] = 1.0,
    classifier: Annotated[str | None, typer.Option(metavar="MODEL", help="Noisy classifier that guides.")] = None,
    classifier_scale: Annotated[float, typer.Option(min=0.0, help="Its strength; 0 is off.")] = 1.0,
    upsampler: Annotated[str | None, typer.Option(metavar="MODEL", help="Model that enlarges the images.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time; does not change them.")] = 16,
    device: Device = "auto",
    seed: Seed = 0,
    quiet: Quiet = None,
    as_json: AsJson = False,
) -> None:
    """Draw images from a generator: numbered PNG files and grid.png. Repeat to finish an interrupted call."""
    from medseg_diffusion.workflows.sample import SampleOptions, sample_images

    options = SampleOptions(
        count=count,
        sampler=sampler.value if sampler else None,
        steps=steps,
        label=label,
        guidance=guidance,
        classifier=classifier,
        classifier_scale=classifier_scale,
        upsampler=upsampler,
        batch_size=batch_size,
        device=device,
        seed=seed,
    )
    with progress(quiet) as show:
        paths = sample_images(
            model, output, options, lambda done, total: show(f"image {done} of {total}", done / max(total, 1))
        )
    if as_json:
        print_json({"images": paths, "grid": output / "grid.png"})
    elif not quiet:
        typer.echo(f"{len(paths)} images: {output}")
        typer.echo(f"grid: {output / 'grid.png'}")
