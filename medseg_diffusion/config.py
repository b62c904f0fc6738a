"""Run configurations: strict YAML to typed, frozen objects.

A configuration is data: it names no code. Sections mirror the constructors that they feed, and a test compares the
two. An unknown key is refused with its dotted path and the nearest valid one.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import UsageError


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


class ImageEncoderSection(Section):
    """SegDiff's RRDB encoder (`medseg_diffusion.networks.segdiff.SegDiff`)."""

    encoder_channels: int = 64
    encoder_blocks: int = 12
    encoder_growth: int = 32


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
    """What is predicted, and with which loss.

    ``head`` "logits" makes the network emit class logits (target x0) and is needed for ``dice_ce_weight`` > 0.
    ``scale`` is the value of a certain class in x0: below 1 the noise is harder to see through.
    """

    schedule: ScheduleSection = ScheduleSection()
    target: Literal["eps", "x0", "v"] = "x0"
    head: Literal["linear", "logits"] = "linear"
    scale: float = Field(1.0, gt=0)
    weighting: Literal["none", "min-snr"] = "none"
    gamma: float = Field(5.0, gt=0)
    dice_ce_weight: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _logits(self) -> DiffusionSection:
        if self.dice_ce_weight > 0 and self.head != "logits":
            raise ValueError("dice_ce_weight needs head: logits")
        if self.head == "logits" and self.target != "x0":
            raise ValueError("head: logits needs target: x0")
        return self


class PreprocessingSection(Section):
    """`medseg_diffusion.volumes.preprocessing.Preprocessing`."""

    orientation: str | None = "RAS"
    spacing_mm: tuple[float, float, float] | None = None
    intensity: Literal["percentile", "zscore"] = "percentile"
    low: float = 0.5
    high: float = 99.5
    crop_foreground: bool = False


class AugmentationSection(Section):
    """`medseg_diffusion.data.augmentation.Augmentation`."""

    probability: float = Field(0.3, ge=0, le=1)
    rotate_degrees: float = 15.0
    scale: float = 0.15
    flip_axes: tuple[int, ...] = ()
    noise_std: float = 0.1
    blur_sigma: float = 0.8
    gamma: tuple[float, float] = (0.7, 1.5)
    intensity: float = 0.15


class DataSection(Section):
    """Where examples come from and how they are cut.

    ``source`` "scans" trains on labelled scans; "brain-labelmaps" synthesises T1 images from a folder of label maps.
    ``labels`` names the classes above background where the data folder does not.
    """

    source: Literal["scans", "brain-labelmaps"] = "scans"
    labels: tuple[str, ...] = ()
    channels: int = Field(1, ge=1)
    window: tuple[int, ...]
    foreground_share: float = Field(0.33, ge=0, le=1)
    test_cases: int = Field(40, ge=0)
    validation_cases: int = Field(20, ge=1)
    examples_per_map: int = Field(50, ge=1)


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
    """

    sampler: Literal["ddpm", "ddim", "dpm++"] = "dpm++"
    steps: int = Field(5, ge=1)
    ensemble: int = Field(1, ge=1)
    window: tuple[int, ...] | None = None
    overlap: float = Field(0.25, ge=0, lt=1)
    largest_part: bool = False


class SegmenterConfig(Section):
    """A mask segmenter: mask diffusion conditioned by concatenation (EnsemDiff) or SegDiff, or the matched baseline."""

    description: str = ""
    method: Literal["ensemdiff", "segdiff", "baseline"]
    data: DataSection
    preprocessing: PreprocessingSection = PreprocessingSection()
    augmentation: AugmentationSection = AugmentationSection()
    network: UNetSection = UNetSection()
    image_encoder: ImageEncoderSection = ImageEncoderSection()
    diffusion: DiffusionSection = DiffusionSection()
    training: TrainingSection = TrainingSection()
    inference: InferenceSection = InferenceSection()

    @model_validator(mode="after")
    def _dimensions(self) -> SegmenterConfig:
        for name, window in (("data.window", self.data.window), ("inference.window", self.inference.window)):
            if window is not None and len(window) != self.network.dims:
                raise ValueError(f"{name} has {len(window)} numbers, but network.dims is {self.network.dims}")
        return self


class DenoiserConfig(Section):
    """A denoiser of images or latents: what a model card holds of it."""

    network: DenoiserUNetSection
    schedule: ScheduleSection = ScheduleSection()
    target: Literal["eps", "x0", "v"] = "eps"
    learned_variance: bool = False


class ClassifierConfig(Section):
    """A classifier of noisy images, and the schedule of the model that it guides."""

    network: NoisyClassifierSection
    schedule: ScheduleSection = ScheduleSection()


class AutoencoderConfig(Section):
    """An autoencoder of images."""

    network: AutoencoderSection


def presets() -> dict[str, Path]:
    """The configurations that come with the package, by name."""
    folder = Path(str(resources.files("medseg_configs")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_config(name_or_path: str | Path, overrides: Sequence[str] = ()) -> SegmenterConfig:
    """Reads a preset or a YAML file, with overrides "a.b=value" (value in YAML).

    Raises:
        UsageError: unknown preset or file, bad YAML, an unknown key (with the nearest known one) or a bad value.
    """
    path = Path(name_or_path)
    if not path.is_file():
        known = presets()
        if str(name_or_path) not in known:
            raise UsageError(
                f"{name_or_path}: no such file and no preset of that name{_nearest(str(name_or_path), known)}"
            )
        path = known[str(name_or_path)]
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not YAML ({' '.join(str(error).split())}); correct the file") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path}: holds {type(content).__name__}, expected sections such as data: and network:")
    for override in overrides:
        _override(content, override)
    return parse_config(content, str(path))


def parse_config(content: Mapping[str, Any], source: str) -> SegmenterConfig:
    """A configuration from plain types, e.g. that of a model card; errors name ``source`` and the dotted key."""
    try:
        return SegmenterConfig.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            names = _fields(first["loc"][:-1])
            raise UsageError(f"{source}: unknown key {key}{_nearest(str(first['loc'][-1]), names)}") from error
        raise UsageError(f"{source}: {key or 'configuration'}: {first['msg']} (got {first['input']!r})") from error


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """Settings "name=value" with values in YAML; UsageError for anything else."""
    content: dict[str, Any] = {}
    for setting in settings:
        _override(content, setting)
    return content


def _override(content: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise UsageError(f"--set {override}: expected a.b=value")
    node: Any = content
    *parents, last = key.split(".")
    for part in parents:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise UsageError(f"--set {override}: {part} is a value, not a section")
    try:
        node[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"--set {override}: {text!r} is not YAML") from error


def _fields(location: Sequence[int | str]) -> Sequence[str]:
    section: Any = SegmenterConfig
    for part in location:
        section = section.model_fields[str(part)].annotation
    return list(section.model_fields)


def _nearest(name: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"
