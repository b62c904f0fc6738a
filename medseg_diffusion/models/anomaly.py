"""Trained anomaly models in memory: they score how unlike healthy scans a scan is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from medseg_diffusion.build import make_detector
from medseg_diffusion.config.anomaly import AnomalyConfig, PostprocessingSection
from medseg_diffusion.device import choose_device, keep_freed_memory, tune
from medseg_diffusion.errors import UsageError
from medseg_diffusion.methods.healthy_scores import HealthyScores
from medseg_diffusion.methods.latent_healing import HealthyLatents
from medseg_diffusion.methods.seen import sentence
from medseg_diffusion.volumes.volume import Volume

from .anomaly_map import AnomalyMap, OnGrid, noise_networks, on_grid, scored
from .doubts import measured, stored_seen
from .generator import Generator, restore_classifier, restore_generator
from .restore import typed_config, usable
from .store import SavedModel, load_model_files

GENERATOR, CLASSIFIER = "generator", "classifier"
"""Names of the parts of an anomaly model (`SavedModel.part`)."""
_LATENTS = ("mean", "std", "quantiles")


@dataclass(frozen=True)
class DetectionOptions:
    """The detector and its post-processing; None takes the model's default.

    Attributes:
        method: Name of one of the model's detectors.
        latent_quantile: Share of healthy latent positions that "latent-healing" leaves as they are.
        median: Side of the median filter, in voxels of the model's grid.
        erosion: Erosion of the foreground, in voxels of the model's grid.
        min_volume_mm3: Smallest volume of a connected part of the mask.
    """

    method: str | None = None
    latent_quantile: float | None = None
    median: int | None = None
    erosion: int | None = None
    min_volume_mm3: float | None = None


class AnomalyModel:
    """A trained anomaly model, loaded once for many scans.

    Args:
        name_or_path: Model folder, run folder or installed name, or a model that was read before.
        options: Detector and post-processing.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        compile: Compile the denoiser; maps differ by rounding.

    Raises:
        ModelError: A missing or unusable model.
        UsageError: A detector that the model does not have, or an unknown device.
    """

    def __init__(
        self,
        name_or_path: str | Path | SavedModel,
        options: DetectionOptions = DetectionOptions(),
        device: str = "auto",
        compile: bool = False,
    ) -> None:
        self.device = choose_device(device)
        tune(self.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.saved: SavedModel = load_model_files(name_or_path)
        self.seen = stored_seen(self.saved)
        trained, self.generator, self.classifier = restore_anomaly(self.saved, self.device, compile)
        self.method = _method(self.saved, trained, options)
        self.networks = noise_networks(self.generator, self.classifier)
        self.detector = make_detector(
            trained,
            self.generator.task,
            self.generator.codec,
            self.classifier,
            self.method,
            stored_latents(self.saved),
            options.latent_quantile,
        )
        after = postprocessing(trained, options)
        self.config = trained.model_copy(update={"postprocessing": after})
        self.notes = _notes(trained, after, options)

    @property
    def name(self) -> str:
        return self.saved.name

    def healthy_scores(self) -> HealthyScores | None:
        """The calibration of the chosen detector on healthy scans; None without calibration."""
        return stored_scores(self.saved, self.method)

    def comparable_scores(self, scan_map: AnomalyMap) -> HealthyScores | None:
        """The calibration with which the map of a scan can be compared.

        None without one, for options that it does not hold for, and for a scan unlike those of the training.
        """
        return None if self.notes or scan_map.unlike_training else self.healthy_scores()

    def percentile(self, scan_map: AnomalyMap) -> float | None:
        """Share of healthy scans with a lower score, in %; None if the map is not comparable.

        It is rounded as in the files, so that a finished scan has the flags and the words of a new one.
        """
        healthy = self.comparable_scores(scan_map)
        return None if healthy is None else round(healthy.percentile(scan_map.scan_score), 1)

    def score(
        self,
        volume: Volume,
        seed: int = 0,
        on_progress: Callable[[float], None] = lambda done: None,
        counterpart: bool = False,
    ) -> AnomalyMap:
        """Score a scan; ``seed`` decides all randomness. ``on_progress`` is called with the share done.

        The healthy counterpart that the method produces is kept if it is asked for.

        Raises:
            InputError: A scan without foreground.
        """
        grid = on_grid(self.config, volume)
        scan_map = scored(
            self.detector, self.config, grid, seed, self.device, self.networks, None, on_progress, counterpart
        )
        return replace(scan_map, unlike_training=self._unlike_training(grid))

    def _unlike_training(self, grid: OnGrid) -> str:
        if self.seen is None:
            return ""
        generator = self.config.generator
        scan = measured(grid.scan, grid.image, generator.preprocessing.orientation, len(generator.data.shape))
        doubts = self.seen.doubts_of_scan(scan)
        return sentence(doubts, "" if self.healthy_scores() is None else "it is not compared with healthy scans")


def _method(saved: SavedModel, config: AnomalyConfig, options: DetectionOptions) -> str:
    """The requested detector, or the model's default; UsageError for one that the model does not have."""
    detectors, method = config.detectors, options.method
    if method is not None and method not in detectors:
        raise UsageError(f"{saved.path}: --method {method}: this model has {', '.join(detectors)}")
    method = method or detectors[0]
    if options.latent_quantile is not None and method != "latent-healing":
        raise UsageError(f"--latent-quantile is for latent-healing, not {method}")
    return method


