"""`medseg benchmark-segmenter`."""

from __future__ import annotations

import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ._options import STDOUT, AsJson, Device, Markdown, Quiet, Seed, existing, existing_models, require_one_on_stdout
from ._shared import print_json, print_table, progress, write_markdown


class Side(StrEnum):
    """Held-out sides of a split."""

    VALIDATION = "validation"
    TEST = "test"


def _numbers(text: str, option: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise typer.BadParameter(f"{text!r} is not a list of positive numbers such as 1,5,20", param_hint=option)
    return [int(part) for part in parts]


def _setting(text: str) -> tuple[str, int, int] | None:
    """Sampler, steps and ensemble size; None for the model's own."""
    if text == "default":
        return None
    sampler, _, numbers = text.partition(":")
    parts = numbers.split(":")
    if not sampler or len(parts) != 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise typer.BadParameter(f"{text!r} is not a setting such as ddpm:1000:5, or default", param_hint="--setting")
    return sampler, int(parts[0]), int(parts[1])


# many, long: one parameter, with its help, for each option of the command
def benchmark_segmenter(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL", help="Names or folders of segmenters.", callback=existing_models)
    ],
    data: Annotated[
        Path,
        typer.Option(
            "--data",
            help="The labelled folder that the models were trained on.",
            callback=existing("a folder of labelled scans"),
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Folder for the table and the page.")],
    steps: Annotated[
        str, typer.Option(help="Numbers of denoising steps to compare, for one sample.")
    ] = "1,2,5,10,20,50,100",
    ensembles: Annotated[
        str, typer.Option(help="Ensemble sizes to compare, at the model's number of steps.")
    ] = "1,2,5,10",
    samplers: Annotated[
        str, typer.Option(help="Samplers to compare, at the model's number of steps.")
    ] = "dpm++,ddim,ddpm",
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--setting",
            metavar="SAMPLER:STEPS:N",
            help="Measure this setting (N samples), or 'default' for the model's own, instead of varying one factor at "
            "a time; repeatable.",
        ),
    ] = None,
    without_x_t: Annotated[
        bool,
        typer.Option(
            "--without-x-t",
            help="Also measure models of several steps with other noise, or none, in place of the noised mask.",
        ),
    ] = False,
    one_per_patient: Annotated[
        bool, typer.Option("--one-per-patient", help="Take only the middle case of each patient, by name.")
    ] = False,
    cases: Annotated[int, typer.Option("-n", min=0, help="Number of cases; 0 for all.")] = 10,
    side: Annotated[
        Side, typer.Option(help="Which held-out cases: validation to choose settings, test to report results.")
    ] = Side.VALIDATION,
    device: Device = "auto",
    seed: Seed = 0,
    markdown: Markdown = None,
    quiet: Quiet = None,
    as_json: AsJson = False,
) -> None:
    """Compare step counts, ensemble sizes and samplers of segmenters: Dice, IoU, HD95, ECE and seconds per case."""
    require_one_on_stdout(markdown, as_json)
    step_counts, ensemble_sizes = _numbers(steps, "--steps"), _numbers(ensembles, "--ensembles")
    chosen_settings = [_setting(text) for text in settings or []]
    from medseg_diffusion.reports.benchmark_page import benchmark_markdown
    from medseg_diffusion.workflows.benchmark_segmenter import BenchmarkOptions, benchmark_info
    from medseg_diffusion.workflows.benchmark_segmenter import benchmark_segmenter as run

    options = BenchmarkOptions(
        steps=step_counts,
        ensembles=ensemble_sizes,
        samplers=[name.strip() for name in samplers.split(",")],
        settings=chosen_settings,
        without_x_t=without_x_t,
        one_per_patient=one_per_patient,
        cases=cases or None,
        side=side.value,
        device=device,
        seed=seed,
        command=shlex.join(["medseg", *sys.argv[1:]]),
    )
    with progress(quiet) as show:
        rows = run(
            models,
            data,
            output,
            options,
            on_progress=show,
        )
    write_markdown(markdown, lambda: benchmark_markdown(rows, benchmark_info(data, options, len(rows))))
    if as_json:
        print_json([row.cells() for row in rows])
    elif not quiet and markdown != STDOUT:
        print_table([row.cells() for row in rows])
        typer.echo(f"table: {output / 'benchmark.csv'}")
        typer.echo(f"report: {output / 'report.html'}")
