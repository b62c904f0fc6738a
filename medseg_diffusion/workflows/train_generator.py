"""Configuration and images in, run directory out: the whole of `medseg train-generator` as a function.

RUN/config.yaml     resolved configuration
RUN/log.csv         one row per validation; RUN/tensorboard every step
RUN/samples/        pictures: samples, or images beside their reconstructions
RUN/checkpoints/    last.pt: everything to resume bit-exactly
RUN/model/          the loadable model
RUN/autoencoder/    the run of the first stage, where a latent generator trains its own
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure

from medseg_diffusion import build
from medseg_diffusion.config.generator import GeneratorConfig, ImageAutoencoderConfig, NoisyClassifierConfig
from medseg_diffusion.config.load import load_config, parse_config
from medseg_diffusion.data.draws import Draws, Examples
from medseg_diffusion.data.image_cache import ImageExamples, PackedImages, packed
from medseg_diffusion.data.latent_cache import LatentExamples, cached_latents
from medseg_diffusion.device import arranged
from medseg_diffusion.diffusion.noise import derive_seed
from medseg_diffusion.errors import InputError, ModelError, UsageError
from medseg_diffusion.methods.patched import Patched
from medseg_diffusion.models.generator import Generator, restore_autoencoder
from medseg_diffusion.models.store import SavedModel, home, load_model_files, save_model
from medseg_diffusion.networks.autoencoder import KLAutoencoder, VQAutoencoder
from medseg_diffusion.reports.card import generator_card
from medseg_diffusion.reports.pictures import as_pictures, grid, write_png
from medseg_diffusion.tasks.classifier import NoisyClassification
from medseg_diffusion.tasks.image import ImageDiffusion, reduced
from medseg_diffusion.tasks.patched import PatchedDiffusion
from medseg_diffusion.training.autoencoder import AutoencoderTraining, LossWeights, standardise
from medseg_diffusion.training.job import training_options
from medseg_diffusion.training.perceptual import perceptual_loss
from medseg_diffusion.training.run import keep_sides, require_startable, start_run, versions
from medseg_diffusion.training.runtime import Runtime
from medseg_diffusion.training.trainer import Callbacks, Progress, TrainingRun, fit

ImageConfig = GeneratorConfig | ImageAutoencoderConfig | NoisyClassifierConfig
Stage = Literal["all", "autoencoder"]

VALIDATION_IMAGES = 512
"""Images, always the same with the same noise, whose loss is logged and chooses the best weights."""
SCALE_BATCHES = 64
"""Batches over which mean and deviation of latents are estimated."""
PICTURES = 16


@dataclass(frozen=True)
class _Job:
    """What the stages share."""

    data: Path | PackedImages
    run: Path
    resume: bool
    max_steps: int | None
    deadline: float | None
    device: str
    seed: int
    skip_broken: bool
    download: bool
    on_progress: Callable[[Progress], None]
    on_prepare: Callable[[str, int, int], None]

    @property
    def minutes_left(self) -> float | None:
        return None if self.deadline is None else max(0.0, (self.deadline - time.monotonic()) / 60)


def train_generator(
    config: ImageConfig,
    data: Path | PackedImages,
    run: Path,
    *,
    autoencoder: str | Path | None = None,
    stage: Stage = "all",
    resume: bool = False,
    max_steps: int | None = None,
    time_limit_min: float | None = None,
    device: str = "auto",
    seed: int = 0,
    skip_broken: bool = False,
    download: bool = False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_prepare: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Path:
    """Trains what ``config`` describes on the images of ``data`` and returns the model directory.

    A latent generator needs an autoencoder: the one given, or else its configuration's own, trained first.

    Args:
        config: generator, autoencoder or noisy classifier.
        data: a folder or zip of images, or a folder of scans (`medseg_diffusion.data.images`), or what was packed
            of them already.
        run: the run directory, new unless ``resume``.
        autoencoder: a trained autoencoder (folder or installed name) for a latent generator or upsampler.
        stage: "autoencoder" stops after the first stage of a latent generator.
        resume: continue an interrupted run with the configuration that it was started with.
        max_steps: stop each stage at this step; the learning rate follows training.max_steps.
        time_limit_min: stop after so many minutes of this call.
        device: auto, cpu, cuda, cuda:N or mps.
        seed: of weights, order, times and noise.
        skip_broken: leave broken files out instead of stopping.
        download: fetch the weights of LPIPS if they are missing; nothing is downloaded otherwise.
        on_progress: called after every step.
        on_prepare: called with (what is prepared, done, total).

    Raises:
        UsageError: the run exists and ``resume`` is off, or options that do not fit the configuration.
        InputError: unusable data or resume file.
        ModelError: no usable autoencoder, or no weights for LPIPS where it is demanded.
    """
    latent = isinstance(config, GeneratorConfig) and config.autoencoder is not None
    if not latent and (autoencoder is not None or stage != "all"):
        raise UsageError("--autoencoder and --stage are for configurations that name an autoencoder; this one has none")
    deadline = None if time_limit_min is None else time.monotonic() + 60 * time_limit_min
    job = _Job(data, run, resume, max_steps, deadline, device, seed, skip_broken, download, on_progress, on_prepare)
    if isinstance(config, ImageAutoencoderConfig):
        return _train_autoencoder(config, job)
    if isinstance(config, NoisyClassifierConfig):
        return _train_classifier(config, job)
    if latent and autoencoder is None:
        first = run / "autoencoder"
        settings = load_config(str(config.autoencoder))
        if not isinstance(settings, ImageAutoencoderConfig):
            raise UsageError(f"autoencoder: {config.autoencoder} configures a {settings.method}, not an autoencoder")
        # Both stages see the same images: what is held out of one must not have trained the other.
        seen = {"data": config.data.model_dump(), "preprocessing": config.preprocessing.model_dump()}
        same = parse_config({**settings.model_dump(), **seen}, str(config.autoencoder))
        settings = cast(ImageAutoencoderConfig, same)
        if resume and (run / "config.yaml").is_file() and not (first / "config.yaml").is_file():
            raise UsageError(f"{run}: was started with --autoencoder; give the same one to --resume")
        again = resume and (first / "config.yaml").is_file()
        autoencoder = _train_autoencoder(settings, _Job(**{**vars(job), "run": first, "resume": again}))
        if stage == "autoencoder" or job.minutes_left == 0:
            return autoencoder
        # The second stage of an interrupted run may not have begun.
        job = _Job(**{**vars(job), "resume": resume and (run / "config.yaml").is_file()})
    return _train_generator(config, autoencoder, job)


def _train_generator(config: GeneratorConfig, autoencoder: str | Path | None, job: _Job) -> Path:
    noted: dict[str, Any] = {}
    codec: KLAutoencoder | VQAutoencoder | None = None
    if autoencoder is not None:
        saved = load_model_files(autoencoder)
        codec, stage = restore_autoencoder(saved)
        _require_same_images(saved, stage, config)
        noted["autoencoder_sha256"] = saved.sha256
    runtime = Runtime(job.device, config.training.precision)
    images = _prepared(
        config, job, runtime, lambda images: build.generator(config, len(images.classes), _channels(codec)), noted
    )
    extra: dict[str, Any] = {}
    shape: tuple[int, ...] = (config.data.channels, *config.data.shape)
    if codec is not None:
        codec = codec.to(runtime.device)
        prepare = lambda done, total: job.on_prepare("latents", done, total)  # noqa: E731
        with runtime.main_first():
            latents = cached_latents(images, codec, saved.sha256, runtime.device, prepare)
        low = partial(reduced, factor=config.factor) if config.method == "upsampler" else None
        examples: Examples = LatentExamples(latents, images, images.epoch, config.data.flip, low)
        held_out: Examples = LatentExamples(latents, images, images.part("validation"), False, low)
        extra = {"autoencoder": stage.model_dump(mode="json"), "autoencoder_sha256": saved.sha256}
        extra["loss_extractors"] = saved.card["loss_extractors"]
        shape = latents.shape[2:]
    else:
        examples = ImageExamples(images, images.epoch, config.data.flip)
        held_out = ImageExamples(images, images.part("validation"), flip=False)
    torch.manual_seed(derive_seed(job.seed, "weights"))
    model = build.generator(config, len(images.classes), None if codec is None else shape[0])
    arranged(model.network, config.training.channels_last, config.training.compile)
    batches = _validation_batches(held_out, config.training.batch_size)
    with_classes = isinstance(model, ImageDiffusion) and model.num_classes > 0
    extra |= {"shape": list(shape), "classes": list(images.classes) if with_classes else []}

    def validate(averaged: nn.Module) -> dict[str, float]:
        loss = _mean_loss(averaged, batches, runtime)
        generator = Generator(cast(ImageDiffusion | PatchedDiffusion, averaged), config, shape, codec)
        with runtime.accelerator.autocast():
            pictures = _pictures(generator, images)
        write_png(grid(as_pictures(pictures)), _next_picture(job.run))
        return {"score": -loss, "loss": loss}

    def save(averaged: nn.Module, step: int, numbers: Mapping[str, float]) -> None:
        card = {**_card(config, images, job.seed, step, numbers), **extra}
        weights = averaged.state_dict()
        if codec is not None:
            weights |= {f"codec.{name}": value for name, value in codec.state_dict().items()}
        save_model(job.run / "model", card, weights, generator_card(card))

    _fit(model, examples, config, Callbacks(validate, save, job.on_progress), runtime, job)
    return job.run / "model"


def _train_autoencoder(config: ImageAutoencoderConfig, job: _Job) -> Path:
    runtime = Runtime(job.device, config.training.precision)
    loss = config.loss
    perceptual, stated, inside = perceptual_loss(
        loss.perceptual,
        loss.lpips_backbone,
        config.data.channels,
        runtime.device,
        len(config.data.shape),
        download=job.download,
    )
    images = _prepared(config, job, runtime)
    if loss.perceptual == "auto" and stated != "lpips":
        warnings.warn(f"LPIPS has no weights here; training with {stated} instead", stacklevel=2)
    torch.manual_seed(derive_seed(job.seed, "weights"))
    weights = LossWeights(loss.perceptual_weight, loss.kl_weight, loss.adversarial_weight, loss.adversarial_start)
    if config.network.quantiser == "vq":
        weights = LossWeights(weights.perceptual, 1.0, weights.adversarial, weights.adversarial_start)
    model = AutoencoderTraining(
        build.autoencoder(config), perceptual, weights, loss.discriminator_channels, loss.discriminator_layers
    )
    arranged(model, config.training.channels_last, compiled=False)  # not called as a whole, so nothing to compile
    examples = ImageExamples(images, images.epoch, config.data.flip)
    batches = _validation_batches(ImageExamples(images, images.part("validation"), flip=False), 16)

    def validate(averaged: nn.Module) -> dict[str, float]:
        training = cast(AutoencoderTraining, averaged)
        codec = training.autoencoder
        with runtime.accelerator.autocast(), torch.no_grad():
            parts = [codec.decode(codec.encode(batch["image"].to(runtime.device))).float().cpu() for batch in batches]
        kept, wanted = torch.cat(parts).clamp(-1, 1), torch.cat([batch["image"] for batch in batches])
        error = (kept - wanted).square().flatten(1).mean(1)
        numbers = {
            # The adversarial loss trades reconstruction for sharpness on purpose: the last weights are wanted, not
            # those of the lowest reconstruction loss, which come before it.
            "score": float(training.step),
            "loss": _mean_loss(averaged, batches, runtime),
            "psnr": float(-10 * torch.log10(error / 4).mean()),
            "ssim": float(cast(Tensor, structural_similarity_index_measure(kept, wanted, data_range=2.0))),
        }
        if stated == "lpips":
            numbers["lpips"] = float(perceptual(kept.to(runtime.device), wanted.to(runtime.device)))
        pairs = torch.stack([wanted[:PICTURES], kept[:PICTURES]], dim=1).flatten(0, 1)
        write_png(grid(as_pictures(pairs)), _next_picture(job.run))
        return numbers

    def save(averaged: nn.Module, step: int, numbers: Mapping[str, float]) -> None:
        codec = cast(AutoencoderTraining, averaged).autoencoder
        generator = torch.Generator().manual_seed(derive_seed(job.seed, "scale"))
        size = min(len(examples), SCALE_BATCHES * 16)
        chosen = torch.randperm(len(examples), generator=generator)[:size].tolist()
        parts = [
            torch.stack([examples.example(i, generator)["image"] for i in chosen[k : k + 16]])
            for k in range(0, size, 16)
        ]
        standardise(codec, [part.to(runtime.device) for part in parts])
        card = _card(config, images, job.seed, step, numbers)
        card["training"]["perceptual_loss"] = stated
        card |= {"classes": [], "loss_extractors": inside}
        save_model(job.run / "model", card, codec.state_dict(), generator_card(card))

    _fit(model, examples, config, Callbacks(validate, save, job.on_progress), runtime, job)
    return job.run / "model"


def _train_classifier(config: NoisyClassifierConfig, job: _Job) -> Path:
    runtime = Runtime(job.device, config.training.precision)
    images = _prepared(config, job, runtime, lambda found: build.noisy_classifier(config, len(found.classes)))
    torch.manual_seed(derive_seed(job.seed, "weights"))
    model = build.noisy_classifier(config, len(images.classes))
    arranged(model.network, config.training.channels_last, config.training.compile)
    examples = ImageExamples(images, _labelled(images, "train"), config.data.flip)
    held_out = ImageExamples(images, _labelled(images, "validation"), flip=False)
    batches = _validation_batches(held_out, config.training.batch_size)

    def validate(averaged: nn.Module) -> dict[str, float]:
        loss = _mean_loss(averaged, batches, runtime)
        return {"score": -loss, "loss": loss}

    def save(averaged: nn.Module, step: int, numbers: Mapping[str, float]) -> None:
        card = {**_card(config, images, job.seed, step, numbers), "classes": list(images.classes)}
        save_model(
            job.run / "model", card, cast(NoisyClassification, averaged).network.state_dict(), generator_card(card)
        )

    _fit(model, examples, config, Callbacks(validate, save, job.on_progress), runtime, job)
    return job.run / "model"


def _fit(
    model: nn.Module, examples: Examples, config: ImageConfig, callbacks: Callbacks, runtime: Runtime, job: _Job
) -> None:
    fit(
        model,
        Draws(examples, job.seed),
        training_options(config.training),
        callbacks,
        TrainingRun(job.run, job.seed, job.resume, job.max_steps, job.minutes_left),
        runtime,
    )


def _prepared(
    config: ImageConfig,
    job: _Job,
    runtime: Runtime,
    built: Callable[[PackedImages], object] = lambda images: None,
    noted: Mapping[str, Any] | None = None,
) -> PackedImages:
    """The images; only then the run begins, so that a call with unusable ones can be corrected and repeated.

    ``built`` makes the model of them, and is called for what it refuses. ``noted`` has to be the same to go on.
    """
    noted = {"seed": job.seed, **(noted or {})}
    require_startable(job.run, config, noted, job.resume)
    with runtime.main_first():
        images = _images(config, job)
    with torch.device("meta"):
        built(images)
    if runtime.is_main:
        start_run(job.run, config, noted, job.resume)
        if images.held_out is not None:
            keep_sides(job.run / "held_out.json", asdict(images.held_out), images.folder, job.resume)
    return images


def _require_same_images(saved: SavedModel, stage: ImageAutoencoderConfig, config: GeneratorConfig) -> None:
    """ModelError for an autoencoder of other images, or one that has seen what this run holds out."""
    same = ("shape", "channels", "test_images")
    found, wanted = ({name: getattr(part.data, name) for name in same} for part in (stage, config))
    if found != wanted or stage.preprocessing != config.preprocessing:
        raise ModelError(
            f"{saved.path}: made for images with {found}; this configuration has {wanted}, "
            "or another preprocessing: use an autoencoder of the same images"
        )


def _channels(codec: KLAutoencoder | VQAutoencoder | None) -> int | None:
    """Of latents; None for pixels."""
    return None if codec is None else len(codec.shift)


def _images(config: ImageConfig, job: _Job) -> PackedImages:
    if isinstance(job.data, PackedImages):
        return job.data
    section = config.data
    held_out = (section.test_images, section.validation_images)
    images = packed(
        job.data,
        home() / "images",
        section.shape,
        section.channels,
        preprocessing=build.image_preprocessing(config.preprocessing, section.shape),
        held_out=held_out,
        skip_broken=job.skip_broken,
        on_file=lambda done, total: job.on_prepare("images", done, total),
    )
    if not len(images.part("validation")):
        raise InputError(job.data, "no validation images", "a val/ side with annotations", "restore it")
    return images


def _labelled(images: PackedImages, part: Literal["train", "validation"]) -> npt.NDArray[np.int64]:
    positions = images.part(part)
    return positions[images.labels[positions] >= 0]


def _validation_batches(examples: Examples, batch_size: int) -> list[dict[str, Tensor]]:
    """The first validation examples, each with a seed of its own that never changes."""
    found = []
    for i in range(min(VALIDATION_IMAGES, len(examples))):
        seed = derive_seed("validation", i)
        example = dict(examples.example(i, torch.Generator().manual_seed(seed)))
        found.append({**example, "seed": torch.tensor(seed)})
    return [
        {name: torch.stack([example[name] for example in part]) for name in part[0]}
        for part in (found[k : k + batch_size] for k in range(0, len(found), batch_size))
    ]


@torch.no_grad()
def _mean_loss(model: nn.Module, batches: list[dict[str, Tensor]], runtime: Runtime) -> float:
    total, count = 0.0, 0
    for batch in batches:
        with runtime.accelerator.autocast():
            loss = model(runtime.to_device(batch))
        total, count = total + float(loss) * len(batch["image"]), count + len(batch["image"])
    return total / count


def _pictures(generator: Generator, images: PackedImages) -> Tensor:
    """Samples with the same noise, and classes or low-resolution images, at every validation.

    Of a restorer of patches: validation images beside what it makes of them.
    """
    task, device = generator.task, generator.device
    if isinstance(task, PatchedDiffusion):
        real = _real(images).to(device)
        restored = Patched(task.denoiser, task.noise, real.shape[2:]).healthy(real, range(len(real)))
        return torch.stack([real, restored], dim=1).flatten(0, 1).cpu()
    label, low = torch.arange(PICTURES) % max(1, task.num_classes), None
    if task.factor is not None:
        low = reduced(_real(images), task.factor).to(device)
        label = torch.from_numpy(images.labels[images.part("validation")[:PICTURES]]).long()
        label = torch.where(label < 0, task.num_classes, label)
    seeds = [derive_seed("picture", i) for i in range(len(label))]
    return generator.sample(seeds, "ddim", 20, label.to(device) if task.num_classes else None, low).cpu()


def _real(images: PackedImages) -> Tensor:
    """The first validation images (n, C, *S)."""
    held_out = ImageExamples(images, images.part("validation")[:PICTURES], flip=False)
    return torch.stack([held_out.example(i, torch.Generator())["image"] for i in range(len(held_out))])


def _next_picture(run: Path) -> Path:
    folder = run / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{len(list(folder.glob('*.png'))) + 1:03d}.png"


def _card(
    config: ImageConfig, images: PackedImages, seed: int, step: int, numbers: Mapping[str, float]
) -> dict[str, Any]:
    tasks = {"autoencoder": "image-autoencoder", "classifier": "image-classifier"}
    return {
        "task": tasks.get(config.method, "image"),
        "method": config.method,
        "dims": len(config.data.shape),
        "labels": {},
        "channels": ["red", "green", "blue"] if config.data.channels == 3 else ["grey"],
        "config": config.model_dump(mode="json"),
        "training": {
            "seed": seed,
            "step": step,
            "data": {
                "images": len(images.part("train")),
                "validation_images": len(images.part("validation")),
                "broken_files_left_out": len(images.skipped),
            },
            **({} if images.held_out is None else {"held_out": asdict(images.held_out)}),
        },
        "metrics": {"validation": {name: value for name, value in numbers.items() if name != "score"}},
        "licence": "see the training data",
        "versions": versions(),
    }
