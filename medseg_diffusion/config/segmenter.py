"""Configuration of mask segmenters."""

from __future__ import annotations

from typing import Literal

from pydantic import (
    Field,
    PositiveInt,
    model_validator,
)

from .shared import (
    AugmentationSection,
    ClassCodesSection,
    InferenceSection,
    PreprocessingSection,
    ScheduleSection,
    Section,
    TrainingSection,
    UNetSection,
)

SegmenterMethod = Literal[
    "ensemdiff",
    "segdiff",
    "medsegdiff",
    "medsegdiff-v2",
    "latent-mask",
    "categorical",
    "baseline",
    "probabilistic-unet",
]


class ImageEncoderSection(Section):
    """SegDiff's RRDB encoder (`medseg_diffusion.networks.segdiff.SegDiff`)."""

    encoder_channels: int = Field(64, ge=1)
    encoder_blocks: int = Field(12, ge=1)
    encoder_growth: int = Field(32, ge=1)


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
    """Latent mask diffusion: the autoencoder of masks (`tasks.latent_mask`), and an image encoder of the same layout.

    ``features`` is the number of channels of the encoded image. The autoencoder trains for ``max_steps`` before the
    denoiser.
    """

    latent_channels: int = Field(4, gt=0)
    channels: tuple[PositiveInt, ...] = Field((32, 64), min_length=1)
    num_res_blocks: int = Field(1, ge=1)
    features: int = Field(32, gt=0)
    kl_weight: float = Field(1e-6, ge=0)
    norm_groups: int = Field(8, gt=0)
    max_steps: int = Field(1000, ge=1)
    learning_rate: float = Field(1e-3, gt=0)


class ProbabilisticUNetSection(Section):
    """Probabilistic U-Net (`medseg_diffusion.networks.probabilistic_unet`), of ``features`` channels before its head.

    ``beta`` is the weight of the divergence between posterior and prior.
    """

    features: int = Field(32, gt=0)
    latent_channels: int = Field(6, gt=0)
    layers: int = Field(3, ge=1)
    beta: float = Field(1.0, gt=0)


class FeedForwardSection(Section):
    """The feed-forward baseline (`medseg_diffusion.tasks.mask.FeedForward`).

    ``loss`` "cross-entropy" leaves Dice out, so that the probabilities are honest. With ``members`` "pixels" every
    member draws each pixel's class from its probabilities, on its own. With "equal" nothing is drawn: the members of an
    ensemble are mirrored and jittered passes (`medseg_diffusion.tasks.jitter`).
    """

    loss: Literal["dice-cross-entropy", "cross-entropy"] = "dice-cross-entropy"
    members: Literal["equal", "pixels"] = "equal"


class FinderSection(Section):
    """A small network that finds the organ on a coarse grid (`medseg_diffusion.models.finder.Finder`).

    It is trained first, with windows of ``window`` voxels of ``spacing_mm``. The segmenter then trains on, and sees,
    the box of the organ with ``margin_mm`` around it, and its intensities are scaled by this box.
    """

    spacing_mm: float = Field(4.0, gt=0)
    window: tuple[PositiveInt, PositiveInt, PositiveInt] = (48, 48, 48)
    margin_mm: float = Field(12.0, ge=0)
    network: UNetSection = UNetSection()
    batch_size: int = Field(4, ge=1)
    max_steps: int = Field(2000, ge=1)
    learning_rate: float = Field(1e-3, gt=0)


