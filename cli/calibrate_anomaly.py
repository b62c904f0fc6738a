"""`medseg calibrate-anomaly`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ._detection import Erosion, ExcludeLabelled, Healthy, LatentQuantile, Median, MinVolume, print_calibration
from ._options import AsJson, Device, ModelArgument, Quiet
from ._shared import progress


# many: one parameter for each option of the command
def calibrate_anomaly(
    model: ModelArgument,
    healthy: Healthy,
    output: Annotated[Path, typer.Option("-o", "--output", help="New model folder.")],
    exclude_labelled: ExcludeLabelled = None,
    quantile: Annotated[
        float | None,
        typer.Option(help="Share of healthy voxels below the threshold, such as 0.975; default: the model's."),
    ] = None,
    latent_quantile: LatentQuantile = None,
    median: Median = None,
    erosion: Erosion = None,
    min_volume: MinVolume = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Override a detector's setting, for instance residual=bright; repeatable.",
        ),
    ] = None,
    device: Device = "auto",
    quiet: Quiet = None,
    as_json: AsJson = False,
) -> None:
    """Fit the thresholds of an anomaly model to healthy scans that it was not trained on."""
    from medseg_diffusion.models.anomaly import DetectionOptions
    from medseg_diffusion.workflows.calibrate_anomaly import CalibrationOptions
    from medseg_diffusion.workflows.calibrate_anomaly import calibrate_anomaly as calibrate

    detection = DetectionOptions(None, latent_quantile, median, erosion, min_volume)
    options = CalibrationOptions(exclude_labelled, quantile, detection, overrides or ())
    with progress(quiet) as show:
        result = calibrate(model, healthy, output, options, device=device, on_progress=show)
    print_calibration(result, quiet, as_json)
