"""The sections of a run configuration. Each mirrors the constructor that it feeds, and a test compares the two."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)


class Section(BaseModel):
    """Base of all sections: no unknown keys, no changes after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class UNetSection(Section):
    """`medseg_diffusion.networks.unet.UNet`; channels in and out and conditions follow from the task."""

    dims: Literal[2, 3] = 3
    channels: int = Field(32, gt=0)
    channel_mult: tuple[int, ...] = Field((1, 2, 3), min_length=1)
    num_res_blocks: int | tuple[int, ...] = 1
    attention_factors: tuple[int, ...] = ()
    head_channels: int = 32
    num_heads: int | None = None
    dropout: float = Field(0.0, ge=0, lt=1)
    resampling: Literal["resblock", "conv", "plain"] = "resblock"
    patch_size: int = Field(1, ge=1)
    checkpointing: bool = False
    scale_shift: bool = True
    norm_eps: float = Field(1e-5, gt=0)
    norm_groups: int = Field(32, gt=0)
    middle_attention: bool | None = None


class DenoiserUNetSection(UNetSection):
    """The U-Net of a denoiser of images or latents, whole: nothing follows from a task."""

    in_channels: int = Field(gt=0)
    out_channels: int = Field(gt=0)
    num_classes: int | None = None
    context_channels: int | None = None
    transformer_depth: int = 1


class NoisyClassifierSection(Section):
    """`medseg_diffusion.networks.noisy_classifier.NoisyClassifier`."""

    dims: Literal[2, 3] = 2
    in_channels: int = Field(gt=0)
    num_classes: int = Field(gt=0)
    size: tuple[int, ...]
    channels: int = Field(128, gt=0)
    channel_mult: tuple[int, ...] = Field((1, 2, 3, 4), min_length=1)
    num_res_blocks: int = Field(4, ge=1)
    attention_factors: tuple[int, ...] = (2, 4, 8)
    head_channels: int = 64
    dropout: float = Field(0.0, ge=0, lt=1)
    resampling: Literal["resblock", "conv", "plain"] = "resblock"
    scale_shift: bool = True
    norm_eps: float = Field(1e-5, gt=0)
    norm_groups: int = Field(32, gt=0)


class AutoencoderSection(Section):
    """`medseg_diffusion.networks.autoencoder.KLAutoencoder`."""

    dims: Literal[2, 3] = 2
    in_channels: int = Field(gt=0)
    out_channels: int = Field(gt=0)
    latent_channels: int = Field(gt=0)
    channels: tuple[int, ...] = (64, 128, 128)
    num_res_blocks: int = Field(1, ge=1)
    attention_levels: tuple[bool, ...] = (False, False, False)
    layout: Literal["monai", "latent-diffusion"] = "monai"
    norm_eps: float = Field(1e-6, gt=0)
    norm_groups: int = Field(32, gt=0)
    middle_attention: bool = True


class ImageEncoderSection(Section):
    """SegDiff's RRDB encoder (`medseg_diffusion.networks.segdiff.SegDiff`)."""

    encoder_channels: int = 64
    encoder_blocks: int = 12
    encoder_growth: int = 32


class DynamicEncodingSection(Section):
    """MedSegDiff's FF-Parser (`medseg_diffusion.networks.medsegdiff.MedSegDiff`)."""

    bands: int = Field(33, ge=3)


class SemanticConditionSection(Section):
    """MedSegDiff-V2's SS-Former (`medseg_diffusion.networks.medsegdiff_v2.MedSegDiffV2`)."""

    depth: int = Field(4, ge=1)
    head_channels: int = Field(64, ge=1)
    dropout: float = Field(0.1, ge=0, lt=1)


class AnchorLossSection(Section):
    """MedSegDiff-V2's anchor loss (`medseg_diffusion.tasks.mask.AnchorLoss`)."""

    every: int = Field(5, ge=1)
    cross_entropy_weight: float = Field(10.0, ge=0)


class MaskAutoencoderSection(Section):
    """Latent mask diffusion: the autoencoder of masks (`tasks.latent_mask`), and the image's encoder of its layout.

    ``features`` are the channels of the encoded image. The autoencoder trains for ``max_steps``, before the denoiser.
    """

    latent_channels: int = Field(4, gt=0)
    channels: tuple[int, ...] = Field((32, 64), min_length=1)
    num_res_blocks: int = Field(1, ge=1)
    features: int = Field(32, gt=0)
    kl_weight: float = Field(1e-6, ge=0)
    norm_groups: int = Field(8, gt=0)
    max_steps: int = Field(1000, ge=1)
    learning_rate: float = Field(1e-3, gt=0)


