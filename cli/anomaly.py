"""`medseg anomaly`."""

from __future__ import annotations

import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from medseg_diffusion.errors import UsageError

from ._detection import Erosion, LatentQuantile, Median, MinVolume
from ._options import (
    AlsoScans,
    AsJsonLines,
    Compile,
    Device,
    Pattern,
    Preview,
    Quiet,
    RunReport,
    Seed,
    Series,
    SkipExisting,
    model_option,
    named_scans,
    output_option,
    scans_argument,
)
from ._shards import Shard, failures_file, parse_shard
from ._shared import run_scans


class Method(StrEnum):
    """Names of the detectors."""

    LATENT_HEALING = "latent-healing"
    RECONSTRUCTION = "reconstruction"
    PARTIAL_NOISE = "partial-noise"
    PATCHED = "patched"
    CLASSIFIER_GUIDED = "classifier-guided"
    COUNTERFACTUAL = "counterfactual"


# many, long: one parameter, with its help, for each option of the command
def anomaly(
    scans: Annotated[list[Path] | None, scans_argument("NIfTI, NRRD or MetaImage files")] = None,
    model: Annotated[str | None, model_option("flair-anomaly")] = None,
    threshold: Annotated[
        str,
        typer.Option(
            help="Threshold of the mask: auto (calibrated), a quantile of healthy scans such as q0.99, or a number."
        ),
    ] = "auto",
    method: Annotated[Method | None, typer.Option(help="Detector; default: the model's.")] = None,
    latent_quantile: LatentQuantile = None,
    median: Median = None,
    erosion: Erosion = None,
    min_volume: MinVolume = None,
    output: Annotated[Path | None, output_option("score map")] = None,
    also: AlsoScans = None,
    pattern: Pattern = None,
    series: Series = None,
    preview: Preview = False,
    save_counterpart: Annotated[
        bool,
        typer.Option(
            "--save-counterpart", help="Write *_anomaly_counterpart.nii.gz, the scan as the method makes it healthy."
        ),
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(
            help="Write one HTML page about all scans of this call, finished ones too, and the counterparts, which it "
            "shows; with --shard each part has its own, such as report.1-of-4.html."
        ),
    ] = None,
    run_report: RunReport = None,
    skip_existing: SkipExisting = False,
    shard: Shard = None,
    device: Device = "auto",
    compile: Compile = False,
    seed: Seed = 0,
    quiet: Quiet = None,
    as_json: AsJsonLines = False,
    fast: Annotated[bool, typer.Option("--fast", hidden=True)] = False,
    keep_largest: Annotated[bool, typer.Option("--keep-largest", hidden=True)] = False,
) -> None:
    """Find anomalies in scans, and write a score map, a mask and the score of each scan."""
    named = named_scans(scans, also)
    if fast:
        raise UsageError(
            "anomaly has no --fast: the number of draws is part of a model's calibration; make a faster model with "
            "medseg calibrate-anomaly --set partial_noise.draws=2"
        )
    if keep_largest:
        raise UsageError("anomaly has no --keep-largest, because anomalies may be several; use --min-volume")
    part = parse_shard(shard)
    failures = failures_file(output)
    from medseg_diffusion.models.anomaly import DetectionOptions
    from medseg_diffusion.volumes.sources import InputOptions
    from medseg_diffusion.workflows import anomaly as workflow
    from medseg_diffusion.workflows.scans import of_part

    options = workflow.AnomalyOptions(
        model=model,
        threshold=threshold,
        detection=DetectionOptions(method.value if method else None, latent_quantile, median, erosion, min_volume),
        output=output,
        seed=seed,
        device=device,
        compile=compile,
        preview=preview,
        save_counterpart=save_counterpart,
        table=True,
        report=report,
        command=shlex.join(["medseg", *sys.argv[1:]]),
        skip_existing=skip_existing,
        run_report=run_report,
        inputs=InputOptions(pattern, series=series),
        shard=part,
        failures=failures,
    )
    run_scans(
        lambda on_case, show: workflow.anomaly(named, options, on_case, show),
        quiet,
        as_json,
        of_part(failures, part),
        go_on="--skip-existing",
    )
