"""`medseg train-generator`: train a generator, an upsampler, an autoencoder or a noisy classifier on images.

RUN/config.yaml     resolved configuration
RUN/log.csv         one row per validation; RUN/steps.csv has every step
RUN/samples/        pictures of samples, or of images beside their reconstructions
RUN/checkpoints/    step-000123.pt: the state to resume the run bit-exactly
RUN/model/          the loadable model
RUN/autoencoder/    the run of the first stage, if a latent generator trains its own autoencoder
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from medseg_diffusion import build
from medseg_diffusion.config.generator import GeneratorConfig, ImageAutoencoderConfig, NoisyClassifierConfig
from medseg_diffusion.config.load import ImageConfig, Overrides, load_image_config
from medseg_diffusion.data.draws import Examples
from medseg_diffusion.data.file_lists import Data, folder_or_files
from medseg_diffusion.data.image_cache import ImageExamples, PackedImages
from medseg_diffusion.data.latent_cache import LatentExamples, cached_latents
from medseg_diffusion.diffusion.noise import derive_seed
from medseg_diffusion.errors import UsageError
from medseg_diffusion.methods.patched import Patched
from medseg_diffusion.models.generator import Generator, restore_autoencoder
from medseg_diffusion.models.store import SavedModel, load_model_files, parts_of_weights
from medseg_diffusion.networks.autoencoder import KLAutoencoder, VQAutoencoder
from medseg_diffusion.tasks.classifier import NoisyClassification
from medseg_diffusion.tasks.image import ImageDiffusion, reduced
from medseg_diffusion.tasks.patched import PatchedDiffusion
from medseg_diffusion.training.health import Predictions
from medseg_diffusion.training.job import Job, arranged
from medseg_diffusion.training.lock import holding_runs
from medseg_diffusion.training.progress import OnProgress, silent
from medseg_diffusion.training.runtime import Runtime
from medseg_diffusion.training.trainer import Callbacks, Outcome, Progress

from .autoencoder_stage import autoencoder_of, latent_channels, require_same_images, train_autoencoder
from .image_stage import (
    ImageSourceOptions,
    image_card,
    mean_loss,
    prepare_images,
    validation_batches,
    write_pictures,
)

Stage = Literal["all", "autoencoder"]

PICTURES = 16


# many: one keyword for each option of the command
@holding_runs()
def train_generator(
    config: ImageConfig | str | Path,
    data: Data | PackedImages,
    run: str | Path,
    *,
    overrides: Overrides = MappingProxyType({}),
    autoencoder: str | Path | None = None,
    stage: Stage = "all",
    resume: bool = False,
    max_steps: int | None = None,
    time_limit_min: float | None = None,
    device: str = "auto",
    seed: int = 0,
    skip_broken: bool = False,
    download: bool = False,
    on_progress: OnProgress = silent,
    on_step: Callable[[Progress], None] = lambda progress: None,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
) -> Path:
    """Train the model of ``config`` on the images of ``data`` and return the model directory.

    Args:
        config: Name of a preset (`presets`), YAML file, or a configuration of a generator, autoencoder or noisy
            classifier.
        data: A folder or zip of images, a folder of scans (`medseg_diffusion.data.images`), or a list whose entries are
            files, or mappings with "image" and, if known, "patient", "class" and "name". All files of a list are
            images, or all are scans. A generator of masks takes what segmenters take (`train_segmenter`).
        run: The run directory, new unless ``resume``.
        overrides: Values for single keys of the configuration, such as {"training.max_steps": 100}.
        autoencoder: Trained autoencoder (folder or installed name) for a latent generator or upsampler. Without it, the
            autoencoder of the configuration is trained first.
        stage: "autoencoder" stops after the first stage of a latent generator.
        resume: Continue an interrupted run with the same configuration.
        max_steps: Stop at this step; the learning rate still follows training.max_steps. The autoencoder of a latent
            generator is shortened only with ``stage`` "autoencoder".
        time_limit_min: Stop this many minutes after the start of the call, the preparation of the images included.
        device: auto, cpu, cuda, cuda:N or mps.
        seed: Seed of weights, order, times and noise.
        skip_broken: Leave broken files out instead of stopping.
        download: Download the weights of LPIPS if they are missing; nothing is downloaded otherwise.
        on_progress: Called with a text and the share done, 0 to 1, in the preparation and after every step.
        on_step: Called with the numbers of every step.
        on_outcome: Called at the end of every training of the run.

    Raises:
        UsageError: A configuration that is unknown or of another kind, a run that exists while ``resume`` is off, or
            options that do not fit the configuration.
        InputError: Unusable data or resume file.
        ModelError: No usable autoencoder, or the configuration demands LPIPS, whose weights are missing.
    """
    config, run = load_image_config(config, overrides), Path(run)
    latent = isinstance(config, GeneratorConfig) and config.autoencoder is not None
    if not latent and (autoencoder is not None or stage != "all"):
        raise UsageError("--autoencoder and --stage are for configurations that name an autoencoder; this one has none")
    job = Job(run, resume, max_steps, time_limit_min, device, seed, on_progress, on_step, on_outcome)
    images = data if isinstance(data, PackedImages) else folder_or_files(data)
    masks = config.data if isinstance(config, GeneratorConfig) and config.condition.mask else None
    source = ImageSourceOptions(images, skip_broken, download, masks)
    if isinstance(config, ImageAutoencoderConfig):
        return train_autoencoder(config, source, job)
    if isinstance(config, NoisyClassifierConfig):
        return _train_classifier(config, source, job)
    if latent and autoencoder is None:
        # The second stage is bound to the weights of the first, which a later call would train further.
        first = job if stage == "autoencoder" else replace(job, max_steps=None)
        autoencoder = _train_first_stage(config, source, first)
        out_of_time = Runtime(job.device, config.training.precision).any(job.minutes_left == 0)
        if stage == "autoencoder" or out_of_time:
            return autoencoder
        # In an interrupted run, the second stage may not have started.
        job = replace(job, resume=resume and job.started)
    return _train_diffusion(config, autoencoder, source, job)


def _train_first_stage(config: GeneratorConfig, source: ImageSourceOptions, job: Job) -> Path:
    first = job.stage(job.run / "autoencoder")
    if job.resume and not first.started:
        if job.started:
            raise UsageError(f"{job.run}: was started with --autoencoder; give the same one to --resume")
        job.require_startable(config)  # says that the folder holds no run
    return train_autoencoder(autoencoder_of(config), source, first)


@dataclass(frozen=True, eq=False)
class _FirstStage:
    """The trained autoencoder of a latent generator."""

    saved: SavedModel
    codec: KLAutoencoder | VQAutoencoder
    config: ImageAutoencoderConfig

    @property
    def entries(self) -> dict[str, Any]:
        """The entries about the autoencoder in the generator's card."""
        return {
            "autoencoder": self.config.model_dump(mode="json"),
            "autoencoder_sha256": self.saved.sha256,
            "loss_extractors": self.saved.card["loss_extractors"],
        }


