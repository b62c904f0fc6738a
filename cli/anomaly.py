"""`medseg train-anomaly`, `medseg calibrate-anomaly` and `medseg anomaly`."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ._shared import AsJson, Device, Quiet, Seed, fail, print_json, print_table, progress, warnings_at_once
from .segment import exit_with

if TYPE_CHECKING:
    from medseg_diffusion.methods.healthy_scores import HealthyScores
    from medseg_diffusion.training.trainer import Progress
    from medseg_diffusion.workflows.segment import CaseResult


class Method(StrEnum):
    """Names of the detectors."""

    LATENT_HEALING = "latent-healing"
    RECONSTRUCTION = "reconstruction"
    PARTIAL_NOISE = "partial-noise"
    PATCHED = "patched"
    CLASSIFIER_GUIDED = "classifier-guided"
    COUNTERFACTUAL = "counterfactual"


LatentQuantile = Annotated[
    float | None, typer.Option(min=0.0, max=1.0, help="Of latent-healing, in its latents; default: the model's.")
]
Median = Annotated[int | None, typer.Option(min=1, help="Side of the median filter, odd; default: the model's.")]
Erosion = Annotated[int | None, typer.Option(min=0, help="Erosion of the foreground in voxels; default: the model's.")]
MinVolume = Annotated[
    float | None, typer.Option(min=0.0, metavar="MM3", help="Smallest part of the mask; default: the model's.")
]


def train_anomaly(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A preset (`medseg configs list`) or a YAML file.")],
    healthy: Annotated[Path, typer.Option("--healthy", help="Folder of healthy scans.")],
    run: Annotated[Path, typer.Option("-o", "--output", metavar="RUN", help="Run folder to write.")],
    exclude_labelled: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Scans have labelled lesions: leave out slices closer than N to one."),
    ] = None,
    unhealthy: Annotated[
        Path | None, typer.Option(help="Scans with lesions, for detectors that learn from both kinds.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override one key, for instance a.b=3.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in RUN.")] = False,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Stop each network after so many steps.")] = None,
    time_limit: Annotated[float | None, typer.Option(min=0.0, metavar="MIN", help="Stop after MIN minutes.")] = None,
    device: Device = "auto",
    seed: Seed = 0,
    quiet: Quiet = None,
    as_json: AsJson = False,
) -> None:
    """Train on healthy scans alone what finds anomalies, and calibrate its thresholds on held-out ones."""
    from medseg_diffusion.config.anomaly import AnomalyConfig
    from medseg_diffusion.config.load import load_config
    from medseg_diffusion.errors import UsageError
    from medseg_diffusion.workflows.train_anomaly import train_anomaly as train

    settings = load_config(config, overrides or [])
    if not isinstance(settings, AnomalyConfig):
        raise UsageError(f"{config}: configures a {settings.method}, not anomaly detection (method: anomaly)")
    with progress(quiet) as show, warnings_at_once():

        def on_progress(state: Progress) -> None:
            left = f", {state.seconds_left / 60:.0f} min left"
            message = f"step {state.step} of {state.max_steps}, loss {state.loss:.4f}{left}"
            show(message, state.step / max(state.max_steps, 1))

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
            on_progress=on_progress,
            on_prepare=lambda what, done, total: show(f"{what}: {done} of {total}", done / max(total, 1)),
        )
    _print_calibration(result.model, result.calibration, quiet, as_json)


def calibrate_anomaly(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Name or folder of an anomaly model.")],
    healthy: Annotated[Path, typer.Option("--healthy", help="Folder of healthy scans that it was not trained on.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="New model folder.")],
    exclude_labelled: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Scans have labelled lesions: leave out slices closer than N to one."),
    ] = None,
    quantile: Annotated[
        float | None, typer.Option(help="0.975 for 2.5 % of healthy voxels; default: the model's.")
    ] = None,
    latent_quantile: LatentQuantile = None,
    median: Median = None,
    erosion: Erosion = None,
    min_volume: MinVolume = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A detector's setting, for instance residual=bright."),
    ] = None,
    device: Device = "auto",
    quiet: Quiet = None,
    as_json: AsJson = False,
) -> None:
    """Fit the thresholds of a trained model to other healthy scans, or to another filter of its maps."""
    from medseg_diffusion.workflows.train_anomaly import calibrate_anomaly as calibrate

    after = {"median": median, "erosion": erosion, "min_volume_mm3": min_volume}
    with progress(quiet) as show:
        result = calibrate(
            model,
            healthy,
            output,
            exclude_labelled=exclude_labelled,
            quantile=quantile,
            latent_quantile=latent_quantile,
            after={name: value for name, value in after.items() if value is not None},
            overrides=overrides or [],
            device=device,
            on_prepare=lambda what, done, total: show(f"{what}: {done} of {total}", done / max(total, 1)),
        )
    _print_calibration(result.model, result.calibration, quiet, as_json)


def _print_calibration(model: Path, calibration: dict[str, HealthyScores], quiet: bool | None, as_json: bool) -> None:
    rows = [
        {
            "method": method,
            "quantile": found.quantile,
            "threshold": found.automatic,
            "false positives": found.rate,
            "patients": found.patients,
        }
        for method, found in calibration.items()
    ]
    if as_json:
        print_json({"model": model, "calibration": rows})
    elif not quiet:
        print_table(rows)
        typer.echo(f"model: {model}")


def anomaly(
    scans: Annotated[
        list[Path], typer.Argument(metavar="SCAN...", help="NIfTI, NRRD, MetaImage, DICOM folders, or folders of them.")
    ],
    model: Annotated[str | None, typer.Option("-m", "--model", help="Name or folder; default: the built-in.")] = None,
    threshold: Annotated[
        str, typer.Option(help="auto, a quantile of healthy scans such as q0.99, or a number.")
    ] = "auto",
    method: Annotated[Method | None, typer.Option(help="Detector; default: the model's.")] = None,
    latent_quantile: LatentQuantile = None,
    median: Median = None,
    erosion: Erosion = None,
    min_volume: MinVolume = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="File (for one scan) or folder.")] = None,
    preview: Annotated[bool, typer.Option("--preview", help="Write *_anomaly_preview.png.")] = False,
    skip_existing: Annotated[bool, typer.Option("--skip-existing", help="Leave finished scans alone.")] = False,
    device: Device = "auto",
    seed: Seed = 0,
    quiet: Quiet = None,
    as_json: AsJson = False,
) -> None:
    """Find what is unlike healthy scans: map, mask and score; written next to the scans unless -o says otherwise."""
    from medseg_diffusion.workflows import anomaly as detect

    options = detect.AnomalyOptions(
        model=model,
        threshold=threshold,
        method=method.value if method else None,
        latent_quantile=latent_quantile,
        median=median,
        erosion=erosion,
        min_volume_mm3=min_volume,
        output=output,
        seed=seed,
        device=device,
        preview=preview,
        skip_existing=skip_existing,
    )

    def print_case(case: CaseResult) -> None:
        if case.status != "failed":
            note = "exists, skipped" if case.status == "skipped" else f"{case.seconds:.1f} s"
            typer.echo(f"{case.scan} ({note})")
            for warning in case.warnings:
                fail(f"{case.scan}: {warning}", kind="warning")
            for name, path in case.outputs.items():
                typer.echo(f"  {name}: {path}")

    with progress(quiet) as on_progress:
        on_case = None if quiet or as_json else print_case
        cases = detect.detect(scans, options, on_case=on_case, on_progress=on_progress)
    if as_json:
        print_json([asdict(case) for case in cases])
    exit_with(cases)
