"""`medseg train-anomaly`: train an anomaly model on healthy scans.

RUN/config.yaml     resolved configuration
RUN/split.json      which patient is on which side
RUN/generator/      the run of the generator; RUN/classifier/ that of the classifier, if there is one
RUN/model/          the anomaly model: generator, detectors' statistics, thresholds
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from medseg_diffusion import build
from medseg_diffusion.config.anomaly import AnomalyConfig
from medseg_diffusion.config.generator import GeneratorConfig, NoisyClassifierConfig
from medseg_diffusion.config.load import Overrides, load_anomaly_config
from medseg_diffusion.data.file_lists import Data, FileList, folder_or_files
from medseg_diffusion.data.healthy import (
    TRAINED_ON,
    HealthySource,
    healthy_source,
    left_out,
    names_of,
    packed_healthy,
)
from medseg_diffusion.data.image_cache import PackedImages
from medseg_diffusion.errors import InputError, UsageError
from medseg_diffusion.methods.healthy_scores import HealthyScores
from medseg_diffusion.models.anomaly import CLASSIFIER, GENERATOR, calibration_entry, calibration_weights
from medseg_diffusion.models.card import common_entries
from medseg_diffusion.models.generator import restore_classifier, restore_generator
from medseg_diffusion.models.store import SavedModel, home, load_model_files, parts_of_weights
from medseg_diffusion.training.job import Job
from medseg_diffusion.training.lock import holding_runs
from medseg_diffusion.training.progress import OnProgress, silent
from medseg_diffusion.training.runtime import Runtime
from medseg_diffusion.training.trainer import Outcome, Progress, require_trainable

from .anomaly_calibration import AnomalyCalibration, CalibratedAnomaly
from .autoencoder_stage import autoencoder_of
from .train_generator import train_generator
from .training_scans import seen_entry, seen_in_healthy


# many: one keyword for each option of the command
@holding_runs()
def train_anomaly(
    config: AnomalyConfig | str | Path,
    healthy: Data,
    run: str | Path,
    *,
    overrides: Overrides = MappingProxyType({}),
    exclude_labelled: int | None = None,
    unhealthy: Data | None = None,
    resume: bool = False,
    max_steps: int | None = None,
    time_limit_min: float | None = None,
    device: str = "auto",
    seed: int = 0,
    on_progress: OnProgress = silent,
    on_step: Callable[[Progress], None] = lambda progress: None,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
) -> CalibratedAnomaly:
    """Train the generator of ``config`` on healthy scans and calibrate its detectors on held-out ones.

    Of several processes, the main one alone calibrates and returns the calibration.

    Args:
        config: Name of a preset (`presets`), YAML file, or a configuration of method anomaly.
        healthy: Folder of scans, with or without labels; labels mark lesions. Or a list whose entries are scans, pairs
            (image, label), or mappings with "image" and, if known, "label", "patient" and "name".
        run: The run directory, new unless ``resume``.
        overrides: Values for single keys of the configuration, such as {"training.max_steps": 100}.
        exclude_labelled: Slices closer than this to a labelled one are left out of training and calibration.
        unhealthy: Scans with lesions, as ``healthy``, for detectors that also learn from unhealthy images. Only
            the labelled slices of labelled scans are used.
        resume: Continue an interrupted run with the same configuration.
        max_steps: Stop generator and classifier at this step; the learning rate still follows training.max_steps. The
            autoencoder of a latent generator is not shortened.
        time_limit_min: Stop training this many minutes after the data are prepared; calibration takes further time.
        device: auto, cpu, cuda, cuda:N or mps.
        seed: Seed of weights, order, times and noise.
        on_progress: Called with a text and the share done, 0 to 1, in the preparation and after every step.
        on_step: Called with the numbers of every training step.
        on_outcome: Called at the end of every training of the run.

    Raises:
        UsageError: A configuration that is unknown or of another kind, a run that exists while ``resume`` is off,
            ``unhealthy`` is not needed, or the time was too short.
        InputError: Unusable scans, lesions in healthy ones, or ``unhealthy`` is missing.
    """
    config, run, scans = load_anomaly_config(config, overrides), Path(run), folder_or_files(healthy)
    others = None if unhealthy is None else folder_or_files(unhealthy)
    _require_fitting(config, scans, others, exclude_labelled)
    job = Job(run, resume, max_steps, time_limit_min, device, seed, on_progress, on_step, on_outcome)
    notes = {"exclude_labelled": exclude_labelled}
    job.require_startable(config, notes)
    runtime = Runtime(device, config.generator.training.precision)
    section = config.generator.data
    source = healthy_source(scans, exclude_labelled, others, (section.test_images, section.validation_images))
    with runtime.main_first():
        images = _packed(config, source, scans, job)
    if runtime.is_main:
        _require_networks(config, images, runtime)
        job.start(config, notes, source.splits, str(scans))
    job = job.clock_started()
    parts = {GENERATOR: _train_part(config.generator, images, GENERATOR, "image", job, runtime)}
    if config.classifier is not None:
        parts[CLASSIFIER] = _train_part(config.classifier, images, CLASSIFIER, "image-classifier", job, runtime)
    calibration: dict[str, HealthyScores] = {}
    if runtime.is_main:
        generator = restore_generator(parts[GENERATOR], runtime.device)
        classifier = restore_classifier(parts[CLASSIFIER], runtime.device)[0] if CLASSIFIER in parts else None
        held_out = [scan for scan in source.scans if source.splits[scan.patient] == "validation"]
        fit = AnomalyCalibration(config, generator, classifier, held_out, exclude_labelled, job.on_prepare)
        latents, calibration = fit.fit()
        card = _card(config, source, images, calibration, seed)
        trained = [scan for scan in source.scans if source.splits[scan.patient] == "train"]
        measuring = "what training has seen"
        card |= seen_entry(seen_in_healthy(trained, config, lambda done, all: job.on_prepare(measuring, done, all)))
        card |= {name: saved.card for name, saved in parts.items()}
        weights = parts_of_weights({name: saved.weights for name, saved in parts.items()})
        job.save(card, weights | calibration_weights(latents, calibration))
    runtime.wait()
    return CalibratedAnomaly(job.model, calibration)


def _require_fitting(
    config: AnomalyConfig, healthy: Path | FileList, unhealthy: Path | FileList | None, exclude_labelled: int | None
) -> None:
    """Raise an error for options that do not fit the configuration."""
    if config.needs_unhealthy and unhealthy is None:
        raise InputError(
            str(healthy),
            "only healthy scans",
            f"scans with lesions too, for {' and '.join(config.detectors)}",
            "name a folder of them with --unhealthy",
        )
    if unhealthy is not None and not config.needs_unhealthy:
        raise UsageError("--unhealthy: this configuration uses only healthy scans; leave the option out")
    if exclude_labelled is not None and exclude_labelled < 1:
        raise UsageError("--exclude-labelled: expected 1 or more; 1 leaves out only the labelled slices")


def _require_networks(config: AnomalyConfig, images: PackedImages, runtime: Runtime) -> None:
    """Raise an error if generator or classifier cannot be built or trained."""
    generator, classifier = config.generator, config.classifier
    channels = None if generator.autoencoder is None else autoencoder_of(generator).network.latent_channels
    with torch.device("meta"):
        network = build.generator(generator, len(images.classes), channels)
        require_trainable(network, generator.training.batch_size, runtime)
        if classifier is not None:
            other = build.noisy_classifier(classifier, len(images.classes))
            require_trainable(other, classifier.training.batch_size, runtime)


def _packed(config: AnomalyConfig, source: HealthySource, healthy: Path | FileList, job: Job) -> PackedImages:
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
            str(healthy), "no healthy slice on the validation side", "some", "raise generator.data.validation_images"
        )
    return images


def _train_part(
    config: GeneratorConfig | NoisyClassifierConfig,
    images: PackedImages,
    name: str,
    task: str,
    job: Job,
    runtime: Runtime,
) -> SavedModel:
    """Train one network of the model in its own run folder.

    Raises:
        UsageError: The time limit left no time for it.
    """
    folder, left = job.run / name, job.minutes_left
    if runtime.any(left == 0):
        raise UsageError(f"--time-limit: ended before the training of the {name}; continue with --resume")
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
        on_step=job.on_step,
        on_outcome=job.on_outcome,
    )
    saved = load_model_files(model)
    if saved.card["task"] != task:
        raise UsageError(f"--time-limit: ended in the training of the autoencoder in {folder}; continue with --resume")
    return saved


def _card(
    config: AnomalyConfig,
    source: HealthySource,
    images: PackedImages,
    calibration: Mapping[str, HealthyScores],
    seed: int,
) -> dict[str, Any]:
    sides, missing = list(source.splits.values()), left_out(images)
    scans = (*source.scans, *source.unhealthy)
    trained = [scan for scan in scans if source.splits.get(scan.patient, "train") == "train"]
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
        training={"seed": seed, "data": data, TRAINED_ON: names_of(trained)},
        metrics={},
    )
    return card | {"methods": list(config.detectors), "calibration": calibration_entry(calibration)}
