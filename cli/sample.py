"""`medseg sample`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ._options import AsJson, Compile, Device, ModelArgument, Quiet, Sampler, Seed, existing, existing_model
from ._shared import print_json, progress


# many, long: one parameter, with its help, for each option of the command
def sample(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Folder for the images.")],
    count: Annotated[
        int | None,
        typer.Option("-n", min=1, help="Number of images, default: 16; with --masks, of each mask, default: 1."),
    ] = None,
    masks: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Label maps to condition the images on, for a mask-conditioned generator; writes a labelled folder.",
            callback=existing("a folder of label maps"),
        ),
    ] = None,
    sampler: Annotated[Sampler | None, typer.Option(help="Sampler; default: the model's.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Number of denoising steps; default: the model's.")] = None,
    label: Annotated[
        int | None, typer.Option("--class", min=0, help="Class of every image; default: cycle through the classes.")
    ] = None,
    guidance: Annotated[float, typer.Option(help="Strength of classifier-free guidance; 1 for none.")] = 1.0,
    classifier: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="Noisy classifier that guides the sampling; default: none.", callback=existing_model
        ),
    ] = None,
    classifier_scale: Annotated[
        float, typer.Option(min=0.0, help="Strength of the classifier's guidance; 0 for none.")
    ] = 1.0,
    clip_first: Annotated[
        bool,
        typer.Option(
            "--clip-first",
            help="Clip predicted pixels before the classifier's gradient, as guided-diffusion does.",
        ),
    ] = False,
    upsampler: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="Upsampler that enlarges the images; default: none.", callback=existing_model
        ),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            metavar="D",
            help="Training data of the generator: shows real images beside the samples, and tells whether samples are "
            "copies of training images.",
            callback=existing("the data of the training"),
        ),
    ] = None,
    extractor: Annotated[
        str, typer.Option(help="Feature extractor for --reference, as in evaluate-generator.")
    ] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Images per batch; the images do not depend on it.")] = 16,
    device: Device = "auto",
    compile: Compile = False,
    seed: Seed = 0,
    quiet: Quiet = None,
    as_json: AsJson = False,
) -> None:
    """Sample images from a generator into numbered files and grid.png; a repeated call finishes an interrupted one.

    With --masks the images are conditioned on label maps, and the folder can train a segmenter.
    """
    from medseg_diffusion.models.image_source import SampleOptions
    from medseg_diffusion.workflows.sample import sample as run
    from medseg_diffusion.workflows.sample_reference import FILE, PICTURE

    options = SampleOptions(
        count=count,
        sampler=sampler.value if sampler else None,
        steps=steps,
        label=label,
        guidance=guidance,
        classifier=classifier,
        classifier_scale=classifier_scale,
        clip_first=clip_first,
        upsampler=upsampler,
        batch_size=batch_size,
        device=device,
        compile=compile,
        seed=seed,
    )
    with progress(quiet) as show:
        paths = run(model, output, options, show, masks=masks, reference=reference, extractor=extractor)
    compared = None if reference is None else json.loads((output / FILE).read_text(encoding="utf-8"))
    if as_json:
        print_json({"images": paths, "grid": output / "grid.png", **({} if compared is None else compared)})
    elif not quiet:
        typer.echo(f"{len(paths)} images: {output}")
        typer.echo(f"grid: {output / 'grid.png'}")
        if compared is not None:
            typer.echo(
                f"closer to a training image than an unseen image is: {compared['closer']:.0%} of the pairs "
                f"(50% if nothing is copied); than every unseen image: {compared['closest']:.0%} of the samples"
            )
            typer.echo(f"real images: {output / PICTURE}")
