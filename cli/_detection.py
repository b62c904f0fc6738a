"""Options of anomaly detection that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._options import existing
from ._shared import print_json, print_table

if TYPE_CHECKING:
    from medseg_diffusion.workflows.anomaly_calibration import CalibratedAnomaly

Healthy = Annotated[
    Path, typer.Option("--healthy", help="Folder of healthy scans.", callback=existing("a folder of scans"))
]
ExcludeLabelled = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="Leave out slices closer than N slices to a labelled lesion."),
]
LatentQuantile = Annotated[
    float | None,
    typer.Option(
        min=0.0, max=1.0, help="latent-healing: share of healthy latents that stay as they are; default: the model's."
    ),
]
Median = Annotated[
    int | None, typer.Option(min=1, help="Side of the median filter in voxels, odd; default: the model's.")
]
Erosion = Annotated[int | None, typer.Option(min=0, help="Erosion of the foreground in voxels; default: the model's.")]
MinVolume = Annotated[
    float | None,
    typer.Option(min=0.0, metavar="MM3", help="Smallest volume of a connected part of the mask; default: the model's."),
]


def calibration_rows(result: CalibratedAnomaly) -> list[dict[str, Any]]:
    """The thresholds of every detector."""
    return [
        {
            "method": method,
            "quantile": scores.quantile,
            "threshold": scores.automatic,
            "false positives": scores.rate,
            "patients": scores.patients,
        }
        for method, scores in result.calibration.items()
    ]


def print_calibration(result: CalibratedAnomaly, quiet: bool | None, as_json: bool) -> None:
    """Print the thresholds of every detector."""
    rows = calibration_rows(result)
    if as_json:
        print_json({"model": result.model, "calibration": rows})
    elif not quiet:
        print_table(rows)
        typer.echo(f"model: {result.model}")
