"""Trained generators, autoencoders and noisy classifiers in memory, restored from model directories."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from medseg_diffusion import build
from medseg_diffusion.config.generator import GeneratorConfig, ImageAutoencoderConfig, NoisyClassifierConfig
from medseg_diffusion.config.imported import DenoiserConfig
from medseg_diffusion.config.shared import UNetSection
from medseg_diffusion.data.cases import Bounds
from medseg_diffusion.diffusion.denoiser import Clipped, Denoiser, NetworkDenoiser
from medseg_diffusion.diffusion.guidance import ClassifierFreeGuided, ClassifierGradient, ClassifierGuided
from medseg_diffusion.diffusion.noise import generators
from medseg_diffusion.diffusion.objective import Simple
from medseg_diffusion.errors import ModelError, UsageError
from medseg_diffusion.networks.autoencoder import Codec, KLAutoencoder, VQAutoencoder
from medseg_diffusion.networks.unet import UNet
from medseg_diffusion.sampling.loop import sample
from medseg_diffusion.tasks.image import ImageDiffusion
from medseg_diffusion.tasks.patched import PatchedDiffusion

from .classes import classes_of
from .inference import placed
from .restore import ready, typed_config, usable
from .store import SavedModel


@dataclass(frozen=True, eq=False)
class Generator:
    """A trained generator, ready to sample.

    Attributes:
        task: The diffusion model, on its device; a patched model cannot be sampled.
        config: Configuration of its training.
        shape: Shape (C, *S) of x0, which is the image or the latent.
        codec: Autoencoder of a latent generator; None for pixels.
        classes: Names of the classes of images.
        mask_classes: Label value -> class name of the masks that condition it, background included; empty without.
        held_out: The bounds of the split of its images; None for an imported generator, and for images with an official
            split.
    """

    task: ImageDiffusion | PatchedDiffusion
    config: GeneratorConfig
    shape: tuple[int, ...]
    codec: Codec | None = None
    classes: tuple[str, ...] = ()
    held_out: Bounds | None = None
    mask_classes: Mapping[int, str] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return next(self.task.parameters()).device

    # many: one keyword for each condition and option of the sampling
    @torch.no_grad()
    def sample(
        self,
        seeds: Sequence[int],
        sampler: str | None = None,
        steps: int | None = None,
        label: Tensor | None = None,
        low: Tensor | None = None,
        guidance: float = 1.0,
        classifier: ClassifierGradient | None = None,
        clip_first: bool = False,
        mask: Tensor | None = None,
        on_step: Callable[[int, int], None] = lambda done, total: None,
    ) -> Tensor:
        """Sample images (B, C, H, W) in [-1, 1]. A seed gives the same image in any batch, up to rounding.

        Args:
            seeds: One seed per image.
            sampler: "ddpm", "ddim", "dpm++", "euler" or "heun"; None takes the model's default.
            steps: Number of steps; None takes the model's default.
            label: Classes (B,), for a model that is conditioned by them.
            low: Low-resolution images (B, C, H / factor, W / factor), for an upsampler.
            guidance: Strength of classifier-free guidance, 1 for none.
            classifier: Gradient of a noisy classifier.
            clip_first: Clip the predicted pixels before the classifier's gradient is added, as guided diffusion's code
                does, and not after it.
            mask: Label of every pixel, (B, H, W) whole numbers, for a model that is conditioned by masks; None draws
                without a mask.
            on_step: Called after every step with the steps done and those in all.

        Raises:
            UsageError: A patched model.
        """
        task, device = self.task, self.device
        if isinstance(task, PatchedDiffusion):
            raise UsageError("a patched model restores patches of images; it cannot generate images")
        denoiser: Denoiser = task.denoiser
        noise_generators = generators(seeds)
        source = build.noise_source(self.config.diffusion.noise)
        noise = source(self.shape, noise_generators, torch.zeros((), device=device))
        if guidance != 1:
            denoiser = ClassifierFreeGuided(denoiser, task.null(noise), guidance)
        pixels = self.codec is None  # pixels have a range, latents have none
        if classifier is not None and clip_first and pixels:
            denoiser = ClassifierGuided(Clipped(denoiser), classifier)
        else:
            denoiser = denoiser if classifier is None else ClassifierGuided(denoiser, classifier)
            denoiser = Clipped(denoiser) if pixels else denoiser
        defaults = self.config.sampling
        name, count = sampler or defaults.sampler, steps or defaults.steps
        cond = task.condition(label, low, self.shape[1:], task.no_mask(noise) if mask is None else mask)
        times = build.generator_times(task.denoiser.schedule, name, count)
        x0 = sample(
            denoiser,
            build.sampler(name),
            noise,
            times,
            cond,
            generators=noise_generators,
            source=source,
            on_step=lambda time, x, prediction: on_step(times.index(time), len(times) - 1),
        )
        return (x0 if self.codec is None else self.codec.decode(x0)).clamp(-1, 1)


def restore_generator(saved: SavedModel, device: torch.device | str = "cpu", compiled: bool = False) -> Generator:
    """Restore the generator of a model directory, trained here or imported, its denoiser compiled if so.

    Raises:
        ModelError: A model of another kind or version, or an imported one that needs more than its own weights.
    """
    if saved.card.get("task") == "denoiser":
        return _imported(saved, device, compiled)
    config = typed_config(saved, GeneratorConfig)
    with usable(saved, GeneratorConfig):
        shape, classes = tuple(saved.card["shape"]), tuple(saved.card["classes"])
        bounds = saved.card["training"].get("held_out")
        held_out = None if bounds is None else Bounds(**bounds)
        codec: KLAutoencoder | VQAutoencoder | None = None
        if config.autoencoder is not None:
            stage = ImageAutoencoderConfig.model_validate(saved.card["autoencoder"])
            codec = build.autoencoder(stage)
            ready(codec.requires_grad_(False), saved.weights_under("codec"))
            placed(codec, device, stage.training.channels_last)
        mask_classes = classes_of(saved.card) if config.condition.mask else {}
        task = build.generator(config, len(classes), None if codec is None else shape[0], len(mask_classes))
        ready(task, {name: value for name, value in saved.weights.items() if not name.startswith("codec.")})
    placed(task.denoiser.network, device, config.training.channels_last, compiled)
    task.requires_grad_(False).to(device)
    return Generator(task, config, shape, codec, classes, held_out, mask_classes)


def _imported(saved: SavedModel, device: torch.device | str, compiled: bool) -> Generator:
    """Restore a published pixel model as a generator of the image size that was given at its import."""
    imported = typed_config(saved, DenoiserConfig)
    network, size, channels = imported.network, saved.card.get("size"), imported.network.in_channels
    if saved.card["method"] == "latent-diffusion":
        requirement = "an autoencoder, which is not part of it"
    elif saved.card["dims"] != 2:
        requirement = "sampling in 3D, which exists only for generators trained here"
    elif channels not in (1, 3) or network.out_channels != (1 + imported.learned_variance) * channels:
        requirement = "low-resolution images or latents, which are not part of it"
    elif network.context_channels is not None:
        requirement = "a context (such as a text), which cannot be given here"
    elif size is None or size % 2 ** (len(network.channel_mult) - 1):
        requirement = f"images of a known size, but has {size}: import it again with the right size, as --set size=256"
    else:
        requirement = ""
    if requirement:
        raise ModelError(f"{saved.path}: an imported model that needs {requirement}")
    config = GeneratorConfig.model_validate(
        {
            "method": "pixel",
            "data": {"size": size, "channels": channels},
            "network": network.model_dump(include=set(UNetSection.model_fields)),
            "diffusion": {"schedule": imported.schedule.model_dump(), "target": imported.target},
            "condition": {"classes": "none" if network.num_classes is None else "embedding", "drop": 0.0},
        }
    )
    denoiser = NetworkDenoiser(
        UNet(**network.model_dump()),
        build.noise_schedule(imported.schedule),
        imported.target,
        imported.learned_variance,
    )
    with usable(saved, DenoiserConfig):
        ready(denoiser.network, saved.weights)
    placed(denoiser.network, device, compiled=compiled)
    task = ImageDiffusion(denoiser, Simple(), None, network.num_classes or 0, drop=0.0)
    classes = tuple(f"class {i}" for i in range(network.num_classes or 0))
    return Generator(
        task.requires_grad_(False).to(device).eval(), config, (channels, *config.data.shape), None, classes
    )


def restore_autoencoder(saved: SavedModel) -> tuple[KLAutoencoder | VQAutoencoder, ImageAutoencoderConfig]:
    """Restore the autoencoder of a model directory, in evaluation mode on the CPU, and its configuration."""
    config = typed_config(saved, ImageAutoencoderConfig)
    with usable(saved, ImageAutoencoderConfig):
        codec = build.autoencoder(config)
        ready(codec, saved.weights)
    placed(codec, "cpu", config.training.channels_last)
    return codec.requires_grad_(False), config


def restore_classifier(
    saved: SavedModel, device: torch.device | str = "cpu"
) -> tuple[nn.Module, int, NoisyClassifierConfig]:
    """Restore the noisy classifier of a model directory, its number of classes and its configuration."""
    config = typed_config(saved, NoisyClassifierConfig)
    with usable(saved, NoisyClassifierConfig):
        classes = len(saved.card["classes"])
        network = build.noisy_classifier(config, classes).network
        ready(network, saved.weights)
    return placed(network.requires_grad_(False), device, config.training.channels_last), classes, config
