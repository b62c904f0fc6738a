"""The first stage of a latent generator: the autoencoder of images."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

import torch
import yaml
from torch import Tensor, nn

from medseg_diffusion import build
from medseg_diffusion.config.generator import GeneratorConfig, ImageAutoencoderConfig
from medseg_diffusion.config.load import load_config, parse_config
from medseg_diffusion.data.image_cache import ImageExamples, images_at_once
from medseg_diffusion.device import with_memory_format
from medseg_diffusion.diffusion.noise import derive_seed
from medseg_diffusion.errors import ModelError, UsageError
from medseg_diffusion.models.store import SavedModel
from medseg_diffusion.networks.autoencoder import KLAutoencoder, VQAutoencoder
from medseg_diffusion.training.autoencoder import AutoencoderTraining, LossWeights, Perceptual, as_images, standardise
from medseg_diffusion.training.job import Job
from medseg_diffusion.training.perceptual import PerceptualLoss, perceptual_loss
from medseg_diffusion.training.runtime import Runtime
from medseg_diffusion.training.trainer import Callbacks

from .image_stage import ImageSourceOptions, image_card, mean_loss, prepare_images, validation_batches, write_pictures

BATCH = 16
"""Number of images that are encoded together, in validation and for the scale of latents; of volumes fewer."""
SCALE_BATCHES = 64
"""Number of batches from which the mean and the standard deviation of latents are estimated."""
PICTURES = 16


def train_autoencoder(config: ImageAutoencoderConfig, source: ImageSourceOptions, job: Job) -> Path:
    """Train an autoencoder of images and return the model directory.

    Raises:
        InputError: Unusable data.
        ModelError: The configuration demands LPIPS, whose weights are missing.
    """
    runtime = Runtime(job.device, config.training.precision, config.training.sharding)
    section, noted = config.loss, _noted_loss(job)
    perceptual, name, fingerprints = perceptual_loss(
        noted or section.perceptual,
        section.lpips_backbone,
        config.data.channels,
        runtime.device,
        download=source.download,
    )
    notes = {"perceptual_loss": name} if noted is not None or not job.started else {}  # earlier versions noted nothing
    images = prepare_images(config, source, job, runtime, lambda packed: _training(config, perceptual), notes)
    if (noted or section.perceptual) == "auto" and name != "lpips":
        warnings.warn(f"LPIPS has no weights here; training with {name} instead", stacklevel=2)
    job.seed_weights()
    model = _training(config, perceptual)
    examples = ImageExamples(images, images.epoch, config.data.flip)
    held_out = ImageExamples(images, images.part("validation"), flip=False)
    batches = validation_batches(held_out, images_at_once(config.data.shape, BATCH))

    def validate(averaged: nn.Module) -> dict[str, float]:
        training = cast(AutoencoderTraining, averaged)
        originals = torch.cat([batch["image"] for batch in batches])
        job.on_prepare("reconstructions", 0, 1)
        reconstructions = _reconstructions(training, batches, runtime)
        numbers = {
            # The adversarial loss trades reconstruction for sharpness on purpose. The last weights are therefore the
            # best ones; the lowest reconstruction loss lies before the adversarial loss begins.
            "score": float(training.step),
            "loss": mean_loss(averaged, batches, runtime, job.on_prepare),
            **_fidelity(reconstructions, originals),
        }
        if name == "lpips":
            pairs = zip(
                *(as_images(part, section.slices, job.seed) for part in (reconstructions, originals)), strict=True
            )
            distances = [float(perceptual(*(part.to(runtime.device) for part in pair))) for pair in pairs]
            numbers["lpips"] = sum(distances) / len(distances)
        both = torch.stack([originals[:PICTURES], reconstructions[:PICTURES]], dim=1)
        write_pictures(both.flatten(0, 1), job.run)
        return numbers

    def save(averaged: nn.Module, step: int, numbers: Mapping[str, float]) -> None:
        codec = cast(AutoencoderTraining, averaged).autoencoder
        standardise(codec, _scale_batches(examples, config.data.shape, job, runtime))
        card = image_card(config, images, job, step, numbers)
        card["training"]["perceptual_loss"] = name
        job.save(card | {"classes": [], "loss_extractors": fingerprints}, codec.state_dict())

    job.fit(model, examples, config.training, Callbacks(validate, save, job.step_done), runtime)
    return job.model


def _noted_loss(job: Job) -> PerceptualLoss | None:
    """The perceptual loss that a resumed run was started with: "auto" might choose another one by now.

    None for a new run, and for one that an earlier version started.
    """
    if not job.resume or not job.started:
        return None
    return cast("PerceptualLoss | None", yaml.safe_load((job.run / "config.yaml").read_text()).get("perceptual_loss"))


def autoencoder_of(config: GeneratorConfig) -> ImageAutoencoderConfig:
    """The configuration of a latent generator's first stage, for the generator's own data.

    Both stages use the same split, because images held out of one must not be used to train the other.

    Raises:
        UsageError: The configuration names a model that is not an autoencoder.
    """
    stage = load_config(str(config.autoencoder))
    if not isinstance(stage, ImageAutoencoderConfig):
        raise UsageError(f"autoencoder: {config.autoencoder} configures a {stage.method}, not an autoencoder")
    same = {"data": config.data.images.model_dump(), "preprocessing": config.preprocessing.model_dump()}
    return cast(ImageAutoencoderConfig, parse_config({**stage.model_dump(), **same}, str(config.autoencoder)))


def require_same_images(saved: SavedModel, stage: ImageAutoencoderConfig, config: GeneratorConfig) -> None:
    """Raise ModelError for an autoencoder of other images, or one that was trained on images held out here."""
    keys = ("shape", "channels", "test_images")
    theirs, ours = ({key: getattr(part.data, key) for key in keys} for part in (stage, config))
    if theirs != ours or stage.preprocessing != config.preprocessing:
        raise ModelError(
            f"{saved.path}: made for images with {theirs}; this configuration has {ours}, "
            "or another preprocessing: use an autoencoder of the same images"
        )


def latent_channels(codec: KLAutoencoder | VQAutoencoder | None) -> int | None:
    """Channels of the latents; None for pixels."""
    return None if codec is None else len(codec.shift)


def _training(config: ImageAutoencoderConfig, perceptual: Perceptual) -> AutoencoderTraining:
    section = config.loss
    weights = LossWeights(
        section.perceptual_weight,
        1.0 if config.network.quantiser == "vq" else section.kl_weight,
        section.adversarial_weight,
        section.adversarial_start,
    )
    model = AutoencoderTraining(
        build.autoencoder(config),
        perceptual,
        weights,
        section.discriminator_channels,
        section.discriminator_layers,
        section.slices,
    )
    with_memory_format(model, config.training.channels_last)  # not compiled, because it is never called as a whole
    return model


@torch.no_grad()
def _reconstructions(training: AutoencoderTraining, batches: list[dict[str, Tensor]], runtime: Runtime) -> Tensor:
    """The reconstructed images of all batches, on the CPU."""
    codec = training.autoencoder
    with runtime.accelerator.autocast():
        parts = [codec.decode(codec.encode(batch["image"].to(runtime.device))).float().cpu() for batch in batches]
    return torch.cat(parts).clamp(-1, 1)


def _fidelity(reconstructions: Tensor, originals: Tensor) -> dict[str, float]:
    """PSNR and SSIM of images in [-1, 1]."""
    from torchmetrics.functional import image  # slow to import

    axes = tuple(range(1, originals.ndim))
    psnr = image.peak_signal_noise_ratio(reconstructions, originals, data_range=2.0, dim=axes)
    ssim = image.structural_similarity_index_measure(reconstructions, originals, data_range=2.0)
    return {"psnr": float(psnr), "ssim": float(cast(Tensor, ssim))}


def _scale_batches(examples: ImageExamples, shape: tuple[int, ...], job: Job, runtime: Runtime) -> Iterator[Tensor]:
    """Random training images on the device, for the scale of latents."""
    generator = torch.Generator().manual_seed(derive_seed(job.seed, "scale"))
    size = min(len(examples), SCALE_BATCHES * BATCH)
    chosen = torch.randperm(len(examples), generator=generator)[:size].tolist()
    at_once = images_at_once(shape, BATCH)
    for first in range(0, size, at_once):
        job.on_prepare("statistics of latents: image", first, size)
        batch = chosen[first : first + at_once]
        yield torch.stack([examples.example(i, generator)["image"] for i in batch]).to(runtime.device)
