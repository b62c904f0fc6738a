"""`medseg segment`."""

from __future__ import annotations

import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ._options import (
    AlsoScans,
    AsJsonLines,
    Channels,
    Compile,
    Device,
    Pattern,
    Preview,
    Quiet,
    RunReport,
    Sampler,
    Seed,
    Series,
    SkipExisting,
    model_option,
    named_scans,
    output_option,
    parsed_channels,
    scans_argument,
)
from ._shards import Shard, failures_file, parse_shard
from ._shared import run_scans


class Fusion(StrEnum):
    """Ways to make one mask from several."""

    MEAN = "mean"
    MAJORITY = "majority"
    STAPLE = "staple"


class Uncertainty(StrEnum):
    """Maps of uncertainty."""

    ENTROPY = "entropy"
    MUTUAL_INFORMATION = "mutual-information"
    VARIANCE = "variance"


class Format(StrEnum):
    """File formats of the mask."""

    NIFTI = "nifti"
    DICOM_SEG = "dicom-seg"


# many, long: one parameter, with its help, for each option of the command
def segment(
    scans: Annotated[list[Path] | None, scans_argument("NIfTI, NRRD, MetaImage, PNG, JPEG, TIFF or BMP files")] = None,
    model: Annotated[str | None, model_option("brain-tissue-t1")] = None,
    output: Annotated[Path | None, output_option("mask")] = None,
    also: AlsoScans = None,
    pattern: Pattern = None,
    channel: Channels = None,
    series: Series = None,
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Write some of the classes: names or values with commas between; a name without its side "
            "(hippocampus) takes left and right; default: all.",
        ),
    ] = None,
    tissues: Annotated[
        bool,
        typer.Option(
            "--tissues",
            help="Write the tissues that a model of brain structures groups its classes into: 1 CSF, 2 grey matter, "
            "3 white matter.",
        ),
    ] = False,
    ensemble: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of masks that are combined for each scan; default: the model's. A diffusion model draws "
            "samples; a feed-forward model uses test-time augmentation (mirrored and jittered passes).",
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Number of denoising steps; default: the model's.")] = None,
    sampler: Annotated[Sampler | None, typer.Option(help="Sampler; default: the model's.")] = None,
    fusion: Annotated[Fusion, typer.Option(help="How to combine the masks of the ensemble.")] = Fusion.MEAN,
    fast: Annotated[
        bool,
        typer.Option(
            "--fast", help="One denoising step and one mask, as --steps 1 --ensemble 1: less accurate for most models."
        ),
    ] = False,
    keep_largest: Annotated[
        bool | None,
        typer.Option(
            "--keep-largest/--keep-all",
            help="Keep only the largest connected part of the foreground (all classes together), or every part; "
            "default: the model's.",
            show_default=False,
        ),
    ] = None,
    save_probabilities: Annotated[
        bool, typer.Option("--save-probabilities", help="Write *_prob.nii.gz, the class probabilities.")
    ] = False,
    save_uncertainty: Annotated[bool, typer.Option("--save-uncertainty", help="Write *_uncertainty.nii.gz.")] = False,
    uncertainty: Annotated[
        Uncertainty, typer.Option(help="With --save-uncertainty: kind of the map.")
    ] = Uncertainty.ENTROPY,
    save_members: Annotated[
        bool, typer.Option("--save-members", help="Write *_members.nii.gz, the mask of every member.")
    ] = False,
    save_pseudo_labels: Annotated[
        bool,
        typer.Option("--save-pseudo-labels", help="Write *_pseudo.nii.gz: the mask, with 255 where members disagree."),
    ] = False,
    max_disagreement: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            help="With --save-pseudo-labels: mutual information of the members above which a label is 255.",
        ),
    ] = 0.1,
    statistics: Annotated[
        bool,
        typer.Option("--statistics", help="Write *_statistics.json: volume, extent, place and intensity of classes."),
    ] = False,
    preview: Preview = False,
    output_format: Annotated[
        Format | None,
        typer.Option("--format", help="Format of the mask; default: that of the file -o, or nifti."),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            help="Write one HTML page about all scans of this call, also those that are skipped because they are "
            "finished; with --shard each part has its own, such as report.1-of-4.html."
        ),
    ] = None,
    run_report: RunReport = None,
    skip_existing: SkipExisting = False,
    shard: Shard = None,
    max_memory: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            metavar="GB",
            help="Limit of the memory of the process, by an estimate: large scans are segmented in smaller windows, or "
            "refused.",
        ),
    ] = None,
    device: Device = "auto",
    compile: Compile = False,
    seed: Seed = 0,
    quiet: Quiet = None,
    as_json: AsJsonLines = False,
) -> None:
    """Segment scans, and write a mask for each."""
    part = parse_shard(shard)
    failures = failures_file(output)
    channels = parsed_channels(channel)
    named = named_scans(scans, also, channel or ())
    from medseg_diffusion.volumes.sources import InputOptions
    from medseg_diffusion.workflows import segment as workflow
    from medseg_diffusion.workflows.scans import of_part

    options = workflow.SegmentOptions(
        model=model,
        output=output,
        ensemble=ensemble,
        steps=steps,
        sampler=sampler.value if sampler else None,
        fusion=fusion.value,
        seed=seed,
        device=device,
        compile=compile,
        save_probabilities=save_probabilities,
        save_uncertainty=save_uncertainty,
        uncertainty=uncertainty.value,
        save_members=save_members,
        save_pseudo_labels=save_pseudo_labels,
        max_disagreement=max_disagreement,
        statistics=statistics,
        preview=preview,
        report=report,
        command=shlex.join(["medseg", *sys.argv[1:]]),
        volumes=True,
        run_report=run_report,
        skip_existing=skip_existing,
        shard=part,
        output_format=output_format.value if output_format else None,
        inputs=InputOptions(pattern, channels, series),
        fast=fast,
        keep_largest=keep_largest,
        failures=failures,
        max_memory=max_memory,
        labels=labels,
        tissues=tissues,
    )
    run_scans(
        lambda on_case, show: workflow.segment(named, options, on_case, show),
        quiet,
        as_json,
        of_part(failures, part),
        go_on="--skip-existing",
    )
