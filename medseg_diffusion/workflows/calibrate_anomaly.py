"""`medseg calibrate-anomaly`: fit the thresholds of a trained anomaly model to other healthy scans."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from medseg_diffusion.config.anomaly import AnomalyConfig
from medseg_diffusion.config.load import override_key, parse_config
from medseg_diffusion.data.file_lists import Data, folder_or_files
from medseg_diffusion.data.healthy import TRAINED_ON, find_healthy, refuse_lesions, refuse_trained
from medseg_diffusion.device import choose_device, keep_freed_memory, tune
from medseg_diffusion.errors import UsageError
from medseg_diffusion.files import require_new_folder
from medseg_diffusion.models.anomaly import (
    DetectionOptions,
    calibration_entry,
    calibration_weights,
    postprocessing,
    restore_anomaly,
    without_calibration,
)
from medseg_diffusion.models.card import render_card
from medseg_diffusion.models.store import load_model_files, save_model
from medseg_diffusion.training.progress import OnProgress, count_of, silent

from .anomaly_calibration import AnomalyCalibration, CalibratedAnomaly

DETECTION = ("residual", "latent_healing", "partial_noise", "patched", "counterfactual", "postprocessing", "quantile")
"""Keys of the configuration that do not affect the networks."""


@dataclass(frozen=True)
class CalibrationOptions:
    """Options of `calibrate_anomaly`. They become the defaults of the new model; None keeps the old model's.

    Attributes:
        exclude_labelled: Slices closer than this to a labelled one are left out; with None, labels are an error.
        quantile: Nominal share of healthy voxels below the threshold.
        detection: Quantile of latents, and post-processing.
        overrides: Settings of the detectors, such as "residual=bright" or "latent_healing.start=700".
    """

    exclude_labelled: int | None = None
    quantile: float | None = None
    detection: DetectionOptions = DetectionOptions()
    overrides: Sequence[str] = ()


def calibrate_anomaly(
    model: str | Path,
    healthy: Data,
    output: str | Path,
    options: CalibrationOptions = CalibrationOptions(),
    *,
    device: str = "auto",
    on_progress: OnProgress = silent,
) -> CalibratedAnomaly:
    """Fit the thresholds of a trained model to other healthy scans, such as those of another scanner.

    The statistics of healthy latents are fitted again, too. The networks stay as they are.

    Args:
        model: Folder or installed name.
        healthy: Folder or list of scans that the model was not trained on, as for `train_anomaly`; all are used.
        output: The new model directory.
        options: The options.
        device: auto, cpu, cuda, cuda:N or mps.
        on_progress: Called with a text and the share done, 0 to 1.

    Raises:
        ModelError: No usable model.
        InputError: Unusable scans, scans that the model was trained on, or lesions in healthy ones.
        UsageError: An output that exists, or values out of range.
    """
    output, given = Path(output), folder_or_files(healthy)
    require_new_folder(output)
    saved = load_model_files(model)
    chosen = choose_device(device)
    tune(chosen)
    if chosen.type == "cpu":
        keep_freed_memory()
    trained, generator, classifier = restore_anomaly(saved, chosen)
    config = _changed(trained, options, str(saved.path))
    scans = find_healthy(given)
    trained_on = saved.card.get("training", {}).get(TRAINED_ON)
    if trained_on is None:  # a model of an older version
        warnings.warn(
            f"{saved.path}: does not say which scans it was trained on; make sure that none of them is in {given}",
            stacklevel=2,
        )
    refuse_trained(scans, trained_on or ())
    for scan in scans:
        refuse_lesions(scan, options.exclude_labelled)
    fit = AnomalyCalibration(config, generator, classifier, scans, options.exclude_labelled, count_of(on_progress))
    latents, calibration = fit.fit()
    excluded = options.exclude_labelled
    left_out = {} if excluded is None else {"without slices closer to a labelled one than": excluded}
    card: dict[str, Any] = {
        **saved.card,
        "config": config.model_dump(mode="json"),
        "calibration": calibration_entry(calibration),
        "calibrated_on": {"scans": len(scans), **left_out},
    }
    weights = without_calibration(saved) | calibration_weights(latents, calibration)
    save_model(output, card, weights, render_card(card))
    return CalibratedAnomaly(output, calibration)


def _changed(config: AnomalyConfig, options: CalibrationOptions, source: str) -> AnomalyConfig:
    """The configuration, changed by the options."""
    content = config.model_dump(mode="json")
    content["postprocessing"] = postprocessing(config, options.detection).model_dump(mode="json")
    if options.quantile is not None:
        content["quantile"] = options.quantile
    if options.detection.latent_quantile is not None:
        content["latent_healing"]["quantile"] = options.detection.latent_quantile
    for override in options.overrides:
        if override.partition("=")[0].partition(".")[0] not in DETECTION:
            raise UsageError(f"--set {override}: calibration changes {', '.join(DETECTION)}; train again for the rest")
        override_key(content, override)
    return cast(AnomalyConfig, parse_config(content, source))
