"""The one place where names become objects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .checkpoint import SavedModel
from .config import ScheduleSection, SegmenterConfig, parse_config
from .data.augmentation import Augmentation
from .diffusion import schedule
from .diffusion.denoiser import Head, NetworkDenoiser
from .diffusion.objective import Simple
from .diffusion.schedule import NoiseSchedule
from .errors import ModelError, UsageError
from .networks.segdiff import SegDiff
from .networks.unet import UNet
from .sampling.ddim import DDIM
from .sampling.ddpm import DDPM
from .sampling.dpm_solver import DPMSolver
from .sampling.loop import Sampler
from .tasks.mask import FeedForward, MaskDiffusion, MaskEncoding
from .training.trainer import TrainingOptions
from .volumes.preprocessing import Preprocessing

SCHEDULES: dict[str, Callable[..., NoiseSchedule]] = {
    "linear": schedule.linear,
    "cosine": schedule.cosine,
    "scaled-linear": schedule.scaled_linear,
    "sigmoid": schedule.sigmoid,
}
SAMPLERS: dict[str, type[Any]] = {"ddpm": DDPM, "ddim": DDIM, "dpm++": DPMSolver}

ARITHMETIC = ("precision", "channels_last", "compile")
"""Keys of the training section that say how to compute, not what."""

Segmenter = MaskDiffusion | FeedForward


def noise_schedule(section: ScheduleSection) -> NoiseSchedule:
    """The noise schedule of a configuration; UsageError if its betas are impossible."""
    try:
        ends = {name: getattr(section, name) for name in ("beta_start", "beta_end")}
        given = {name: value for name, value in ends.items() if value is not None}
        return SCHEDULES[section.name](section.num_steps, **given)
    except ValueError as error:
        raise UsageError(f"schedule: {error}") from error


def sampler(name: str) -> Sampler:
    """The sampler of a command-line name."""
    if name not in SAMPLERS:
        raise UsageError(f"sampler {name!r} is unknown; use {', '.join(SAMPLERS)}")
    made: Sampler = SAMPLERS[name]()
    return made


def preprocessing(config: SegmenterConfig) -> Preprocessing:
    """The preprocessing of a configuration."""
    try:
        return Preprocessing(**config.preprocessing.model_dump())
    except ValueError as error:
        raise UsageError(f"preprocessing: {error}") from error


def augmentation(config: SegmenterConfig) -> Augmentation:
    """The augmentation of a configuration."""
    return Augmentation(**config.augmentation.model_dump())


def training_options(config: SegmenterConfig) -> TrainingOptions:
    """The optimisation of a configuration."""
    return TrainingOptions(**config.training.model_dump(exclude=set(ARITHMETIC)))


def segmenter(config: SegmenterConfig, num_classes: int) -> Segmenter:
    """The untrained model of a configuration for ``num_classes`` classes, background included."""
    section = config.diffusion
    encoding = MaskEncoding(num_classes, section.scale)
    image_channels = config.data.channels
    options = config.network.model_dump()
    try:
        if config.method == "baseline":
            return FeedForward(UNet(in_channels=image_channels, out_channels=encoding.channels, **options), encoding)
        network: nn.Module
        if config.method == "segdiff":
            unet = UNet(in_channels=encoding.channels, out_channels=encoding.channels, **options)
            network = SegDiff(unet, image_channels, **config.image_encoder.model_dump())
        else:
            network = UNet(in_channels=encoding.channels + image_channels, out_channels=encoding.channels, **options)
    except ValueError as error:
        raise UsageError(f"network: {error}") from error
    logits: Head = "sigmoid" if encoding.channels == 1 else "softmax"
    denoiser = NetworkDenoiser(
        network,
        noise_schedule(section.schedule),
        section.target,
        head=logits if section.head == "logits" else "linear",
        scale=section.scale,
    )
    return MaskDiffusion(denoiser, encoding, Simple(section.weighting, section.gamma), section.dice_ce_weight)


def restore_segmenter(saved: SavedModel) -> tuple[Segmenter, SegmenterConfig]:
    """The trained model of a model directory, in evaluation mode on the CPU, and its configuration.

    Raises:
        ModelError: a card or weights that do not describe a segmenter of this version.
    """
    try:
        config = parse_config(saved.card["config"], str(saved.path / "model.json"))
        model = segmenter(config, len(saved.card["labels"]))
        with torch.no_grad():
            model.load_state_dict(saved.weights)
    except (KeyError, UsageError, RuntimeError) as error:
        raise ModelError(
            f"{saved.path}: not a segmenter of this version ({str(error).splitlines()[0]}); "
            "use a model made by train-segmenter"
        ) from error
    return model.eval(), config