class DiffusionSection(Section):
    """The predicted quantity, the loss and the times of a mask diffusion model.

    ``learned_variance`` adds the loss of the variance (hybrid objective). With ``head`` "logits" the network emits
    class logits (target x0), which ``dice_ce_weight`` and ``cross_entropy_weight`` need. ``scale`` is the value of a
    certain class in x0, and the standard deviation of latents. The smaller it is, the harder the mask is to see through
    the noise. With ``normalised`` the network sees x_t divided by its standard deviation.

    Cross-entropy of x0 given x_t is minimised by the true probabilities at every time. Dice is not: its minimum is one
    mask, also where several are possible. ``dice_ce_log_snr`` keeps Dice + cross-entropy from the times at which x_t
    chooses between masks (`tasks.mask.auxiliary_weight`). Times are drawn, and steps spaced,
    where log(scale^2 alpha^2 / sigma^2) lies in ``log_snr`` (`diffusion.mask_noise`; for labels it is that of
    `diffusion.categorical.label_noise`). Categorical diffusion has the
    schedule and ``cross_entropy_weight``, beside the variational bound. ``target`` "flow", ``times``, ``times_mean``
    and ``times_std`` are as in a generator (`ImageDiffusionSection`).
    """

    schedule: ScheduleSection = ScheduleSection()
    target: Literal["eps", "x0", "v", "flow"] = "x0"
    head: Literal["linear", "logits"] = "linear"
    scale: float = Field(1.0, gt=0)
    normalised: bool = True
    weighting: Literal["none", "min-snr"] = "none"
    gamma: float = Field(5.0, gt=0)
    dice_ce_weight: float = Field(0.0, ge=0)
    dice_ce_log_snr: float | None = None
    log_snr: tuple[float, float] | None = None
    times: Literal["uniform", "logit-normal"] = "uniform"
    times_mean: float = Field(0.0, ge=-10, le=10)
    times_std: float = Field(1.0, gt=0, le=10)
    learned_variance: bool = False
    cross_entropy_weight: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _logits(self) -> DiffusionSection:
        if self.learned_variance and self.head == "logits":
            raise ValueError("head: logits has no learned_variance")
        if self.dice_ce_weight > 0 and self.head != "logits":
            raise ValueError("dice_ce_weight needs head: logits")
        if self.dice_ce_log_snr is not None and self.dice_ce_weight == 0:
            raise ValueError("dice_ce_log_snr needs a positive dice_ce_weight")
        if self.log_snr is not None and not self.log_snr[0] < self.log_snr[1]:
            raise ValueError(f"log_snr: the first bound must be the smaller one, got {self.log_snr}")
        if self.head == "logits" and self.target != "x0":
            raise ValueError("head: logits needs target: x0")
        if self.times == "logit-normal" and self.learned_variance:
            raise ValueError("times: logit-normal has no learned_variance, whose bound needs all times alike")
        self.schedule.require_x0(self.target)
        return self


class DataSection(Section):
    """Source of the training examples, and how windows are cut from them.

    ``source`` "scans" trains on labelled scans; "brain-labelmaps" synthesises T1 images from a folder of label maps,
    of which ``brain_classes`` tells apart 3 "tissues" or 30 "structures".
    ``labels`` names the classes above background if the data folder does not. ``merge_labels`` merges all labels above
    background into one class. ``codes`` says what classes mean, by their names. ``test_cases``, ``validation_cases``
    and ``calibration_cases`` are numbers of patients. Without patients to calibrate on, volumes have no intervals
    (`methods.calibration`).
    """

    source: Literal["scans", "brain-labelmaps"] = "scans"
    labels: tuple[str, ...] = ()
    codes: dict[str, ClassCodesSection] = Field(default_factory=dict)
    channels: int = Field(1, ge=1)
    window: tuple[PositiveInt, ...]
    foreground_share: float = Field(0.33, ge=0, le=1)
    test_cases: int = Field(40, ge=0)
    validation_cases: int = Field(20, ge=1)
    calibration_cases: int = Field(0, ge=0)
    examples_per_map: int = Field(50, ge=1)
    brain_classes: Literal["tissues", "structures"] = "tissues"
    merge_labels: bool = False

    @model_validator(mode="after")
    def _one_class(self) -> DataSection:
        if self.merge_labels and len(self.labels) != 1:
            raise ValueError(f"merge_labels leaves one class; name it in labels (got {len(self.labels)} names)")
        if self.source == "brain-labelmaps" and self.calibration_cases:
            raise ValueError("calibration_cases is for labelled scans; use calibrate-segmenter after the training")
        return self


