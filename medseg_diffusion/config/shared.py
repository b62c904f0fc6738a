"""Sections that several configurations share. Each mirrors a constructor, and a test compares the two."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)


class Section(BaseModel):
    """Base of all sections: no unknown keys, no changes after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Code = tuple[
    Annotated[str, Field(min_length=1, max_length=16)],
    Annotated[str, Field(min_length=1, max_length=16)],
    Annotated[str, Field(min_length=1, max_length=64)],
]
"""Value, scheme and meaning of a code of DICOM, such as [39607008, SCT, Lung]; SCT is SNOMED CT."""


class ClassCodesSection(Section):
    """What a class means, for DICOM segmentations (`medseg_diffusion.volumes.dicom_seg.Segment`)."""

    model_config = ConfigDict(coerce_numbers_to_str=True)  # YAML reads the values of SNOMED CT as numbers

    category: Code
    type: Code
    modifiers: tuple[Code, ...] = ()
    region: Code | None = None


def warn_of_unused(codes: Mapping[str, ClassCodesSection], classes: Collection[str]) -> None:
    """Warn of codes without a class: a preset keeps its codes where its classes are renamed."""
    if unused := [name for name in codes if name not in classes]:
        warnings.warn(
            f"data.codes of {', '.join(unused)} have no effect: the classes are {', '.join(classes)}",
            stacklevel=2,
        )


class UNetSection(Section):
    """Settings of `medseg_diffusion.networks.unet.UNet`; channels in and out and conditions follow from the task."""

    dims: Literal[2, 3] = 3
    channels: int = Field(32, gt=0)
    channel_mult: tuple[PositiveInt, ...] = Field((1, 2, 3), min_length=1)
    num_res_blocks: PositiveInt | tuple[PositiveInt, ...] = 1
    attention_factors: tuple[PositiveInt, ...] = ()
    head_channels: int = Field(32, ge=1)
    num_heads: int | None = Field(None, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    resampling: Literal["resblock", "conv", "plain"] = "resblock"
    patch_size: int = Field(1, ge=1)
    checkpointing: bool = False
    scale_shift: bool = True
    norm_eps: float = Field(1e-5, gt=0)
    norm_groups: int = Field(32, gt=0)
    middle_attention: bool | None = None
    out_width: PositiveInt | None = None


SamplerName = Literal["ddpm", "ddim", "dpm++", "euler", "heun"]
"""Name of a sampler (`medseg_diffusion.build.SAMPLERS`)."""


class ScheduleSection(Section):
    """Noise schedule by name, with T. The last noise level of "rectified-flow" is pure noise.

    ``beta_start`` and ``beta_end`` apply to linear and scaled-linear schedules; None takes the published values.
    """

    name: Literal["linear", "cosine", "scaled-linear", "sigmoid", "rectified-flow"] = "linear"
    num_steps: int = Field(1000, ge=2)
    beta_start: float | None = Field(None, gt=0, lt=1)
    beta_end: float | None = Field(None, gt=0, lt=1)

    @model_validator(mode="after")
    def _ends(self) -> ScheduleSection:
        if (self.beta_start, self.beta_end) != (None, None) and self.name not in ("linear", "scaled-linear"):
            raise ValueError(f"a {self.name} schedule has no beta_start and beta_end")
        return self

    def require_x0(self, target: str) -> None:
        """Refuse a target from which x0 does not follow at every time, with a ValueError."""
        if self.name == "rectified-flow" and target == "eps":
            raise ValueError(
                "target: eps gives no image at the last time of schedule rectified-flow, which is pure noise; "
                "set target to flow, v or x0"
            )


class PreprocessingSection(Section):
    """Settings of `medseg_diffusion.volumes.preprocessing.Preprocessing`."""

    orientation: str | None = "RAS"
    spacing_mm: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None
    intensity: Literal["percentile", "zscore", "median"] = "percentile"
    low: float = 0.5
    high: float = 99.5
    crop_foreground: bool = False
    crop_centre: tuple[PositiveInt, PositiveInt] | None = None
    size: tuple[PositiveInt, PositiveInt] | None = None

    @model_validator(mode="after")
    def _one_grid(self) -> PreprocessingSection:
        if self.size is not None and self.spacing_mm is not None:
            raise ValueError("size and spacing_mm exclude each other")
        if self.crop_centre is not None and self.crop_foreground:
            raise ValueError("crop_centre and crop_foreground exclude each other")
        axes = None if self.orientation is None else sorted(self.orientation.translate(str.maketrans("LPI", "RAS")))
        if axes not in (None, ["A", "R", "S"]):
            raise ValueError(f"orientation: names one of R/L, A/P and S/I each, such as RAS; got {self.orientation}")
        return self


class AugmentationSection(Section):
    """Settings of `medseg_diffusion.data.augmentation.Augmentation`."""

    probability: float = Field(0.3, ge=0, le=1)
    rotate_degrees: float = 15.0
    scale: float = 0.15
    flip_axes: tuple[NonNegativeInt, ...] = ()
    noise_std: float = 0.1
    blur_sigma: float = 0.8
    gamma: tuple[float, float] = (0.7, 1.5)
    intensity: float = 0.15


class TrainingSection(Section):
    """Settings of `medseg_diffusion.training.trainer.TrainingOptions` and `medseg_diffusion.training.runtime`."""

    batch_size: int = Field(4, ge=1)
    examples_at_once: int | None = Field(None, ge=1)
    max_steps: int = Field(10_000, ge=1)
    learning_rate: float = Field(5e-4, gt=0)
    warmup_steps: int = Field(200, ge=0)
    decay: Literal["polynomial", "linear", "constant"] = "polynomial"
    weight_decay: float = Field(1e-4, ge=0)
    ema_decay: float = Field(0.999, ge=0, lt=1)
    gradient_clip: float = Field(1.0, gt=0)
    workers: int = Field(0, ge=0)
    validate_every: int = Field(500, ge=1)
    read_every: int = Field(10, ge=1)
    checkpoint_minutes: float = Field(5.0, gt=0)
    checkpoint_steps: int = Field(0, ge=0)
    checkpoints_kept: int = Field(2, ge=1)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    channels_last: bool = False
    compile: bool = False
    sharding: bool = False
    trackers: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = ()


class InferenceSection(Section):
    """Defaults of sampling, stored in the model; ``window`` None takes the whole image at once.

    ``largest_part`` keeps only the largest connected part of the foreground, all classes together, for organs in one
    piece. ``shape_prior_mm`` drops voxels that are farther than this from the average shape of the training anatomies,
    which is registered to the prediction (`medseg_diffusion.methods.shape_prior`).
    """

    sampler: SamplerName = "dpm++"
    steps: int = Field(5, ge=1)
    ensemble: int = Field(1, ge=1)
    window: tuple[PositiveInt, ...] | None = None
    overlap: float = Field(0.25, ge=0, lt=1)
    largest_part: bool = False
    shape_prior_mm: float | None = Field(None, gt=0)
