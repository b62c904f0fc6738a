"""`medseg segment`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ._options import AsJson, Device, Model, Output, Preview, Quiet, Sampler, Scans, Seed, SkipExisting
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


def _parse_shard(value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    part, _, count = value.partition("/")
    if not (part.isdecimal() and count.isdecimal() and 1 <= int(part) <= int(count)):
        raise typer.BadParameter(f"{value!r} is not i/n with 1 <= i <= n, for instance 1/4", param_hint="--shard")
    return int(part), int(count)


# many, long: one parameter, with its help, for each option of the command
def segment(
    scans: Scans,
    model: Model = None,
    output: Output = None,
    ensemble: Annotated[
        int | None, typer.Option(min=1, help="Number of masks sampled per scan; default: the model's.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Number of denoising steps; default: the model's.")] = None,
    sampler: Annotated[Sampler | None, typer.Option(help="Sampler; default: the model's.")] = None,
    fusion: Annotated[Fusion, typer.Option(help="How to combine the masks of the ensemble.")] = Fusion.MEAN,
    save_probabilities: Annotated[
        bool, typer.Option("--save-probabilities", help="Write *_prob.nii.gz, the class probabilities.")
    ] = False,
    save_uncertainty: Annotated[bool, typer.Option("--save-uncertainty", help="Write *_uncertainty.nii.gz.")] = False,
    uncertainty: Annotated[Uncertainty, typer.Option(help="Kind of the uncertainty map.")] = Uncertainty.ENTROPY,
    save_members: Annotated[
        bool, typer.Option("--save-members", help="Write *_members.nii.gz, the mask of every member.")
    ] = False,
    save_pseudo_labels: Annotated[
        bool,
        typer.Option("--save-pseudo-labels", help="Write *_pseudo.nii.gz: the mask, with 255 where members disagree."),
    ] = False,
    max_disagreement: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="Mutual information of the members above which a pseudo-label is 255."),
    ] = 0.1,
    statistics: Annotated[bool, typer.Option("--statistics", help="Write *_statistics.json: volumes in ml.")] = False,
    preview: Preview = False,
    output_format: Annotated[Format, typer.Option("--format", help="File format of the mask.")] = Format.NIFTI,
    report: Annotated[Path | None, typer.Option(help="Write one HTML page about all scans to this file.")] = None,
    skip_existing: SkipExisting = False,
    shard: Annotated[
        str | None, typer.Option(metavar="i/n", help="Segment only part i of n of the scans (1/4 to 4/4).")
    ] = None,
    max_memory: Annotated[
        float | None,
        typer.Option(
            min=0.1, metavar="GB", help="Most memory of the process; large scans are computed in smaller parts."
        ),
    ] = None,
    device: Device = "auto",
    seed: Seed = 0,
    quiet: Quiet = None,
    as_json: AsJson = False,
) -> None:
    """Segment scans, and write a mask for each."""
    part = _parse_shard(shard)
    from medseg_diffusion.workflows import segment as workflow

    options = workflow.SegmentOptions(
        model=model,
        output=output,
        ensemble=ensemble,
        steps=steps,
        sampler=sampler.value if sampler else None,
        fusion=fusion.value,
        seed=seed,
        device=device,
        save_probabilities=save_probabilities,
        save_uncertainty=save_uncertainty,
        uncertainty=uncertainty.value,
        save_members=save_members,
        save_pseudo_labels=save_pseudo_labels,
        max_disagreement=max_disagreement,
        statistics=statistics,
        preview=preview,
        report=report,
        skip_existing=skip_existing,
        shard=part,
        output_format=output_format.value,
        max_memory=max_memory,
    )
    run_scans(lambda on_case, show: workflow.segment(scans, options, on_case, show), quiet, as_json)
