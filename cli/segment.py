"""`medseg segment`."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ._shared import AsJson, Device, Quiet, Seed, fail, print_json, progress

if TYPE_CHECKING:
    from medseg_diffusion.workflows.segment import CaseResult


class Sampler(StrEnum):
    """Names of the update rules."""

    DDPM = "ddpm"
    DDIM = "ddim"
    DPM_SOLVER = "dpm++"


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


def segment(
    scans: Annotated[
        list[Path],
        typer.Argument(metavar="SCAN...", help="NIfTI, NRRD, MetaImage, PNG, JPEG, TIFF, BMP, DICOM; or folders."),
    ],
    model: Annotated[str | None, typer.Option("-m", "--model", help="Name or folder; default: the built-in.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="File (for one scan) or folder.")] = None,
    ensemble: Annotated[int | None, typer.Option(min=1, help="Masks sampled per scan; default: the model's.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps; default: the model's.")] = None,
    sampler: Annotated[Sampler | None, typer.Option(help="Default: the model's.")] = None,
    fusion: Annotated[Fusion, typer.Option(help="How the masks of the ensemble become one.")] = Fusion.MEAN,
    save_probabilities: Annotated[bool, typer.Option("--save-probabilities", help="Write *_prob.nii.gz.")] = False,
    save_uncertainty: Annotated[bool, typer.Option("--save-uncertainty", help="Write *_uncertainty.nii.gz.")] = False,
    uncertainty: Annotated[Uncertainty, typer.Option(help="Which uncertainty is written.")] = Uncertainty.ENTROPY,
    save_members: Annotated[bool, typer.Option("--save-members", help="Write *_members.nii.gz.")] = False,
    save_pseudo_labels: Annotated[
        bool, typer.Option("--save-pseudo-labels", help="Write *_pseudo.nii.gz: 255 where the members disagree.")
    ] = False,
    max_disagreement: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Of pseudo-labels: most mutual information of the members.")
    ] = 0.1,
    statistics: Annotated[bool, typer.Option("--statistics", help="Write *_statistics.json: volumes in ml.")] = False,
    preview: Annotated[bool, typer.Option("--preview", help="Write *_preview.png.")] = False,
    output_format: Annotated[Format, typer.Option("--format", help="Format of the mask.")] = Format.NIFTI,
    report: Annotated[Path | None, typer.Option(help="Write one HTML page on all scans.")] = None,
    skip_existing: Annotated[bool, typer.Option("--skip-existing", help="Leave finished scans alone.")] = False,
    shard: Annotated[str | None, typer.Option(metavar="i/n", help="Do part i of n (1/4 to 4/4) of the scans.")] = None,
    device: Device = "auto",
    seed: Seed = 0,
    quiet: Quiet = None,
    as_json: AsJson = False,
) -> None:
    """Segment scans; masks are written next to them unless -o says otherwise."""
    part = _parse_shard(shard)
    from medseg_diffusion.workflows import segment as pipeline

    options = pipeline.SegmentOptions(
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
    )

    def print_case(case: CaseResult) -> None:
        if case.status != "failed":
            note = "exists, skipped" if case.status == "skipped" else f"{case.seconds:.1f} s"
            typer.echo(f"{case.scan} ({note})")
            for warning in case.warnings:
                fail(f"{case.scan}: {warning}", kind="warning")
            for name, path in case.outputs.items():
                typer.echo(f"  {name}: {path}")
            if quiet is False:
                for name, volume in case.volumes_ml.items():
                    low, high = case.intervals_ml.get(name, (None, None))
                    interval = "" if low is None else f" ({100 * (case.level or 0):.0f} %: {low:.2f} to {high:.2f})"
                    typer.echo(f"  {name}: {volume:.2f} ml{interval}")

    with progress(quiet) as on_progress:
        on_case = None if quiet or as_json else print_case
        cases = pipeline.segment(scans, options, on_case=on_case, on_progress=on_progress)
    if as_json:
        print_json([asdict(case) for case in cases])
    exit_with(cases)


def exit_with(cases: list[CaseResult]) -> None:
    """List the failures on stderr. A scan that was alone gives its own exit code; among several any failure gives 1."""
    failed = [case for case in cases if case.status == "failed"]
    for case in failed:
        error = case.error or "failed"
        fail(error if case.scan.name in error else f"{case.scan}: {error}")
    if failed:
        if len(cases) > 1:
            fail(f"{len(failed)} of {len(cases)} scans failed")
        raise typer.Exit(failed[0].exit_code if len(cases) == 1 else 1)
