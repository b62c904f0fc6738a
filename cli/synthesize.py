"""`medseg synthesize-anomalies`."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ._shared import AsJson, Quiet, Seed, print_json, progress
from .segment import exit_with

if TYPE_CHECKING:
    from medseg_diffusion.workflows.segment import CaseResult


class Kind(StrEnum):
    """Kinds of anomaly."""

    HYPER = "hyper"
    HYPO = "hypo"
    DEFORMATION = "deformation"


def synthesize_anomalies(
    scans: Annotated[
        list[Path], typer.Argument(metavar="SCAN...", help="NIfTI, NRRD or MetaImage files, or folders of them.")
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="Folder for images/, labels/ and anomalies.json.")
    ],
    kind: Annotated[Kind, typer.Option(help="Brighter, darker, or displaced.")] = Kind.HYPER,
    contrast: Annotated[
        float,
        typer.Option(
            metavar="X",
            help="Change of intensity over the foreground's spread (95th less 5th percentile); of a deformation, "
            "displacement over radius.",
        ),
    ] = 0.3,
    count: Annotated[int, typer.Option(min=1, metavar="N", help="Anomalies in each scan.")] = 1,
    radius_mm: Annotated[
        tuple[float, float], typer.Option(metavar="MIN MAX", help="Radius is drawn between these, in mm.")
    ] = (4.0, 10.0),
    seed: Seed = 0,
    quiet: Quiet = None,
    as_json: AsJson = False,
) -> None:
    """Put anomalies with exact masks into healthy scans: a labelled folder that measures an anomaly model."""
    from medseg_diffusion.workflows import synthesize_anomalies as synthesize

    options = synthesize.SynthesisOptions(output, kind.value, contrast, count, radius_mm, seed)

    def print_case(case: CaseResult) -> None:
        if case.status != "failed":
            typer.echo(f"{case.scan} ({case.seconds:.1f} s)")
            for name, path in case.outputs.items():
                typer.echo(f"  {name}: {path}")
            if quiet is False:
                for name, volume in case.volumes_ml.items():
                    typer.echo(f"  {name}: {volume:.2f} ml")

    with progress(quiet) as on_progress:
        on_case = None if quiet or as_json else print_case
        cases = synthesize.synthesize_anomalies(scans, options, on_case=on_case, on_progress=on_progress)
    if as_json:
        print_json([asdict(case) for case in cases])
    exit_with(cases)