class ScheduleSection(Section):
    """Noise schedule by name, with T; the ends of beta for linear and scaled-linear, None for the published ones."""

    name: Literal["linear", "cosine", "scaled-linear", "sigmoid"] = "linear"
    num_steps: int = Field(1000, ge=2)
    beta_start: float | None = Field(None, gt=0, lt=1)
    beta_end: float | None = Field(None, gt=0, lt=1)

    @model_validator(mode="after")
    def _ends(self) -> ScheduleSection:
        if (self.beta_start, self.beta_end) != (None, None) and self.name not in ("linear", "scaled-linear"):
            raise ValueError(f"a {self.name} schedule has no beta_start and beta_end")
        return self


class DiffusionSection(Section):
    """What is predicted, and with which loss; ``learned_variance`` adds the variance's (hybrid objective).

    ``head`` "logits" makes the network emit class logits (target x0) and is needed for ``dice_ce_weight`` > 0.
    ``scale`` is the value of a certain class in x0, and the standard deviation of latents: the smaller it is, the
    harder it is to see through the noise. ``normalised``: the network sees x_t divided by its standard deviation.
    """

    schedule: ScheduleSection = ScheduleSection()
    target: Literal["eps", "x0", "v"] = "x0"
    head: Literal["linear", "logits"] = "linear"
    scale: float = Field(1.0, gt=0)
    normalised: bool = True
    weighting: Literal["none", "min-snr"] = "none"
    gamma: float = Field(5.0, gt=0)
    dice_ce_weight: float = Field(0.0, ge=0)
    learned_variance: bool = False

    @model_validator(mode="after")
    def _logits(self) -> DiffusionSection:
        if self.learned_variance and self.head == "logits":
            raise ValueError("head: logits has no learned_variance")
        if self.dice_ce_weight > 0 and self.head != "logits":
            raise ValueError("dice_ce_weight needs head: logits")
        if self.head == "logits" and self.target != "x0":
            raise ValueError("head: logits needs target: x0")
        return self


class PreprocessingSection(Section):
    """`medseg_diffusion.volumes.preprocessing.Preprocessing`."""

    orientation: str | None = "RAS"
    spacing_mm: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None
    intensity: Literal["percentile", "zscore", "median"] = "percentile"
    low: float = 0.5
    high: float = 99.5
    crop_foreground: bool = False
    size: tuple[PositiveInt, PositiveInt] | None = None

    @model_validator(mode="after")
    def _one_grid(self) -> PreprocessingSection:
        if self.size is not None and self.spacing_mm is not None:
            raise ValueError("size and spacing_mm exclude each other")
        axes = None if self.orientation is None else sorted(self.orientation.translate(str.maketrans("LPI", "RAS")))
        if axes not in (None, ["A", "R", "S"]):
            raise ValueError(f"orientation: names one of R/L, A/P and S/I each, such as RAS; got {self.orientation}")
        return self


class AugmentationSection(Section):
    """`medseg_diffusion.data.augmentation.Augmentation`."""

    probability: float = Field(0.3, ge=0, le=1)
    rotate_degrees: float = 15.0
    scale: float = 0.15
    flip_axes: tuple[NonNegativeInt, ...] = ()
    noise_std: float = 0.1
    blur_sigma: float = 0.8
    gamma: tuple[float, float] = (0.7, 1.5)
    intensity: float = 0.15


class DataSection(Section):
    """Where examples come from and how they are cut.

    ``source`` "scans" trains on labelled scans; "brain-labelmaps" synthesises T1 images from a folder of label maps.
    ``labels`` names the classes above background where the data folder does not. ``merge_labels`` makes one class of
    every label above background.
    """

    source: Literal["scans", "brain-labelmaps"] = "scans"
    labels: tuple[str, ...] = ()
    channels: int = Field(1, ge=1)
    window: tuple[PositiveInt, ...]
    foreground_share: float = Field(0.33, ge=0, le=1)
    test_cases: int = Field(40, ge=0)
    validation_cases: int = Field(20, ge=1)
    examples_per_map: int = Field(50, ge=1)
    merge_labels: bool = False

    @model_validator(mode="after")
    def _one_class(self) -> DataSection:
        if self.merge_labels and len(self.labels) != 1:
            raise ValueError(f"merge_labels leaves one class; name it in labels (got {len(self.labels)} names)")
        return self


