"""Configurations of imported networks, as model cards store them."""

from __future__ import annotations

from typing import Literal

from pydantic import (
    Field,
    model_validator,
)

from .shared import ScheduleSection, Section, UNetSection


class DenoiserUNetSection(UNetSection):
    """All settings of the U-Net of an imported denoiser, including those that a task would otherwise decide."""

    in_channels: int = Field(gt=0)
    out_channels: int = Field(gt=0)
    num_classes: int | None = None
    context_channels: int | None = None
    transformer_depth: int = 1


class NoisyClassifierSection(Section):
    """Settings of `medseg_diffusion.networks.noisy_classifier.NoisyClassifier`."""

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
    """Settings of `medseg_diffusion.networks.autoencoder.KLAutoencoder`."""

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


class DenoiserConfig(Section):
    """An imported denoiser of images or latents."""

    network: DenoiserUNetSection
    schedule: ScheduleSection = ScheduleSection()
    target: Literal["eps", "x0", "v"] = "eps"
    learned_variance: bool = False

    @model_validator(mode="after")
    def _x0(self) -> DenoiserConfig:
        self.schedule.require_x0(self.target)
        return self


class ClassifierConfig(Section):
    """An imported classifier of noisy images, and the schedule of the model that it guides."""

    network: NoisyClassifierSection
    schedule: ScheduleSection = ScheduleSection()


class AutoencoderConfig(Section):
    """An imported autoencoder of images."""

    network: AutoencoderSection
