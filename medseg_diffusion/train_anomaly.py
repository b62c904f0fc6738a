"""Healthy scans in, anomaly model out: the whole of `medseg train-anomaly` as a function.

RUN/config.yaml     resolved configuration
RUN/split.json      which patient is on which side
RUN/generator/      the run of the generator (`medseg_diffusion.train_generator`); RUN/classifier/ of a classifier
RUN/model/          the anomaly model: generator, detectors' statistics, thresholds
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import build
from .anomaly import CLASSIFIER, GENERATOR, make_detector, on_grid, restore_anomaly, scored
from .checkpoint import home, load_model_files, save_model
from .config import AnomalyConfig
from .data.healthy import (
    HealthyScan,
    HealthySource,
    find_healthy,
    healthy_slices,
    healthy_source,
    lesion_map,
    packed_healthy,
    refuse_lesions,
)
from .diffusion.noise import derive_seed
from .errors import InputError, UsageError
from .generator import Generator, restore_classifier, restore_generator
from .methods.healthy_scores import HealthyScores, fit_scores, scan_score
from .methods.latent_healing import HealthyLatents, LatentHealing
from .reports.card import anomaly_card
from .train_generator import train_generator
from .training.run import start_run, versions, write_json
from .training.runtime import choose_device, tune
from .training.trainer import Progress
from .volumes.io import read_volume
from .volumes.preprocessing import Placement
from .volumes.volume import Volume


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
        UsageError: the run exists and ``resume`` is off, ``unhealthy`` is missing or not needed.
        InputError: unusable scans, or lesions in healthy ones.
    """
    if config.needs_unhealthy and unhealthy is None:
        raise UsageError(f"{' and '.join(config.detectors)}: needs --unhealthy, a folder of scans with lesions")
    if unhealthy is not None and not config.needs_unhealthy:
        raise UsageError("--unhealthy: this configuration learns from healthy scans alone; leave it out")
    if exclude_labelled is not None and exclude_labelled < 1:
        raise UsageError("--exclude-labelled: at least 1, which leaves out the labelled slices alone")
    section = config.generator.data
    source = healthy_source(healthy, exclude_labelled, unhealthy, (section.test_images, section.validation_images))
    resolved = {**config.model_dump(mode="json"), "exclude_labelled": exclude_labelled, "seed": seed}
    start_run(run, resolved, resume)
    write_json(run / "split.json", source.sides)
    deadline = None if time_limit_min is None else time.monotonic() + 60 * time_limit_min
    images = packed_healthy(
        source,
        home() / "images",
        section.shape,
        section.channels,
        build.preprocessing(config.generator.preprocessing),
        lambda done, total: on_prepare("scans", done, total),
    )
    if not len(images.part("validation")):
        raise InputError(
            healthy, "no healthy slice on the validation side", "some", "raise generator.data.validation_images"
        )

    def trained(part: Any, folder: Path) -> Path:
        return train_generator(
            part,
            images,
            folder,
            resume=resume and folder.is_dir(),
            max_steps=max_steps,
            time_limit_min=None if deadline is None else max(0.0, (deadline - time.monotonic()) / 60),
            device=device,
            seed=seed,
            on_progress=on_progress,
            on_prepare=on_prepare,
        )

    parts = {GENERATOR: load_model_files(trained(config.generator, run / "generator"))}
    if config.classifier is not None:
        parts[CLASSIFIER] = load_model_files(trained(config.classifier, run / "classifier"))
    chosen = choose_device(device)
    tune(chosen)
    generator = restore_generator(parts[GENERATOR], chosen)
    classifier = restore_classifier(parts[CLASSIFIER], chosen)[0] if CLASSIFIER in parts else None
    held_out = [scan for scan in source.scans if source.sides[scan.patient] == "validation"]
    latents, calibration = _calibrate(config, generator, classifier, held_out, exclude_labelled, chosen, on_prepare)
    card = _card(config, source, calibration, seed, exclude_labelled)
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
    calibration = {}
    for method in config.detectors:
        detector = make_detector(config, generator, classifier, method, latents)
        found: dict[str, list[np.ndarray]] = {}
        scan_scores = []
        for done, scan in enumerate(scans, 1):
            volume = read_volume(scan.image)
            healthy = _healthy_part(scan, volume, exclude_labelled, config)
            if healthy is not None:
                result = scored(detector, config, volume, derive_seed(0, scan.name), device)
                inside = result.score[result.foreground & healthy].numpy()
                if inside.size:
                    found.setdefault(scan.patient, []).append(inside)
                    scan_scores.append(scan_score(inside))
            on_prepare(f"calibration of {method}", done, len(scans))
        if not found:
            raise InputError(
                scans[0].image.parent if scans else None,
                "no healthy slice in the held-out scans",
                "at least one to calibrate on",
                "lower --exclude-labelled, or hold more scans out (generator.data.validation_images)",
            )
        calibration[method] = fit_scores(
            [np.concatenate(parts) for parts in found.values()], scan_scores, config.quantile
        )
    return latents, calibration


