"""Segmenters that classify pixels from a generator's activations (label-efficient segmentation)."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from medseg_diffusion import build
from medseg_diffusion.config.pixel_classifier import PixelClassifierConfig
from medseg_diffusion.config.shared import InferenceSection
from medseg_diffusion.errors import InputError, UsageError
from medseg_diffusion.methods.ablation import Replacement
from medseg_diffusion.methods.activations import Activations
from medseg_diffusion.methods.label_efficient import PixelSegmentation
from medseg_diffusion.methods.windows import Windows
from medseg_diffusion.networks.pixel_classifier import PixelClassifiers
from medseg_diffusion.sampling.ddim import DDIM
from medseg_diffusion.tasks.image import ImageDiffusion
from medseg_diffusion.volumes.paths import is_image
from medseg_diffusion.volumes.preprocessing import Box, Placement, Preprocessing
from medseg_diffusion.volumes.volume import Volume

from .classes import classes_of, tissues_of
from .doubts import stored_seen
from .ensemble_segmenter import EnsembleSegmenter
from .generator import Generator, restore_generator
from .passes import Pass
from .restore import ready, typed_config, usable
from .segmentation import NOT_FASTER, Aggregation, EnsembleOptions
from .store import SavedModel

GENERATOR = "generator"
"""Name of the generator among the parts of the model (`SavedModel.part`)."""


class PixelSegmenter(EnsembleSegmenter):
    """Trained pixel classifiers with their generator (`SegmentationModel`). The classifiers form the ensemble.

    Args:
        saved: The model directory.
        device: Device of the computation.
        options: Options of the ensemble; steps and sampler must be None, because nothing is sampled.

    Raises:
        ModelError: Not a model of pixel classifiers of this version.
        UsageError: Steps or a sampler.
    """

    samplers: tuple[str, ...] = ()
    sampler_name, num_steps = "", 1
    samples_masks = False
    merge_labels = False
    smaller_windows = False  # every window is brought to the size of the generator's images

    def __init__(self, saved: SavedModel, device: torch.device, options: EnsembleOptions = EnsembleOptions()) -> None:
        if (options.steps, options.sampler) != (None, None):
            raise UsageError(f"{saved.path}: classifies pixels and samples nothing: leave --steps and --sampler out")
        self.saved, self.device = saved, device
        self.seen = stored_seen(saved)
        self.model, self.config, generator = restore_pixel_segmentation(saved)
        self.model.to(device)
        self.dims = len(generator.config.data.shape)
        self.channels = len(saved.card["channels"])  # of the scans, which may be grey for a generator of colour images
        self.labels, groups = classes_of(saved.card), None
        if options.tissues:
            self.labels, groups = tissues_of(saved.card, saved.name)
        self.preprocessing = pixel_preprocessing(generator)
        self.inference = pixel_inference(generator, self.config)
        self.ensemble = options.ensemble or self.inference.ensemble
        # The classifiers share the activations, which take nearly all of the time: fewer of them would not be faster.
        self.notes: list[str] = [NOT_FASTER] if options.fast else []
        # Activations need much more memory than samples of masks.
        batch_size = 1 if device.type == "cpu" else 4
        windows = Windows(self.inference.window, self.inference.overlap, batch_size)
        precision = generator.config.training.precision
        self.way = Pass(DDIM(), [1, 0], windows, self.dims, precision, together=True, groups=groups)
        largest_part = self.inference.largest_part if options.keep_largest is None else options.keep_largest
        self.aggregation = Aggregation(self.labels, options.fusion, options.uncertainty, largest_part)

    def without_x_t(self, replacement: Replacement, seed: int = 0) -> AbstractContextManager[None]:
        raise ValueError(f"{self.saved.path}: classifies pixels, so it has no x_t")


def restore_pixel_segmentation(saved: SavedModel) -> tuple[PixelSegmentation, PixelClassifierConfig, Generator]:
    """Restore pixel classifiers with their configuration and their generator from a model directory, on the CPU.

    Raises:
        ModelError: A card or weights that do not describe such a model of this version.
    """
    config = typed_config(saved, PixelClassifierConfig)
    with usable(saved, PixelClassifierConfig):
        generator = restore_generator(saved.part(GENERATOR))
        weights = {name: value for name, value in saved.weights.items() if not name.startswith(f"{GENERATOR}.")}
        activations = pixel_activations(generator, config, saved.card["blocks"])
        members, features = config.classifier.members, len(weights["mean"])
        classifiers = PixelClassifiers(members, features, len(saved.card["labels"]), config.classifier.hidden)
        ready(classifiers, weights)
    data = generator.config.data
    model = PixelSegmentation(activations, classifiers, data.shape, data.channels)
    return model.requires_grad_(False).eval(), config, generator


def pixel_activations(generator: Generator, config: PixelClassifierConfig, blocks: list[str]) -> Activations:
    """The activations of a generator, on its device, that are the input of pixel classifiers of this configuration.

    Raises:
        UsageError: A block or a time that the generator does not have.
        ModelError: A generator of another kind.
    """
    task, precision = cast(ImageDiffusion, generator.task), generator.config.training.precision
    activations = Activations(
        task, generator.codec, generator.shape, config.features.times, blocks, precision=precision
    )
    return activations.to(generator.device)  # the task is there already, its noise is not


@dataclass(frozen=True)
class GeneratorPreprocessing(Preprocessing):
    """Preprocessing as in the generator's training: scans as configured, image files as 8-bit levels in [-1, 1]."""

    def apply(self, volume: Volume, box: Box | None = None) -> tuple[Tensor, Placement]:
        if not is_image(volume.source or ""):
            return super().apply(volume, box)
        # `volumes.fitting` turns these axes to those of the image file.
        _, placement = Preprocessing("LAS").apply(volume, box)
        lowest, highest = float(volume.data.min()), float(volume.data.max())
        # `data.images` treats levels whose bit depth the file does not state in the same way.
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
    """The preprocessing of images for pixel classifiers of the generator."""
    config = generator.config
    return GeneratorPreprocessing(**vars(build.image_preprocessing(config.preprocessing, config.data.shape)))


def pixel_inference(generator: Generator, config: PixelClassifierConfig) -> InferenceSection:
    """The windows for pixel classifiers: whole slices, or windows of the generator's size in volumes."""
    shape = generator.config.data.shape
    window = shape if len(shape) == 3 else None
    members = config.classifier.members
    return InferenceSection(steps=1, ensemble=members, window=window, largest_part=config.largest_part)
