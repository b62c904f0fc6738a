"""`medseg train-anomaly`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ._detection import ExcludeLabelled, Healthy, print_calibration
from ._options import AsJson, Config, Device, MaxSteps, Overrides, Quiet, Resume, RunFolder, Seed, TimeLimit, existing
from ._shared import count_of, progress, step_of, warnings_at_once


# many: one parameter for each option of the command
def train_anomaly(
    config: Config,
    healthy: Healthy,
    run: RunFolder,
    exclude_labelled: ExcludeLabelled = None,
    unhealthy: Annotated[
        Path | None,
        typer.Option(
            help="Folder of scans with lesions, for detectors that learn from both kinds.",
            callback=existing("a folder of scans"),
        ),
    ] = None,
    overrides: Overrides = None,
    resume: Resume = False,
    max_steps: MaxSteps = None,
    time_limit: TimeLimit = None,
    device: Device = "auto",
    seed: Seed = 0,
    quiet: Quiet = None,
    as_json: AsJson = False,
) -> None:
    """Train an anomaly model on healthy scans, and calibrate its thresholds on held-out healthy scans."""
    from medseg_diffusion.config.anomaly import AnomalyConfig
    from medseg_diffusion.config.load import load_config
    from medseg_diffusion.errors import UsageError

    settings = load_config(config, overrides or [])
    if not isinstance(settings, AnomalyConfig):
        raise UsageError(f"{config}: configures a {settings.method}, not anomaly detection (method: anomaly)")
    from medseg_diffusion.workflows.train_anomaly import train_anomaly as train

    with progress(quiet) as show, warnings_at_once():
        result = train(
            settings,
            healthy,
            run,
            exclude_labelled=exclude_labelled,
            unhealthy=unhealthy,
            resume=resume,
            max_steps=max_steps,
            time_limit_min=time_limit,
            device=device,
            seed=seed,
            on_progress=step_of(show),
            on_prepare=count_of(show),
        )
    print_calibration(result, quiet, as_json)