class SegmenterConfig(Section):
    """A segmenter: mask diffusion with one of four networks, of labels, or in latents; or one without diffusion.

    "ensemdiff" and "categorical", which diffuses labels, concatenate the image to the mask. The references have the
    same backbone: the feed-forward "baseline" and "probabilistic-unet". ``image_encoder`` is for SegDiff,
    ``dynamic_encoding`` for MedSegDiff, ``semantic_condition`` and ``anchor_loss`` are for MedSegDiff-V2,
    ``mask_autoencoder`` is for "latent-mask", ``feed_forward`` for "baseline", ``finder`` for label maps of the head.
    """

    description: str = ""
    method: SegmenterMethod
    data: DataSection
    preprocessing: PreprocessingSection = PreprocessingSection()
    augmentation: AugmentationSection = AugmentationSection()
    network: UNetSection = UNetSection()
    image_encoder: ImageEncoderSection = ImageEncoderSection()
    dynamic_encoding: DynamicEncodingSection = DynamicEncodingSection()
    semantic_condition: SemanticConditionSection = SemanticConditionSection()
    anchor_loss: AnchorLossSection = AnchorLossSection()
    mask_autoencoder: MaskAutoencoderSection = MaskAutoencoderSection()
    probabilistic_unet: ProbabilisticUNetSection = ProbabilisticUNetSection()
    feed_forward: FeedForwardSection = FeedForwardSection()
    finder: FinderSection | None = None
    diffusion: DiffusionSection = DiffusionSection()
    training: TrainingSection = TrainingSection()
    inference: InferenceSection = InferenceSection()

    @model_validator(mode="after")
    def _dimensions(self) -> SegmenterConfig:
        for name, window in (("data.window", self.data.window), ("inference.window", self.inference.window)):
            if window is not None and len(window) != self.network.dims:
                raise ValueError(f"{name} has {len(window)} numbers, but network.dims is {self.network.dims}")
        if wrong := [axis for axis in self.augmentation.flip_axes if axis >= self.network.dims]:
            raise ValueError(f"augmentation.flip_axes: no axis {wrong[0]} in {self.network.dims}D")
        if self.preprocessing.size is not None and self.network.dims != 2:
            raise ValueError("preprocessing.size resizes 2D images, but network.dims is 3")
        if self.preprocessing.crop_centre is not None and self.network.dims != 2:
            raise ValueError("preprocessing.crop_centre crops 2D images, but network.dims is 3")
        if self.finder is not None and self.data.source != "brain-labelmaps":
            raise ValueError("finder is trained on label maps of the head: it needs data.source: brain-labelmaps")
        if self.finder is not None and self.finder.network.dims != 3:
            raise ValueError("finder.network.dims must be 3")
        if self.finder is not None and self.preprocessing.crop_foreground:
            raise ValueError("finder finds the box; set preprocessing.crop_foreground: false")
        if self.finder is not None and self.training.sharding:
            raise ValueError("training.sharding is not for a segmenter with a finder, which is trained alone first")
        if self.method == "latent-mask" and self.training.sharding:
            raise ValueError(
                "training.sharding is not for method: latent-mask, whose autoencoder is trained alone first"
            )
        if self.method == "latent-mask" and self.diffusion.head == "logits":
            raise ValueError("latents have no head: logits and no dice_ce_weight")
        logits = self.method == "categorical" or self.diffusion.head == "logits"
        if self.diffusion.cross_entropy_weight > 0 and not logits:
            raise ValueError("diffusion.cross_entropy_weight needs head: logits or method: categorical")
        if self.diffusion.log_snr is not None and self.method == "latent-mask":
            raise ValueError("diffusion.log_snr is for masks, not for their latents")
        if self.method == "categorical" and self.inference.sampler != "ddpm":
            raise ValueError("method: categorical has one sampler; set inference.sampler: ddpm")
        if self.method == "categorical" and self.diffusion.times != "uniform":
            raise ValueError("diffusion.times: method: categorical trains a bound, which needs all times alike")
        return self

    @property
    def samples_masks(self) -> bool:
        """Whether the members of an ensemble are drawn, so that they can differ."""
        return self.method != "baseline" or self.feed_forward.members == "pixels"