class TrainingSection(Section):
    """`medseg_diffusion.training.trainer.TrainingOptions`, and how it computes: `medseg_diffusion.training.runtime`."""

    batch_size: int = Field(4, ge=1)
    max_steps: int = Field(10_000, ge=1)
    learning_rate: float = Field(5e-4, gt=0)
    warmup_steps: int = Field(200, ge=0)
    weight_decay: float = Field(1e-4, ge=0)
    ema_decay: float = Field(0.999, ge=0, lt=1)
    gradient_clip: float = Field(1.0, gt=0)
    workers: int = Field(0, ge=0)
    validate_every: int = Field(500, ge=1)
    checkpoint_minutes: float = Field(5.0, gt=0)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    channels_last: bool = False
    compile: bool = False


class InferenceSection(Section):
    """Defaults of sampling, stored in the model; ``window`` None takes the whole image at once.

    ``largest_part`` keeps the largest connected part of the foreground, all classes together: for organs that are one.
    ``shape_prior_mm`` keeps what lies at most so far from the average shape of the training anatomies, registered to
    the prediction (`medseg_diffusion.methods.shape_prior`).
    """

    sampler: Literal["ddpm", "ddim", "dpm++"] = "dpm++"
    steps: int = Field(5, ge=1)
    ensemble: int = Field(1, ge=1)
    window: tuple[PositiveInt, ...] | None = None
    overlap: float = Field(0.25, ge=0, lt=1)
    largest_part: bool = False
    shape_prior_mm: float | None = Field(None, gt=0)


class LabelledDataSection(Section):
    """Labelled images for pixel classifiers; ``labels`` names the classes above background where the folder does not.

    Sides are those of `DataSection` with the same numbers; None takes as many as the generator held out, or those of
    `DataSection` where it does not say. ``pixels_per_class`` are sampled from a labelled case or slice and, among
    them, its ``copies``, which are changed as the augmentation says; 0 as published.
    """

    labels: tuple[str, ...] = ()
    test_cases: int | None = Field(None, ge=0)
    validation_cases: int | None = Field(None, ge=0)
    pixels_per_class: int = Field(1000, ge=20)
    copies: int = Field(0, ge=0)


class FeaturesSection(Section):
    """`medseg_diffusion.methods.activations.Activations`.

    ``blocks`` are numbers of decoder blocks; "auto" takes the published ones, 5, 6, 7, 8 and 12, where the generator
    has them, otherwise those of the finer half of the decoder's resolutions, or the best five of a search among them
    if they have more features than the published ones. ``times`` count from 0.
    """

    times: tuple[int, ...] = Field((50, 150, 250), min_length=1)
    blocks: Literal["auto"] | Annotated[tuple[int, ...], Field(min_length=1)] = "auto"


class PixelClassifierSection(Section):
    """`medseg_diffusion.methods.label_efficient.ClassifierOptions`."""

    members: int = Field(10, ge=1)
    hidden: tuple[int, int] | None = None
    batch_size: int = Field(64, ge=2)
    learning_rate: float = Field(1e-3, gt=0)
    max_epochs: int = Field(100, ge=1)
    min_epochs: int = Field(4, ge=0)
    min_steps: int = Field(1000, ge=0)
    patience: int = Field(50, ge=1)


class LatentHealingSection(Section):
    """`medseg_diffusion.methods.latent_healing.LatentHealing`; ``times`` KL maps are taken between ``earliest`` and
    ``latest``.
    """

    times: int = Field(21, ge=1)
    earliest: int = Field(400, ge=2)
    latest: int = Field(600, ge=2)
    start: int = Field(500, ge=1)
    steps: int = Field(25, ge=1)
    draws: int = Field(1, ge=1)
    quantile: float = Field(0.975, ge=0, lt=1)
    smoothing: float = Field(1.0, ge=0)


class PartialNoiseSection(Section):
    """`medseg_diffusion.methods.partial_noise.PartialNoise`; its noise is that of the generator's training."""

    start: int = Field(250, ge=1)
    steps: int = Field(25, ge=1)
    draws: int = Field(1, ge=1)


class PatchedSection(Section):
    """`medseg_diffusion.methods.patched.Patched`; its patches and noise are those of the generator's training."""

    time: int = Field(500, ge=1)
    draws: int = Field(1, ge=1)


class CounterfactualSection(Section):
    """`medseg_diffusion.methods.counterfactual`: with a classifier's gradient of ``scale``, or with free guidance."""

    start: int = Field(500, ge=1)
    steps: int = Field(50, ge=1)
    scale: float = Field(100.0, ge=0)
    guidance: float = Field(3.0, ge=0)


