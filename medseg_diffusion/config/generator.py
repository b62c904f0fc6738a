"""Configuration of generators, their autoencoders and noisy classifiers."""

from __future__ import annotations

from typing import Literal

from pydantic import (
    Field,
    PositiveInt,
    model_validator,
)

from .shared import PreprocessingSection, SamplerName, ScheduleSection, Section, TrainingSection, UNetSection


class ImageDataSection(Section):
    """Images as training examples (`medseg_diffusion.data.image_cache`).

    ``size`` is the side of images and of slices of scans; three numbers mean whole volumes of scans. ``test_images``
    and ``validation_images`` are the numbers of held-out images in collections without an official split; a scan counts
    as one image.
    """

    size: int | tuple[int, int, int] = 64
    channels: Literal[1, 3] = 3
    flip: bool = True
    test_images: int = Field(0, ge=0)
    validation_images: int = Field(100, ge=1)

    @property
    def shape(self) -> tuple[int, ...]:
        """The two or three sides of an image."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    @model_validator(mode="after")
    def _sides(self) -> ImageDataSection:
        if min(self.shape) < 8:
            raise ValueError(f"size must be at least 8, got {self.size}")
        return self


class GeneratorDataSection(ImageDataSection):
    """Images of a generator, with masks if it is conditioned by them.

    ``labels`` are the names of labels 1, 2, ...; without it they are those of dataset.json. ``merge_labels`` reads
    every label above 0 as 1. Both are those of segmenters.
    """

    labels: tuple[str, ...] = ()
    merge_labels: bool = False

    @property
    def images(self) -> ImageDataSection:
        """The images alone, for models that see no masks."""
        return ImageDataSection(**self.model_dump(include=set(ImageDataSection.model_fields)))

    @model_validator(mode="after")
    def _merged(self) -> GeneratorDataSection:
        if self.merge_labels and len(self.labels) != 1:
            raise ValueError(f"merge_labels leaves one class; name it in labels (got {len(self.labels)} names)")
        return self


class ImageConditionSection(Section):
    """Conditioning of a generator by classes, or by masks.

    ``classes`` says how a class reaches the network; "cross-attention" makes it a token of ``context_channels``.
    ``mask`` concatenates the mask of the image to the network's input. ``drop`` is the share of training examples
    without their class or mask, for classifier-free guidance.
    """

    classes: Literal["none", "embedding", "cross-attention"] = "none"
    mask: bool = False
    drop: float = Field(0.1, ge=0, le=1)
    context_channels: int = Field(256, gt=0)


class ImageDiffusionSection(Section):
    """The predicted quantity and the loss of a generator.

    ``target`` "flow" is eps - x0 (`medseg_diffusion.diffusion.prediction`). The objectives "hybrid" and "bound" train a
    learned variance and need ``learned_variance``. ``noise`` "simplex" is that of AnoDDPM
    (`medseg_diffusion.diffusion.simplex`). ``times_mean`` and ``times_std`` are those of log(sigma / alpha) for
    ``times`` "logit-normal" (`medseg_diffusion.diffusion.noise.LogitNormalTimes`).
    """

    schedule: ScheduleSection = ScheduleSection()
    noise: Literal["gaussian", "simplex"] = "gaussian"
    target: Literal["eps", "x0", "v", "flow"] = "eps"
    learned_variance: bool = False
    objective: Literal["simple", "hybrid", "bound"] = "simple"
    times: Literal["uniform", "importance", "logit-normal"] = "uniform"
    times_mean: float = Field(0.0, ge=-10, le=10)
    times_std: float = Field(1.0, gt=0, le=10)
    weighting: Literal["none", "min-snr"] = "none"
    gamma: float = Field(5.0, gt=0)

    @model_validator(mode="after")
    def _variance(self) -> ImageDiffusionSection:
        if self.learned_variance != (self.objective != "simple"):
            raise ValueError("a learned variance needs objective hybrid or bound, and they need learned_variance: true")
        if self.times == "logit-normal" and self.learned_variance:
            raise ValueError(
                "times: logit-normal is for objective: simple; a bound needs all times alike, or importance"
            )
        self.schedule.require_x0(self.target)
        return self


class GeneratorSamplingSection(Section):
    """Defaults of `medseg sample`, stored in the model."""

    sampler: SamplerName = "ddim"
    steps: int = Field(50, ge=1)


class AutoencoderNetworkSection(Section):
    """Network of an autoencoder; its image channels follow from the data. "vq" has a codebook instead of a variance.

    ``middle_attention`` attends to all positions of the latent at once, whose cost is quadratic in their number: too
    much for volumes.
    """

    quantiser: Literal["kl", "vq"] = "kl"
    codebook_size: int = Field(1024, ge=2)
    latent_channels: int = Field(4, gt=0)
    channels: tuple[PositiveInt, ...] = Field((64, 128), min_length=1)
    num_res_blocks: int = Field(2, ge=1)
    attention_levels: tuple[bool, ...] = (False, False)
    middle_attention: bool = True
    norm_groups: int = Field(32, gt=0)


class AutoencoderLossSection(Section):
    """Loss of an autoencoder of images (`medseg_diffusion.training.autoencoder.AutoencoderTraining`).

    ``perceptual`` "lpips" needs the weights of its backbone, "gradient-ssim" needs none, and "auto" takes LPIPS if the
    weights are there. ``lpips_backbone`` is their file (VGG-16 of torchvision); None looks where torchvision keeps its
    downloads. Of a volume, the perceptual and the adversarial loss see ``slices`` in each of three planes.
    """

    perceptual: Literal["auto", "lpips", "gradient-ssim"] = "auto"
    lpips_backbone: str | None = None
    perceptual_weight: float = Field(1.0, ge=0)
    kl_weight: float = Field(1e-6, ge=0)
    adversarial_weight: float = Field(0.5, ge=0)
    adversarial_start: int = Field(50_001, ge=0)
    discriminator_channels: int = Field(64, gt=0)
    discriminator_layers: int = Field(3, ge=1)
    slices: int = Field(8, ge=1)


class ClassifierNetworkSection(Section):
    """Network of a noisy classifier; its channels, size and classes follow from the data."""

    channels: int = Field(128, gt=0)
    channel_mult: tuple[PositiveInt, ...] = Field((1, 2, 3, 4), min_length=1)
    num_res_blocks: int = Field(4, ge=1)
    attention_factors: tuple[PositiveInt, ...] = (2, 4, 8)
    head_channels: int = Field(64, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    norm_groups: int = Field(32, gt=0)


def _no_size(preprocessing: PreprocessingSection) -> None:
    if preprocessing.size is not None:
        raise ValueError("preprocessing.size is for segmenters; use data.size for the size of images")
    if preprocessing.crop_centre is not None:
        raise ValueError("preprocessing.crop_centre is for segmenters")


class GeneratorConfig(Section):
    """A generator of images or volumes.

    It generates pixels ("pixel"), latents of an autoencoder ("latent"), or either of them from a smaller image
    ("upsampler"). "patched" (pDDPM) learns to restore patches of an image from their surroundings, and cannot be
    sampled. ``autoencoder`` (latent, and an upsampler of latents) is the configuration of the first stage: the name of
    a preset, or a YAML file. ``factor`` (upsampler) is the ratio of the sides of large and small images.
    ``preprocessing`` applies to scans.
    """

    description: str = ""
    method: Literal["pixel", "latent", "upsampler", "patched"]
    autoencoder: str | None = None
    factor: int = Field(2, ge=2)
    data: GeneratorDataSection = GeneratorDataSection()
    preprocessing: PreprocessingSection = PreprocessingSection()
    network: UNetSection = UNetSection(dims=2)
    condition: ImageConditionSection = ImageConditionSection()
    diffusion: ImageDiffusionSection = ImageDiffusionSection()
    training: TrainingSection = TrainingSection()
    sampling: GeneratorSamplingSection = GeneratorSamplingSection()

    @model_validator(mode="after")
    def _stages(self) -> GeneratorConfig:
        if self.method == "latent" and self.autoencoder is None:
            raise ValueError("method latent needs an autoencoder")
        _no_size(self.preprocessing)
        if self.method == "upsampler" and any(side % self.factor for side in self.data.shape):
            raise ValueError(f"data.size {self.data.size} is no multiple of factor {self.factor}")
        if self.method in ("pixel", "patched") and self.autoencoder is not None:
            raise ValueError(f"method {self.method} has no autoencoder")
        if self.method == "patched" and (
            self.diffusion.target != "x0" or self.diffusion.objective != "simple" or self.condition.classes != "none"
        ):
            raise ValueError("method patched needs diffusion.target: x0 and objective: simple, and knows no classes")
        if self.network.dims != len(self.data.shape):
            raise ValueError(f"data.size has {len(self.data.shape)} sides, but network.dims is {self.network.dims}")
        attends = bool(self.network.attention_factors) or self.network.middle_attention is True
        if self.condition.classes == "cross-attention" and not attends:
            raise ValueError("condition.classes cross-attention needs network.attention_factors")
        self._check_masks()
        return self

    def _check_masks(self) -> None:
        if not self.condition.mask:
            if self.data.labels:
                raise ValueError("data.labels and data.merge_labels are for condition.mask: true")
            return
        if self.method not in ("pixel", "latent"):
            raise ValueError(f"condition.mask is for methods pixel and latent, not {self.method}")
        if self.condition.classes != "none":
            raise ValueError("condition.mask and condition.classes exclude each other")
        if self.preprocessing.crop_foreground:
            raise ValueError("preprocessing.crop_foreground needs an image, and a mask to draw one for has none yet")


class ImageAutoencoderConfig(Section):
    """The first stage of a latent generator."""

    description: str = ""
    method: Literal["autoencoder"]
    data: ImageDataSection = ImageDataSection()
    preprocessing: PreprocessingSection = PreprocessingSection()
    network: AutoencoderNetworkSection = AutoencoderNetworkSection()
    loss: AutoencoderLossSection = AutoencoderLossSection()
    training: TrainingSection = TrainingSection()

    @model_validator(mode="after")
    def _images(self) -> ImageAutoencoderConfig:
        _no_size(self.preprocessing)
        factor = 2 ** (len(self.network.channels) - 1)
        if odd := [side for side in self.data.shape if side % factor]:
            raise ValueError(f"data.size: {odd[0]} is no multiple of {factor}, by which the autoencoder divides it")
        least, smallest = 3 * 2**self.loss.discriminator_layers, min(self.data.shape)
        if self.loss.adversarial_weight > 0 and smallest < least:
            raise ValueError(
                f"data.size: a side of {smallest} is too small for loss.discriminator_layers "
                f"{self.loss.discriminator_layers}, which need {least}; set fewer, or loss.adversarial_weight: 0"
            )
        return self


class NoisyClassifierConfig(Section):
    """A classifier of noisy images, to guide a pixel generator of the same schedule."""

    description: str = ""
    method: Literal["classifier"]
    data: ImageDataSection = ImageDataSection()
    preprocessing: PreprocessingSection = PreprocessingSection()
    network: ClassifierNetworkSection = ClassifierNetworkSection()
    schedule: ScheduleSection = ScheduleSection()
    training: TrainingSection = TrainingSection()

    @model_validator(mode="after")
    def _images(self) -> NoisyClassifierConfig:
        _no_size(self.preprocessing)
        if self.schedule.name == "rectified-flow":
            raise ValueError(
                "schedule rectified-flow ends in pure noise, where a classifier cannot guide; guide a generator with "
                "condition.classes instead"
            )
        return self
