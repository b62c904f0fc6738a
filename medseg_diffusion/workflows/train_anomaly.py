"""Healthy scans in, anomaly model out: the whole of `medseg train-anomaly` as a function.

RUN/config.yaml     resolved configuration
RUN/split.json      which patient is on which side
RUN/generator/      the run of the generator; RUN/classifier/ that of a classifier, where there is one
RUN/model/          the anomaly model: generator, detectors' statistics, thresholds
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from medseg_diffusion import build
from medseg_diffusion.config.anomaly import AnomalyConfig
from medseg_diffusion.config.generator import GeneratorConfig, NoisyClassifierConfig
from medseg_diffusion.config.load import override_key, parse_config
from medseg_diffusion.data.healthy import (
    HealthyScan,
    HealthySource,
    find_healthy,
    healthy_slices,
    healthy_source,
    left_out,
    lesion_map,
    packed_healthy,
    refuse_lesions,
)
from medseg_diffusion.data.image_cache import PackedImages
from medseg_diffusion.device import autocast, choose_device, keep_freed_memory, tune
from medseg_diffusion.diffusion.noise import derive_seed
from medseg_diffusion.errors import InputError, UsageError
from medseg_diffusion.methods.healthy_scores import HealthyScores, fit_scores, kept_values, scan_score
from medseg_diffusion.methods.latent_healing import HealthyLatents, LatentHealing
from medseg_diffusion.models.anomaly import (
    CLASSIFIER,
    GENERATOR,
    OnGrid,
    make_detector,
    on_grid,
    postprocessing,
    restore_anomaly,
    scored,
)
from medseg_diffusion.models.generator import Generator, restore_classifier, restore_generator
from medseg_diffusion.models.store import SavedModel, home, load_model_files, save_model
from medseg_diffusion.reports.card import anomaly_card
from medseg_diffusion.training.run import keep_sides, require_startable, start_run, versions
from medseg_diffusion.training.trainer import Progress
from medseg_diffusion.volumes.io import read_volume

from .train_generator import train_generator

DETECTION = ("residual", "latent_healing", "partial_noise", "patched", "counterfactual", "postprocessing", "quantile")
"""What of a configuration the networks do not depend on."""
MOST_IMAGES = 2000
"""Healthy slices whose KL maps are kept for the statistics of latents: some hundred megabytes."""


@dataclass(frozen=True)
class TrainedAnomaly:
    """The model directory, and the calibration of each of its detectors."""

    model: Path
    calibration: dict[str, HealthyScores]


def train_anomaly(
    config: AnomalyConfig,
    healthy: Path,
    run: Path,
    *,
    exclude_labelled: int | None = None,
    unhealthy: Path | None = None,
    resume: bool = False,
    max_steps: int | None = None,
    time_limit_min: float | None = None,
    device: str = "auto",
    seed: int = 0,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_prepare: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> TrainedAnomaly:
    """Trains the generator of ``config`` on healthy scans and calibrates its detectors on held-out ones.

    Args:
        config: of method anomaly.
        healthy: a folder of scans, labelled (what is labelled are lesions) or not.
        run: the run directory, new unless ``resume``.
        exclude_labelled: slices closer than this to a labelled one are left out, of training and of calibration.
        unhealthy: scans with lesions, for detectors that were told what unhealthy is. Labelled scans give their
            labelled slices.
        resume: continue an interrupted run with the configuration that it was started with.
        max_steps: stop each network at this step; the learning rate follows training.max_steps.
        time_limit_min: stop training after so many minutes of this call; calibration comes on top.
        device: auto, cpu, cuda, cuda:N or mps.
        seed: of weights, order, times and noise.
        on_progress: called after every training step.
        on_prepare: called with (what is prepared, done, total).

    Raises:
        UsageError: the run exists and ``resume`` is off, ``unhealthy`` is not needed, or the time was too short.
        InputError: unusable scans, lesions in healthy ones, or ``unhealthy`` is missing.
    """
    if config.needs_unhealthy and unhealthy is None:
        raise InputError(
            healthy,
            "healthy scans alone",
            f"scans with lesions too, for {' and '.join(config.detectors)}",
            "name a folder of them with --unhealthy",
        )
    if unhealthy is not None and not config.needs_unhealthy:
        raise UsageError("--unhealthy: this configuration learns from healthy scans alone; leave it out")
    if exclude_labelled is not None and exclude_labelled < 1:
        raise UsageError("--exclude-labelled: at least 1, which leaves out the labelled slices alone")
    noted = {"exclude_labelled": exclude_labelled, "seed": seed}
    require_startable(run, config, noted, resume)
    section = config.generator.data
    source = healthy_source(healthy, exclude_labelled, unhealthy, (section.test_images, section.validation_images))
    images = packed_healthy(
        source,
        home() / "images",
        section.shape,
        section.channels,
        build.image_preprocessing(config.generator.preprocessing, section.shape),
        config.modality,
        lambda done, total: on_prepare("scans", done, total),
    )
    if not len(images.part("validation")):
        raise InputError(
            healthy, "no healthy slice on the validation side", "some", "raise generator.data.validation_images"
        )
    # Only now: what is refused above can be corrected and started again in the same folder.
    start_run(run, config, noted, resume)
    keep_sides(run / "split.json", source.sides, healthy, resume)
    deadline = None if time_limit_min is None else time.monotonic() + 60 * time_limit_min

    def trained(part: GeneratorConfig | NoisyClassifierConfig, folder: Path, task: str) -> SavedModel:
        left = None if deadline is None else (deadline - time.monotonic()) / 60
        if left is not None and left <= 0:
            raise UsageError(f"--time-limit: ended before the {folder.name}; go on with --resume")
        model = train_generator(
            part,
            images,
            folder,
            resume=resume and any(folder.rglob("config.yaml")),
            max_steps=max_steps,
            time_limit_min=left,
            device=device,
            seed=seed,
            on_progress=on_progress,
            on_prepare=on_prepare,
        )
        saved = load_model_files(model)
        if saved.card["task"] != task:
            raise UsageError(f"--time-limit: went into the autoencoder of {folder}; go on with --resume")
        return saved

    parts = {GENERATOR: trained(config.generator, run / "generator", "image")}
    if config.classifier is not None:
        parts[CLASSIFIER] = trained(config.classifier, run / "classifier", "image-classifier")
    chosen = choose_device(device)
    tune(chosen)
    generator = restore_generator(parts[GENERATOR], chosen)
    classifier = restore_classifier(parts[CLASSIFIER], chosen)[0] if CLASSIFIER in parts else None
    held_out = [scan for scan in source.scans if source.sides[scan.patient] == "validation"]
    latents, calibration = _calibrate(config, generator, classifier, held_out, exclude_labelled, chosen, on_prepare)
    card = _card(config, source, images, calibration, seed)
    weights: dict[str, Tensor] = {}
    for prefix, saved in parts.items():
        card[prefix.rstrip(".")] = saved.card
        weights |= {prefix + name: value for name, value in saved.weights.items()}
    save_model(run / "model", card, weights | _tables(latents, calibration), anomaly_card(card))
    return TrainedAnomaly(run / "model", calibration)


def _calibrate(
    config: AnomalyConfig,
    generator: Generator,
    classifier: nn.Module | None,
    scans: Sequence[HealthyScan],
    exclude_labelled: int | None,
    device: torch.device,
    on_prepare: Callable[[str, int, int], None],
) -> tuple[HealthyLatents | None, dict[str, HealthyScores]]:
    """Every detector's thresholds, and the statistics of healthy latents where one needs them."""
    latents = None
    if "latent-healing" in config.detectors:
        latents = _healthy_latents(config, generator, scans, exclude_labelled, device, on_prepare)
    detectors = {method: make_detector(config, generator, classifier, method, latents) for method in config.detectors}
    values: dict[str, dict[str, list[NDArray[np.float32]]]] = {method: {} for method in detectors}
    scan_scores: dict[str, list[float]] = {method: [] for method in detectors}
    for done, (scan, grid, healthy) in enumerate(_healthy_grids(config, scans, exclude_labelled), 1):
        if healthy is not None:
            where = _healthy_voxels(grid, healthy)
            for method, detector in detectors.items():
                result = scored(detector, config, grid, derive_seed(0, scan.name), device, only=healthy)
                inside = result.score[where].numpy()
                if inside.size:
                    values[method].setdefault(scan.patient, []).append(kept_values(inside))
                    scan_scores[method].append(scan_score(inside))
        on_prepare("calibration", done, len(scans))
    if not any(scan_scores.values()):
        raise _nothing_healthy(scans)
    return latents, {
        method: fit_scores([np.concatenate(own) for own in found.values()], scan_scores[method], config.quantile)
        for method, found in values.items()
    }