class PostprocessingSection(Section):
    """What is done to an anomaly map on the model's grid, and to its mask.

    ``median`` is the side of a median filter in voxels (1: none; slices are filtered in their planes). The foreground
    is eroded by ``erosion`` voxels. Connected parts of the mask below ``min_volume_mm3`` are dropped.
    """

    median: int = Field(1, ge=1)
    erosion: int = Field(0, ge=0)
    min_volume_mm3: float = Field(0.0, ge=0)

    @field_validator("median")
    @classmethod
    def _odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError("an even side would shift the map by half a voxel; take an odd one")
        return value


class ImageDataSection(Section):
    """Images as training examples: `medseg_diffusion.data.image_cache`.

    ``size`` is the side of images and of slices of scans; three sides make whole volumes of scans.
    ``test_images`` and ``validation_images`` are held out of collections that name no sides themselves; scans count
    as one each.
    """

    size: int | tuple[int, int, int] = 64
    channels: Literal[1, 3] = 3
    flip: bool = True
    test_images: int = Field(0, ge=0)
    validation_images: int = Field(100, ge=1)

    @property
    def shape(self) -> tuple[int, ...]:
        """The sides of an image, two or three."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    @model_validator(mode="after")
    def _sides(self) -> ImageDataSection:
        if min(self.shape) < 8:
            raise ValueError(f"size must be at least 8, got {self.size}")
        return self


class ImageConditionSection(Section):
    """What conditions a generator.

    ``classes`` says how a class reaches the network; "cross-attention" makes it a token of ``context_channels``.
    ``drop`` is the share of training examples that lose their class, for classifier-free guidance.
    """

    classes: Literal["none", "embedding", "cross-attention"] = "none"
    drop: float = Field(0.1, ge=0, le=1)
    context_channels: int = Field(256, gt=0)


class ImageDiffusionSection(Section):
    """What is predicted and with which loss; "hybrid" and "bound" train a learned variance, and need one.

    ``noise`` "simplex" is AnoDDPM's (`medseg_diffusion.diffusion.simplex`).
    """

    schedule: ScheduleSection = ScheduleSection()
    noise: Literal["gaussian", "simplex"] = "gaussian"
    target: Literal["eps", "x0", "v"] = "eps"
    learned_variance: bool = False
    objective: Literal["simple", "hybrid", "bound"] = "simple"
    times: Literal["uniform", "importance"] = "uniform"
    weighting: Literal["none", "min-snr"] = "none"
    gamma: float = Field(5.0, gt=0)

    @model_validator(mode="after")
    def _variance(self) -> ImageDiffusionSection:
        if self.learned_variance != (self.objective != "simple"):
            raise ValueError("a learned variance needs objective hybrid or bound, and they need learned_variance: true")
        return self


class GeneratorSamplingSection(Section):
    """Defaults of `medseg sample`, stored in the model."""

    sampler: Literal["ddpm", "ddim", "dpm++"] = "ddim"
    steps: int = Field(50, ge=1)


class AutoencoderNetworkSection(Section):
    """An autoencoder whose image channels follow from the data; "vq" has a codebook instead of a variance."""

    quantiser: Literal["kl", "vq"] = "kl"
    codebook_size: int = Field(1024, ge=2)
    latent_channels: int = Field(4, gt=0)
    channels: tuple[int, ...] = (64, 128)
    num_res_blocks: int = Field(2, ge=1)
    attention_levels: tuple[bool, ...] = (False, False)
    norm_groups: int = Field(32, gt=0)


class AutoencoderLossSection(Section):
    """`medseg_diffusion.training.autoencoder.AutoencoderLoss`.

    ``perceptual`` "lpips" needs the weights of its backbone, ``lpips_backbone`` (a torchvision VGG-16 file; None: where
    torchvision keeps its downloads); "gradient-ssim" needs nothing; "auto" takes LPIPS where the weights are.
    """

    perceptual: Literal["auto", "lpips", "gradient-ssim"] = "auto"
    lpips_backbone: str | None = None
    perceptual_weight: float = Field(1.0, ge=0)
    kl_weight: float = Field(1e-6, ge=0)
    adversarial_weight: float = Field(0.5, ge=0)
    adversarial_start: int = Field(50_001, ge=0)
    discriminator_channels: int = Field(64, gt=0)
    discriminator_layers: int = Field(3, ge=1)


class ClassifierNetworkSection(Section):
    """A noisy classifier whose channels, size and classes follow from the data."""

    channels: int = Field(128, gt=0)
    channel_mult: tuple[int, ...] = Field((1, 2, 3, 4), min_length=1)
    num_res_blocks: int = Field(4, ge=1)
    attention_factors: tuple[int, ...] = (2, 4, 8)
    head_channels: int = 64
    dropout: float = Field(0.0, ge=0, lt=1)
    norm_groups: int = Field(32, gt=0)