def _healthy_part(
    scan: HealthyScan, volume: Volume, exclude_labelled: int | None, config: AnomalyConfig
) -> Tensor | None:
    """Where a scan is healthy on its own grid, bool (I, J, K); None where nothing of it is."""
    image, placement = build.preprocessing(config.generator.preprocessing).apply(volume)
    keep = _healthy_slices(scan, placement, exclude_labelled, len(config.generator.data.shape))
    if not keep.any():
        return None
    return placement.restore(keep.float().expand(1, *image.shape[1:]).contiguous())[0] > 0.5


def _healthy_slices(scan: HealthyScan, placement: Placement, exclude_labelled: int | None, dims: int) -> Tensor:
    """Bool (K,) on the model's grid; of a volume with any lesion none."""
    lesions = lesion_map(scan, placement)
    if dims == 3 and lesions is not None and bool(lesions.any()):
        return torch.zeros(placement.shape[2], dtype=torch.bool)
    return healthy_slices(lesions, placement.shape[2], exclude_labelled)


def _healthy_latents(
    config: AnomalyConfig,
    generator: Generator,
    scans: Sequence[HealthyScan],
    exclude_labelled: int | None,
    device: torch.device,
    on_prepare: Callable[[str, int, int], None],
) -> HealthyLatents:
    """The statistics of KL maps of held-out healthy slices or volumes."""
    detector = make_detector(config, generator, None, "latent-healing", None)
    assert isinstance(detector, LatentHealing)
    dims = len(config.generator.data.shape)
    maps, inside = [], []
    for done, scan in enumerate(scans, 1):
        grid = on_grid(config, read_volume(scan.image))
        keep = _healthy_slices(scan, grid.placement, exclude_labelled, dims)
        keep = keep[:1] if dims == 3 else keep
        keep &= grid.inside.flatten(1).any(1)
        for k in keep.nonzero().flatten().split(16):
            seeds = [derive_seed(0, scan.name, "slice", i) for i in k.tolist()]
            maps.append(detector.divergence(grid.images[k].to(device), seeds).float().cpu())
            inside.append(grid.inside[k])
        on_prepare("divergence of healthy scans", done, len(scans))
    if not maps:
        raise InputError(
            scans[0].image.parent if scans else None,
            "no healthy slice in the held-out scans",
            "at least one to calibrate on",
            "lower --exclude-labelled, or hold more scans out (generator.data.validation_images)",
        )
    return detector.fit(torch.cat(maps), torch.cat(inside))


def _tables(latents: HealthyLatents | None, calibration: dict[str, HealthyScores]) -> dict[str, Tensor]:
    """What is stored among the weights (`medseg_diffusion.anomaly.stored_scores`)."""
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
    calibration: dict[str, HealthyScores],
    seed: int,
    exclude_labelled: int | None,
) -> dict[str, Any]:
    sides = list(source.sides.values())
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
                "exclude_labelled": exclude_labelled,
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
    device: str = "auto",
    on_prepare: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> TrainedAnomaly:
    """Fits the thresholds of a trained model to other healthy scans, such as those of another scanner.

    The networks stay as they are; of latent healing the divergences of healthy latents are fitted again too.

    Args:
        model: folder or installed name.
        healthy: a folder of scans that the model was not trained on, all of which are used.
        output: the new model directory.
        exclude_labelled: see `train_anomaly`.
        quantile: nominal share of healthy voxels below the threshold; None keeps the model's.
        device: auto, cpu, cuda, cuda:N or mps.
        on_prepare: called with (what is done, done, total).

    Raises:
        ModelError: no usable model.
        InputError: unusable scans, or lesions in healthy ones.
        UsageError: an output that exists.
    """
    if output.exists():
        raise UsageError(f"{output}: exists; choose a new folder")
    saved = load_model_files(model)
    chosen = choose_device(device)
    tune(chosen)
    config, generator, classifier = restore_anomaly(saved, chosen)
    config = config.model_copy(update={"quantile": quantile or config.quantile})
    scans = find_healthy(healthy)
    refuse_lesions(scans, exclude_labelled, build.preprocessing(config.generator.preprocessing))
    latents, calibration = _calibrate(config, generator, classifier, scans, exclude_labelled, chosen, on_prepare)
    weights = {k: v for k, v in saved.weights.items() if not k.startswith(("latents.", "scores."))}
    card = {**saved.card, "config": config.model_dump(mode="json"), "calibration": _numbers(calibration)}
    card["training"] = {**card["training"], "calibrated_on": f"{len(scans)} scans of {healthy.name}"}
    save_model(output, card, weights | _tables(latents, calibration), anomaly_card(card))
    return TrainedAnomaly(output, calibration)