def _first_stage(autoencoder: str | Path, config: GeneratorConfig) -> _FirstStage:
    saved = load_model_files(autoencoder)
    codec, stage = restore_autoencoder(saved)
    require_same_images(saved, stage, config)
    return _FirstStage(saved, codec, stage)


def _train_diffusion(
    config: GeneratorConfig, autoencoder: str | Path | None, source: ImageSourceOptions, job: Job
) -> Path:
    first = None if autoencoder is None else _first_stage(autoencoder, config)
    codec = None if first is None else first.codec
    channels = latent_channels(codec)
    runtime = Runtime(job.device, config.training.precision, config.training.sharding)
    notes = {} if first is None else {"autoencoder_sha256": first.saved.sha256}
    images = prepare_images(config, source, job, runtime, lambda packed: _untrained(config, packed, channels), notes)
    examples, held_out, shape = _examples(config, images, first, job, runtime)
    job.seed_weights()
    model = _untrained(config, images, channels)
    arranged(model.network, config.training)
    batches = validation_batches(held_out, config.training.batch_size)
    with_classes = isinstance(model, ImageDiffusion) and model.num_classes > 0

    def validate(averaged: nn.Module) -> dict[str, float]:
        loss = mean_loss(averaged, batches, runtime, job.on_prepare)
        generator = Generator(cast(ImageDiffusion | PatchedDiffusion, averaged), config, shape, codec)
        job.on_prepare("pictures", 0, 1)
        with runtime.accelerator.autocast():
            pictures = _pictures(generator, images)
        write_pictures(pictures, job.run)
        predictions = Predictions()
        for picture in pictures:
            predictions.add(picture)
        return {"score": -loss, "loss": loss, **predictions.numbers()}

    def save(averaged: nn.Module, step: int, numbers: Mapping[str, float]) -> None:
        card = image_card(config, images, job, step, numbers) | ({} if first is None else first.entries)
        card |= {"shape": list(shape), "classes": list(images.classes) if with_classes else []}
        weights = averaged.state_dict()
        if codec is not None:
            weights |= parts_of_weights({"codec": codec.state_dict()})
        job.save(card, weights)

    job.fit(model, examples, config.training, Callbacks(validate, save, job.step_done), runtime)
    return job.model


