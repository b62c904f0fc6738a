"""`medseg train-anomaly`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ._detection import ExcludeLabelled, Healthy, calibration_rows
from ._options import (
    AsJson,
    Config,
    Device,
    Gpus,
    MaxSteps,
    Overrides,
    Quiet,
    Resume,
    RunFolder,
    Seed,
    existing,
    time_limit_option,
)
from ._training import Trained, configured, print_trained, start_processes, training


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
    time_limit: Annotated[
        float | None, time_limit_option("The preparation of scans does not count, and calibration follows.")
    ] = None,
    gpus: Gpus = 1,
    device: Device = "auto",
    seed: Seed = 0,
    quiet: Quiet = None,
    as_json: AsJson = False,
) -> None:
    """Train an anomaly model on healthy scans, and calibrate its thresholds on held-out healthy scans."""
    from medseg_diffusion.config.load import load_anomaly_config

    settings = configured(load_anomaly_config, config, overrides, quiet)
    start_processes(gpus, device)
    trained = Trained(run, "medseg anomaly SCAN -m MODEL")
    with training(run, quiet) as show:
        from medseg_diffusion.workflows.train_anomaly import train_anomaly as train

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
            on_progress=show,
            on_outcome=trained.outcomes.append,
        )
    print_trained(trained, result.model, quiet, as_json, {"calibration": calibration_rows(result)})
