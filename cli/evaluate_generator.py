"""`medseg evaluate-generator`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from ._options import STDOUT, AsJson, Device, Markdown, Quiet, Seed, existing, require_one_on_stdout
from ._shared import fail, print_json, print_table, progress, write_markdown


# many, long: one parameter, with its help, for each option of the command
def evaluate_generator(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL_OR_SAMPLES", help="Generators, or folders of sampled images.")
    ],
    reference: Annotated[
        Path,
        typer.Option(
            "--reference",
            metavar="D",
            help="Folder or zip of real images.",
            callback=existing("a folder or zip of images"),
        ),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="Folder for the samples, the scores and the page.")
    ],
    samplers: Annotated[
        str, typer.Option(metavar="NAME:STEPS,...", help="Samplers to compare, with their numbers of steps.")
    ] = "ddim:50,ddim:200,ddpm:1000",
    count: Annotated[
        int | None,
        typer.Option(
            "-n",
            min=1,
            help="Number of samples for each row of the table; default: 10000 images, or as many volumes as there are "
            "real ones, up to 100.",
        ),
    ] = None,
    extractor: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="What computes the features: inception, efficientnet-lite0, an .onnx file, a segmenter (its "
            "encoder), or auto (the first available of the first two).",
        ),
    ] = "auto",
    inception: Annotated[Path | None, typer.Option(metavar="FILE", help="File with the weights of Inception.")] = None,
    download: Annotated[
        bool, typer.Option("--download", help="Download the weights of Inception if they are missing.")
    ] = False,
    skip_broken: Annotated[bool, typer.Option("--skip-broken", help="Skip real images that cannot be read.")] = False,
    upsampler: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Upsampler that enlarges the samples; default: none.")
    ] = None,
    guidance: Annotated[float, typer.Option(help="Strength of classifier-free guidance; 1 for none.")] = 1.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per batch; the images do not depend on it.")] = 16,
    device: Device = "auto",
    seed: Seed = 0,
    markdown: Markdown = None,
    quiet: Quiet = None,
    as_json: AsJson = False,
) -> None:
    """Score generators against real images: recall, precision, IS, FID, sFID and KID per model and sampler.

    Volumes are scored by their slices in three planes, and by their similarity to each other (MS-SSIM).
    """
    require_one_on_stdout(markdown, as_json)
    from medseg_diffusion.models.image_source import SampleOptions
    from medseg_diffusion.reports.generator_page import generator_markdown
    from medseg_diffusion.workflows.evaluate_generator import GeneratorEvaluationOptions, parse_samplers
    from medseg_diffusion.workflows.evaluate_generator import evaluate_generator as run

    options = GeneratorEvaluationOptions(
        samplers=parse_samplers(samplers),
        sampling=SampleOptions(
            count=count, guidance=guidance, upsampler=upsampler, batch_size=batch_size, device=device, seed=seed
        ),
        extractor=extractor,
        inception=inception,
        download=download,
        skip_broken=skip_broken,
        command=shlex.join(["medseg", *sys.argv[1:]]),
    )
    with progress(quiet) as show:
        result = run(
            models,
            reference,
            output,
            options,
            on_progress=show,
        )
    for warning in result.warnings if not quiet else ():
        fail(warning, kind="warning")
    write_markdown(markdown, lambda: generator_markdown(result, options.command))
    if as_json:
        about = {"extractor": result.extractor, "reference": result.reference_count}
        print_json({**about, "rows": result.table(), "warnings": result.warnings})
    elif not quiet and markdown != STDOUT:
        print_table(result.table())
        if upsampler:
            typer.echo(f"enlarged by: {upsampler}")
        typer.echo(f"features: {result.extractor}; sFID: {result.maps}; {result.reference_count} real images")
        typer.echo(f"scores: {output / 'scores.json'}")
        typer.echo(f"report: {output / 'report.html'}")
