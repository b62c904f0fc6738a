"""Trained segmenters in memory: model directories to objects that make masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from medseg_diffusion import build
from medseg_diffusion.build import SHAPE_PRIOR, Segmenter
from medseg_diffusion.config.load import parse_config
from medseg_diffusion.config.pixel_classifier import PixelClassifierConfig
from medseg_diffusion.config.segmenter import SegmenterConfig
from medseg_diffusion.config.shared import InferenceSection
from medseg_diffusion.errors import InputError, ModelError, UsageError
from medseg_diffusion.methods.activations import Activations
from medseg_diffusion.methods.label_efficient import PixelSegmentation
from medseg_diffusion.methods.shape_prior import ShapePrior
from medseg_diffusion.networks.pixel_classifier import PixelClassifiers
from medseg_diffusion.tasks.image import ImageDiffusion
from medseg_diffusion.volumes.paths import is_image
from medseg_diffusion.volumes.preprocessing import Placement, Preprocessing
from medseg_diffusion.volumes.volume import Volume

from .generator import Generator, restore_generator
from .store import SavedModel

GENERATOR = "generator."
"""Prefix of the generator's weights in a model of pixel classifiers; its card is the entry "generator"."""


def restore_segmenter(saved: SavedModel) -> tuple[Segmenter, SegmenterConfig]:
    """The trained mask-diffusion model or baseline of a model directory, on the CPU, and its configuration.

    Raises:
        ModelError: a card or weights that do not describe such a segmenter of this version.
    """
    try:
        config = parse_config(saved.card["config"], str(saved.path / "model.json"))
        if not isinstance(config, SegmenterConfig):
            raise UsageError(f"a {config.method}, which is not made by train-segmenter")
        model = build.segmenter(config, len(saved.card["labels"]))
        with torch.no_grad():
            model.load_state_dict({k: v for k, v in saved.weights.items() if k != SHAPE_PRIOR})
    except (KeyError, UsageError, RuntimeError) as error:
        raise _unusable(saved, error, "train-segmenter") from error
    return model.eval(), config


def restore_pixel_segmentation(saved: SavedModel) -> tuple[PixelSegmentation, PixelClassifierConfig, Generator]:
    """The trained pixel classifiers of a model directory with their generator, on the CPU, and its configuration.

    Raises:
        ModelError: a card or weights that do not describe such a model of this version.
    """
    try:
        config = parse_config(saved.card["config"], str(saved.path / "model.json"))
        if not isinstance(config, PixelClassifierConfig):
            raise UsageError(f"a {config.method}, which is not made by train-pixel-classifier")
        own = {name: value for name, value in saved.weights.items() if not name.startswith(GENERATOR)}
        inner = {name.removeprefix(GENERATOR): v for name, v in saved.weights.items() if name.startswith(GENERATOR)}
        generator = restore_generator(SavedModel(saved.path, saved.card["generator"], inner, saved.sha256))
        activations = pixel_activations(generator, config, saved.card["blocks"])
        members, features = config.classifier.members, len(own["mean"])
        classifiers = PixelClassifiers(members, features, len(saved.card["labels"]), config.classifier.hidden)
        classifiers.load_state_dict(own)
    except (KeyError, UsageError, RuntimeError) as error:
        raise _unusable(saved, error, "train-pixel-classifier") from error
    data = generator.config.data
    model = PixelSegmentation(activations, classifiers, data.shape, data.channels)
    return model.requires_grad_(False).eval(), config, generator


def pixel_activations(generator: Generator, config: PixelClassifierConfig, blocks: list[str]) -> Activations:
    """The activations of a generator, on its device, that pixel classifiers of this configuration see.

    Raises:
        UsageError: a block or a time that the generator does not have.
        ModelError: a generator of another kind.
    """
    task, precision = cast(ImageDiffusion, generator.task), generator.config.training.precision
    found = Activations(task, generator.codec, generator.shape, config.features.times, blocks, precision=precision)
    return found.to(generator.device)  # where the task is, and not yet the noise


@dataclass(frozen=True)
class GeneratorPreprocessing(Preprocessing):
    """What a generator was trained on: scans as configured; of image files black to white, as [-1, 1], in 8 bits."""

    def apply(self, volume: Volume) -> tuple[Tensor, Placement]:
        if not is_image(volume.source or ""):
            return super().apply(volume)
        _, placement = Preprocessing("LAS").apply(volume)  # `volumes.fitting` turns these axes to the picture's
        lowest, highest = float(volume.data.min()), float(volume.data.max())
        # As `data.images` takes levels whose depth the file does not state.
        white = volume.header.white or (255 if highest <= 255 else 65535)
        if lowest < 0 or highest > white or not bool((volume.data == volume.data.round()).all()):
            raise InputError(
                volume.source,
                f"levels from {lowest:g} to {highest:g}",
                "whole levels of 8 or 16 bits, as the generator was trained on",
                "convert the image",
            )
        return placement.forward((volume.data * (255 / white)).round() / 127.5 - 1), placement


def pixel_preprocessing(generator: Generator) -> Preprocessing:
    """What is done to images before pixel classifiers of the generator see them."""
    config = generator.config
    return GeneratorPreprocessing(**vars(build.image_preprocessing(config.preprocessing, config.data.shape)))


def pixel_inference(generator: Generator, config: PixelClassifierConfig) -> InferenceSection:
    """How a scan is cut for pixel classifiers: slices as a whole, volumes in windows of the generator's size."""
    shape = generator.config.data.shape
    window = shape if len(shape) == 3 else None
    members = config.classifier.members
    return InferenceSection(steps=1, ensemble=members, window=window, largest_part=config.largest_part)


def shape_prior(saved: SavedModel) -> ShapePrior | None:
    """The shape prior of a model directory, None if it has none."""
    if SHAPE_PRIOR not in saved.weights:
        return None
    return ShapePrior(saved.weights[SHAPE_PRIOR].float() / 255, float(saved.card[SHAPE_PRIOR]["spacing_mm"]))


def _unusable(saved: SavedModel, error: Exception, command: str) -> ModelError:
    reason = str(error).splitlines()[0]
    return ModelError(f"{saved.path}: not a segmenter of this version ({reason}); use a model made by {command}")