def _untrained(
    config: GeneratorConfig, images: PackedImages, latent_channels: int | None
) -> ImageDiffusion | PatchedDiffusion:
    return build.generator(config, len(images.classes), latent_channels, len(images.mask_classes))


def _examples(
    config: GeneratorConfig, images: PackedImages, first: _FirstStage | None, job: Job, runtime: Runtime
) -> tuple[Examples, Examples, tuple[int, ...]]:
    """Training and validation examples of pixels or latents, and their shape (C, *S)."""
    validation = images.part("validation")
    if first is None:
        shape = (config.data.channels, *config.data.shape)
        return ImageExamples(images, images.epoch, config.data.flip), ImageExamples(images, validation, False), shape
    codec = first.codec.to(runtime.device)

    def on_image(done: int, total: int) -> None:
        job.on_prepare("latents", done, total)

    with runtime.main_first():
        latents = cached_latents(images, codec, first.saved.sha256, runtime.device, on_image)
    low = partial(reduced, factor=config.factor) if config.method == "upsampler" else None
    training = LatentExamples(latents, images, images.epoch, config.data.flip, low)
    return training, LatentExamples(latents, images, validation, False, low), latents.shape[2:]


def _train_classifier(config: NoisyClassifierConfig, source: ImageSourceOptions, job: Job) -> Path:
    runtime = Runtime(job.device, config.training.precision, config.training.sharding)
    images = prepare_images(
        config, source, job, runtime, lambda packed: build.noisy_classifier(config, len(packed.classes))
    )
    job.seed_weights()
    model = build.noisy_classifier(config, len(images.classes))
    arranged(model.network, config.training)
    examples = ImageExamples(images, _labelled(images, "train"), config.data.flip)
    held_out = ImageExamples(images, _labelled(images, "validation"), flip=False)
    batches = validation_batches(held_out, config.training.batch_size)

    def validate(averaged: nn.Module) -> dict[str, float]:
        loss = mean_loss(averaged, batches, runtime, job.on_prepare)
        return {"score": -loss, "loss": loss}

    def save(averaged: nn.Module, step: int, numbers: Mapping[str, float]) -> None:
        card = {**image_card(config, images, job, step, numbers), "classes": list(images.classes)}
        job.save(card, cast(NoisyClassification, averaged).network.state_dict())

    job.fit(model, examples, config.training, Callbacks(validate, save, job.step_done), runtime)
    return job.model


def _labelled(images: PackedImages, part: Literal["train", "validation"]) -> npt.NDArray[np.int64]:
    positions = images.part(part)
    return positions[images.labels[positions] >= 0]


def _pictures(generator: Generator, images: PackedImages) -> Tensor:
    """Samples, with the same noise, classes, masks and low-resolution images at every validation.

    For a patched model, validation images beside their restored versions.
    """
    task, device = generator.task, generator.device
    if isinstance(task, PatchedDiffusion):
        real = _real(images).to(device)
        half = (task.denoiser.schedule.num_steps + 1) // 2
        restored = Patched(task.denoiser, task.noise, real.shape[2:], half).healthy(real, range(len(real)))
        return torch.stack([real, restored], dim=1).flatten(0, 1).cpu()
    label, low, mask = torch.arange(PICTURES) % max(1, task.num_classes), None, None
    if task.mask_classes:
        assert images.masks is not None
        mask = torch.from_numpy(images.masks[_with_most_classes(images)]).to(device)
        label = label[: len(mask)]
    if task.factor is not None:
        low = reduced(_real(images), task.factor).to(device)
        label = torch.from_numpy(images.labels[images.part("validation")[:PICTURES]]).long()
        label = torch.where(label < 0, task.num_classes, label)
    seeds = [derive_seed("picture", i) for i in range(len(label))]
    classes = label.to(device) if task.num_classes else None
    return generator.sample(seeds, "ddim", 20, classes, low, mask=mask).cpu()


def _with_most_classes(images: PackedImages) -> npt.NDArray[np.int64]:
    """Positions of the validation masks that are shown: those with the most classes, of equal ones the first."""
    assert images.masks is not None
    positions = images.part("validation")
    counts = [-len(np.unique(images.masks[position])) for position in positions]
    return positions[np.argsort(counts, kind="stable")[:PICTURES]]


def _real(images: PackedImages) -> Tensor:
    """The first validation images (n, C, *S)."""
    held_out = ImageExamples(images, images.part("validation")[:PICTURES], flip=False)
    return torch.stack([held_out.example(i, torch.Generator())["image"] for i in range(len(held_out))])
