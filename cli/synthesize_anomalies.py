"""`medseg synthesize-anomalies`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ._options import AsJson, Quiet, Seed, Volumes
from ._shared import run_scans


class Kind(StrEnum):
    """Kinds of anomaly."""

    HYPER = "hyper"
    HYPO = "hypo"
    DEFORMATION = "deformation"


# many: one parameter for each option of the command
def synthesize_anomalies(
    scans: Volumes,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="Folder for images/, labels/ and anomalies.json.")
    ],
    kind: Annotated[Kind, typer.Option(help="Brighter, darker or displaced tissue.")] = Kind.HYPER,
    contrast: Annotated[
        float,
        typer.Option(
            metavar="X",
            help="Change of intensity, relative to the foreground's 5th to 95th percentile range; for a deformation, "
            "displacement relative to the radius.",
        ),
    ] = 0.3,
    count: Annotated[int, typer.Option(min=1, metavar="N", help="Number of anomalies in each scan.")] = 1,
    radius_mm: Annotated[
        tuple[float, float], typer.Option(metavar="MIN MAX", help="Smallest and largest radius in mm.")
    ] = (4.0, 10.0),
    seed: Seed = 0,
    quiet: Quiet = None,
    as_json: AsJson = False,
) -> None:
    """Insert anomalies with exact masks into healthy scans, as test data for anomaly models."""
    from medseg_diffusion.workflows import synthesize_anomalies as workflow

    options = workflow.SynthesisOptions(output, kind.value, contrast, count, radius_mm, seed)
    run_scans(lambda on_case, show: workflow.synthesize_anomalies(scans, options, on_case, show), quiet, as_json)
