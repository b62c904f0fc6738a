"""`medseg train-anomaly`: healthy scans in, anomaly model out.

RUN/config.yaml     resolved configuration
RUN/split.json      which patient is on which side
RUN/generator/      the run of the generator; RUN/classifier/ that of a classifier, where there is one
RUN/model/          the anomaly model: generator, detectors' statistics, thresholds
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from medseg_diffusion import build
from medseg_diffusion.config.anomaly import AnomalyConfig
from medseg_diffusion.config.generator import GeneratorConfig, NoisyClassifierConfig
from medseg_diffusion.data.healthy import HealthySource, healthy_source, left_out, packed_healthy
from medseg_diffusion.data.image_cache import PackedImages
from medseg_diffusion.device import choose_device, tune
from medseg_diffusion.errors import InputError, UsageError
from medseg_diffusion.methods.healthy_scores import HealthyScores
from medseg_diffusion.models.anomaly import CLASSIFIER, GENERATOR, calibration_entry, calibration_weights
from medseg_diffusion.models.card import common_entries
from medseg_diffusion.models.generator import restore_classifier, restore_generator
from medseg_diffusion.models.store import SavedModel, home, load_model_files, parts_of_weights
from medseg_diffusion.training.job import Job
from medseg_diffusion.training.trainer import Progress

from .anomaly_calibration import AnomalyCalibration, CalibratedAnomaly
from .train_generator import train_generator


# many: one keyword for each option of the command
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
) -> CalibratedAnomaly:
    """Trains the generator of ``config`` on healthy scans and calibrates its detectors on held-out ones.

    Args:
        config: of method anomaly.
        healthy: a folder of scans, labelled (what is labelled are lesions) or not.
        run: the run directory, new unless ``resume``.
        exclude_labelled: slices closer than this to a labelled one are left out, of training and of calibration.
        unhealthy: scans with lesions, for detectors that learn what unhealthy images are. Labelled scans give their
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
    _require_fitting(config, healthy, unhealthy, exclude_labelled)
    job = Job(run, resume, max_steps, time_limit_min, device, seed, on_progress, on_prepare)
    noted = {"exclude_labelled": exclude_labelled}
    job.require_startable(config, noted)
    section = config.generator.data
    source = healthy_source(healthy, exclude_labelled, unhealthy, (section.test_images, section.validation_images))
    images = _packed(config, source, healthy, job)
    job.start(config, noted, source.splits, healthy)
    job = job.clock_started()
    parts = {GENERATOR: _train_part(config.generator, images, GENERATOR, "image", job)}
    if config.classifier is not None:
        parts[CLASSIFIER] = _train_part(config.classifier, images, CLASSIFIER, "image-classifier", job)
    chosen = choose_device(device)
    tune(chosen)
    generator = restore_generator(parts[GENERATOR], chosen)
    classifier = restore_classifier(parts[CLASSIFIER], chosen)[0] if CLASSIFIER in parts else None
    held_out = [scan for scan in source.scans if source.splits[scan.patient] == "validation"]
    fit = AnomalyCalibration(config, generator, classifier, held_out, exclude_labelled, on_prepare)
    latents, calibration = fit.fit()
    card = _card(config, source, images, calibration, seed)
    card |= {name: saved.card for name, saved in parts.items()}
    weights = parts_of_weights({name: saved.weights for name, saved in parts.items()})
    job.save(card, weights | calibration_weights(latents, calibration))
    return CalibratedAnomaly(job.model, calibration)


def _require_fitting(
    config: AnomalyConfig, healthy: Path, unhealthy: Path | None, exclude_labelled: int | None
) -> None:
    """Refuses options that do not fit the configuration."""
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


def _packed(config: AnomalyConfig, source: HealthySource, healthy: Path, job: Job) -> PackedImages:
    section = config.generator.data
    images = packed_healthy(
        source,
        home() / "images",
        section.shape,
        section.channels,
        build.image_preprocessing(config.generator.preprocessing, section.shape),
        config.modality,
        lambda done, total: job.on_prepare("scans", done, total),
    )
    if not len(images.part("validation")):
        raise InputError(
            healthy, "no healthy slice on the validation side", "some", "raise generator.data.validation_images"
        )
    return images


def _train_part(
    config: GeneratorConfig | NoisyClassifierConfig, images: PackedImages, name: str, task: str, job: Job
) -> SavedModel:
    """Trains a network of the model in a folder of its own.

    Raises:
        UsageError: the time limit left no time for it.
    """
    folder, left = job.run / name, job.minutes_left
    if left == 0:
        raise UsageError(f"--time-limit: ended before the {name}; go on with --resume")
    model = train_generator(
        config,
        images,
        folder,
        resume=job.resume and any(folder.rglob("config.yaml")),
        max_steps=job.max_steps,
        time_limit_min=left,
        device=job.device,
        seed=job.seed,
        on_progress=job.on_progress,
        on_prepare=job.on_prepare,
    )
    saved = load_model_files(model)
    if saved.card["task"] != task:
        raise UsageError(f"--time-limit: went into the autoencoder of {folder}; go on with --resume")
    return saved


def _card(
    config: AnomalyConfig,
    source: HealthySource,
    images: PackedImages,
    calibration: Mapping[str, HealthyScores],
    seed: int,
) -> dict[str, Any]:
    sides, missing = list(source.splits.values()), left_out(images)
    dims = len(config.generator.data.shape)
    what = "slices" if dims == 2 else "volumes"
    data = {
        **{f"{side} patients": sides.count(side) for side in ("train", "validation", "test")},
        "exclude_labelled": source.exclude_labelled,
        **{f"{what} for {side}": len(images.part(side)) for side in ("train", "validation")},
        **{f"{what} left out of {side}": missing[side] for side in ("train", "validation")},
        "unhealthy scans": len(source.unhealthy),
    }
    card = common_entries(
        config,
        task="anomaly",
        method=config.detectors[0],
        dims=dims,
        channels=["image"],
        labels={0: "background", 1: "anomaly"},
        training={"seed": seed, "data": data},
        metrics={},
    )
    return card | {"methods": list(config.detectors), "calibration": calibration_entry(calibration)}