def _healthy_grids(
    config: AnomalyConfig, scans: Sequence[HealthyScan], exclude_labelled: int | None
) -> Iterator[tuple[HealthyScan, OnGrid, Tensor | None]]:
    """Every scan on the generator's grid, and which of its images (N,) are healthy; None where none is."""
    dims = len(config.generator.data.shape)
    for scan in scans:
        grid = on_grid(config, read_volume(scan.image))
        lesions = lesion_map(scan, grid.placement)
        if dims == 3:  # of a volume with any lesion nothing
            healthy = torch.tensor([lesions is None or not bool(lesions.any())])
        else:
            healthy = healthy_slices(lesions, grid.placement.shape[2], exclude_labelled)
        healthy &= grid.inside.flatten(1).any(1)
        yield scan, grid, healthy if bool(healthy.any()) else None


def _healthy_voxels(grid: OnGrid, healthy: Tensor) -> Tensor:
    """Foreground voxels of the healthy images, bool (I, J, K) on the scan's own grid."""
    slices = healthy.float().expand(1, *grid.placement.shape).contiguous()
    # Voxels between a healthy slice and one that was not scored hold a part of its zeros.
    return grid.native & (grid.placement.restore(slices)[0] > 1 - 1e-4)


def _healthy_latents(
    config: AnomalyConfig,
    generator: Generator,
    scans: Sequence[HealthyScan],
    exclude_labelled: int | None,
    device: torch.device,
    on_prepare: Callable[[str, int, int], None],
) -> HealthyLatents:
    """The statistics of KL maps of held-out healthy slices or volumes, at most `MOST_IMAGES`, as many of each scan."""
    detector = make_detector(config, generator, None, "latent-healing", None)
    assert isinstance(detector, LatentHealing)
    most = max(1, MOST_IMAGES // max(1, len(scans)))
    maps, inside = [], []
    for done, (scan, grid, healthy) in enumerate(_healthy_grids(config, scans, exclude_labelled), 1):
        chosen = torch.zeros(0, dtype=torch.int64) if healthy is None else healthy.nonzero().flatten()
        if len(chosen) > most:
            chosen = chosen[torch.linspace(0, len(chosen) - 1, most).round().long()]
        for k in chosen.split(16) if len(chosen) else ():
            seeds = [derive_seed(0, scan.name, "slice", i) for i in k.tolist()]
            with autocast(device, config.generator.training.precision):
                latent = detector.codec.encode(grid.images[k].to(device))
                maps.append(detector.divergence(latent, seeds).float().cpu())
            inside.append(grid.inside[k])
        on_prepare("divergence of healthy scans", done, len(scans))
    if not maps:
        raise _nothing_healthy(scans)
    return detector.fit(torch.cat(maps), torch.cat(inside))


def _nothing_healthy(scans: Sequence[HealthyScan]) -> InputError:
    return InputError(
        scans[0].image.parent if scans else None,
        "no healthy slice in the held-out scans",
        "at least one to calibrate on",
        "lower --exclude-labelled, or hold more scans out (generator.data.validation_images)",
    )


def _tables(latents: HealthyLatents | None, calibration: dict[str, HealthyScores]) -> dict[str, Tensor]:
    """What is stored among the weights (`medseg_diffusion.models.anomaly.stored_scores`)."""
    tables: dict[str, Tensor] = {}
    if latents is not None:
        tables |= {f"latents.{name}": getattr(latents, name) for name in ("mean", "std", "quantiles")}
    for method, found in calibration.items():
        tables |= {f"scores.{method}.quantiles": found.quantiles, f"scores.{method}.scans": found.scan_scores}
    return tables


def _numbers(calibration: dict[str, HealthyScores]) -> dict[str, dict[str, float]]:
    """What is stored in the card."""
    return {
        method: {
            "quantile": found.quantile,
            "threshold": found.automatic,
            "rate": found.rate,
            "patients": found.patients,
            "scans": len(found.scan_scores),
        }
        for method, found in calibration.items()
    }


def _card(
    config: AnomalyConfig,
    source: HealthySource,
    images: PackedImages,
    calibration: dict[str, HealthyScores],
    seed: int,
) -> dict[str, Any]:
    sides, missing = list(source.sides.values()), left_out(images)
    what = "slices" if len(config.generator.data.shape) == 2 else "volumes"
    return {
        "task": "anomaly",
        "method": config.detectors[0],
        "methods": list(config.detectors),
        "dims": len(config.generator.data.shape),
        "labels": {"0": "background", "1": "anomaly"},
        "channels": ["image"],
        "config": config.model_dump(mode="json"),
        "calibration": _numbers(calibration),
        "training": {
            "seed": seed,
            "data": {
                **{f"{side} patients": sides.count(side) for side in ("train", "validation", "test")},
                "exclude_labelled": source.exclude_labelled,
                **{f"{what} for {side}": len(images.part(side)) for side in ("train", "validation")},
                **{f"{what} left out of {side}": missing[side] for side in ("train", "validation")},
                "unhealthy scans": len(source.unhealthy),
            },
        },
        "metrics": {},
        "licence": "see the training data",
        "versions": versions(),
    }


def calibrate_anomaly(
    model: str | Path,
    healthy: Path,
    output: Path,
    *,
    exclude_labelled: int | None = None,
    quantile: float | None = None,
    latent_quantile: float | None = None,
    after: Mapping[str, float] | None = None,
    overrides: Sequence[str] = (),
    device: str = "auto",
    on_prepare: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> TrainedAnomaly:
    """Fits the thresholds of a trained model to other healthy scans, such as those of another scanner.

    The networks stay as they are; of latent healing the divergences of healthy latents are fitted again too. What is
    given of the quantiles and of the post-processing becomes the new model's default.

    Args:
        model: folder or installed name.
        healthy: a folder of scans that the model was not trained on, all of which are used.
        output: the new model directory.
        exclude_labelled: see `train_anomaly`.
        quantile: nominal share of healthy voxels below the threshold; None keeps the model's, as for the following.
        latent_quantile: of latent healing, the share of healthy latent positions that stay as they are.
        overrides: of the detectors' settings, such as "residual=bright" or "latent_healing.start=700".
        after: of the post-processing, by the names of `medseg_diffusion.config.anomaly.PostprocessingSection`.
        device: auto, cpu, cuda, cuda:N or mps.
        on_prepare: called with (what is done, done, total).

    Raises:
        ModelError: no usable model.
        InputError: unusable scans, or lesions in healthy ones.
        UsageError: an output that exists, or values out of range.
    """
    if output.exists():
        raise UsageError(f"{output}: exists; choose a new folder")
    saved = load_model_files(model)
    chosen = choose_device(device)
    tune(chosen)
    if chosen.type == "cpu":
        keep_freed_memory()
    config, generator, classifier = restore_anomaly(saved, chosen)
    content = config.model_dump(mode="json")
    content["postprocessing"] = postprocessing(config, after or {}).model_dump(mode="json")
    if quantile is not None:
        content["quantile"] = quantile
    if latent_quantile is not None:
        content["latent_healing"]["quantile"] = latent_quantile
    for override in overrides:
        if override.partition("=")[0].partition(".")[0] not in DETECTION:
            raise UsageError(f"--set {override}: calibration changes {', '.join(DETECTION)}; train again for the rest")
        override_key(content, override)
    config = cast(AnomalyConfig, parse_config(content, str(saved.path)))
    scans = find_healthy(healthy)
    for scan in scans:
        refuse_lesions(scan, exclude_labelled)
    latents, calibration = _calibrate(config, generator, classifier, scans, exclude_labelled, chosen, on_prepare)
    weights = {k: v for k, v in saved.weights.items() if not k.startswith(("latents.", "scores."))}
    card = {**saved.card, "config": config.model_dump(mode="json"), "calibration": _numbers(calibration)}
    left = {} if exclude_labelled is None else {"without slices closer to a labelled one than": exclude_labelled}
    card["calibrated_on"] = {"scans": len(scans), **left}
    save_model(output, card, weights | _tables(latents, calibration), anomaly_card(card))
    return TrainedAnomaly(output, calibration)
