"""`medseg calibrate-segmenter`."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ._options import AsJson, Device, LabelledScans, ModelArgument, Quiet
from ._shared import print_json, print_table, progress


def calibrate_segmenter(
    model: ModelArgument,
    data: LabelledScans,
    output: Annotated[Path, typer.Option("-o", "--output", help="New model folder.")],
    device: Device = "auto",
    quiet: Quiet = None,
    as_json: AsJson = False,
) -> None:
    """Fit a segmenter's volume intervals, quality flag and temperature to labelled scans of other patients.

    They hold for the model's default sampler, steps, ensemble and fusion.
    """
    from medseg_diffusion.workflows.calibrate_segmenter import calibrate_segmenter as calibrate

    with progress(quiet) as show:
        calibration = calibrate(model, data, output, device=device, on_progress=show)
    if as_json:
        print_json({"model": output, "calibration": asdict(calibration)})
        return
    if quiet:
        return
    print_table(
        [
            {"quantity": "holds for", "value": str(calibration.sampling)},
            {"quantity": "patients", "value": calibration.patients},
            {"quantity": "scans", "value": calibration.cases},
            {"quantity": "temperature", "value": calibration.temperature},
            *(
                {"quantity": f"volume factor of label {label}", "value": math.exp(error)}
                for label, error in enumerate(calibration.volume_errors, start=1)
            ),
            {"quantity": "level of the volume intervals", "value": calibration.level},
        ]
    )
    typer.echo(f"model: {output}")