def _notes(config: AnomalyConfig, after: PostprocessingSection, options: DetectionOptions) -> tuple[str, ...]:
    """A sentence for each chosen option that makes the calibration invalid."""
    # The smallest volume changes the mask, not the map that was calibrated.
    before = config.postprocessing
    changed = [name for name in ("median", "erosion") if getattr(after, name) != getattr(before, name)]
    if options.latent_quantile not in (None, config.latent_healing.quantile):
        changed.append("latent quantile")
    if not changed:
        return ()
    return (
        f"the model was calibrated with another {' and '.join(changed)}: healthy quantiles do not hold; run "
        "medseg calibrate-anomaly with the same options",
    )


def postprocessing(config: AnomalyConfig, options: DetectionOptions) -> PostprocessingSection:
    """The configuration's post-processing, changed by ``options``; UsageError for an impossible value."""
    values = {name: getattr(options, name) for name in PostprocessingSection.model_fields}
    changed = {name: value for name, value in values.items() if value is not None}
    try:
        return PostprocessingSection(**{**config.postprocessing.model_dump(), **changed})
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(
            f"--{first['loc'][0]} {first['input']}: {first['msg'].removeprefix('Value error, ')}"
        ) from error


def restore_anomaly(
    saved: SavedModel, device: torch.device | str = "cpu", compiled: bool = False
) -> tuple[AnomalyConfig, Generator, nn.Module | None]:
    """Restore configuration, generator and classifier from a model directory, the denoiser compiled if so.

    Raises:
        ModelError: A card or weights that do not describe an anomaly model of this version.
    """
    config = typed_config(saved, AnomalyConfig)
    with usable(saved, AnomalyConfig):
        generator = restore_generator(saved.part(GENERATOR), device, compiled)
        if config.classifier is None:
            return config, generator, None
        return config, generator, restore_classifier(saved.part(CLASSIFIER), device)[0]


# ---- the calibration in a model directory, which only these functions write and read ---------------------------------


def calibration_entry(calibration: Mapping[str, HealthyScores]) -> dict[str, dict[str, float]]:
    """The card's entry "calibration": the numbers of each detector."""
    return {
        method: {
            "quantile": scores.quantile,
            "threshold": scores.automatic,
            "rate": scores.rate,
            "patients": scores.patients,
            "scans": len(scores.scan_scores),
        }
        for method, scores in calibration.items()
    }


def calibration_weights(latents: HealthyLatents | None, calibration: Mapping[str, HealthyScores]) -> dict[str, Tensor]:
    """The calibration's tables, which are stored among the weights."""
    tables: dict[str, Tensor] = {}
    if latents is not None:
        tables |= {f"latents.{name}": getattr(latents, name) for name in _LATENTS}
    for method, scores in calibration.items():
        tables |= {f"scores.{method}.quantiles": scores.quantiles, f"scores.{method}.scans": scores.scan_scores}
    return tables


def without_calibration(saved: SavedModel) -> dict[str, Tensor]:
    """The weights without the tables of `calibration_weights`."""
    return {name: value for name, value in saved.weights.items() if not name.startswith(("latents.", "scores."))}


def stored_latents(saved: SavedModel) -> HealthyLatents | None:
    """A model's statistics of healthy KL maps; None without them."""
    tables = saved.weights_under("latents")
    return HealthyLatents(*(tables[name] for name in _LATENTS)) if tables else None


def stored_scores(saved: SavedModel, method: str) -> HealthyScores | None:
    """A model's calibration of the detector ``method``; None without one."""
    numbers: Mapping[str, Any] | None = saved.card.get("calibration", {}).get(method)
    if numbers is None:
        return None
    tables = saved.weights_under(f"scores.{method}")
    return HealthyScores(
        quantile=float(numbers["quantile"]),
        automatic=float(numbers["threshold"]),
        rate=float(numbers["rate"]),
        quantiles=tables["quantiles"],
        scan_scores=tables["scans"],
        patients=int(numbers["patients"]),
    )
