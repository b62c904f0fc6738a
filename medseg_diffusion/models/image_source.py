"""Numbered images of a generator, guided and enlarged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from medseg_diffusion import build
from medseg_diffusion.config.generator import NoisyClassifierConfig
from medseg_diffusion.data.image_cache import to_levels, to_unit
from medseg_diffusion.device import autocast, choose_device, keep_freed_memory, tune
from medseg_diffusion.diffusion.guidance import ClassifierGradient
from medseg_diffusion.diffusion.noise import derive_seed
from medseg_diffusion.errors import UsageError
from medseg_diffusion.tasks.patched import PatchedDiffusion

from .generator import Generator, restore_classifier, restore_generator
from .store import load_model_files


@dataclass(frozen=True)
class SampleOptions:
    """What `medseg sample` is told; see `Generator.sample`.

    Attributes:
        count: number of images.
        label: class of all images; None goes through the classes in turn.
        upsampler: model that enlarges what is sampled, or None.
    """

    count: int = 16
    sampler: str | None = None
    steps: int | None = None
    label: int | None = None
    guidance: float = 1.0
    classifier: str | None = None
    classifier_scale: float = 1.0
    upsampler: str | None = None
    batch_size: int = 16
    device: str = "auto"
    seed: int = 0


class ImageSource:
    """Numbered images of a generator, guided and enlarged as the options say: number i is always the same image.

    Attributes:
        sha256: of the weights of all its models.
        loss_extractors: fingerprints of the networks that a loss of its training looked through.
    """

    def __init__(self, name_or_path: str | Path, options: SampleOptions = SampleOptions()) -> None:
        self.options = options
        self.device = choose_device(options.device)
        tune(self.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.saved = load_model_files(name_or_path)
        self.generator = restore_generator(self.saved, self.device)
        self.sha256 = {"sha256": self.saved.sha256}
        self.loss_extractors = set(self.saved.card.get("loss_extractors", []))
        self.upsampler: Generator | None = None
        if options.upsampler:
            saved = load_model_files(options.upsampler)
            self.upsampler = restore_generator(saved, self.device)
            self.loss_extractors |= set(saved.card.get("loss_extractors", []))
            self.sha256["upsampler_sha256"] = saved.sha256
        self.classifier: nn.Module | None = None
        self.known_classes = len(self.generator.classes)
        if options.classifier is not None and options.classifier_scale != 0:
            saved = load_model_files(options.classifier)
            self.classifier, self.known_classes, config = restore_classifier(saved, self.device)
            self.sha256["classifier_sha256"] = saved.sha256
            self._check_classifier(config)
        self._check()

    @property
    def last(self) -> Generator:
        """The model that makes the final images: the upsampler, or the generator where there is none."""
        return self.upsampler or self.generator

    def draw(self, numbers: Sequence[int]) -> Tensor:
        """Images (B, *S, C) uint8 of these numbers."""
        options, task = self.options, self.generator.task
        label = self.labels(numbers).to(self.device)
        seeds = [derive_seed(options.seed, "sample", number) for number in numbers]
        gradient = None
        if self.classifier is not None:
            gradient = ClassifierGradient(cast(Any, self.classifier), label, options.classifier_scale)
        with autocast(self.device, self.generator.config.training.precision):
            given = label if task.num_classes else None
            image = self.generator.sample(
                seeds, options.sampler, options.steps, given, None, options.guidance, gradient
            )
            if self.upsampler:
                again = [derive_seed(seed, "upsampled") for seed in seeds]
                given = label if self.upsampler.task.num_classes else None
                # What it enlarges is an image of 256 levels, as in its training.
                low = to_unit(to_levels(image))
                image = self.upsampler.sample(again, options.sampler, options.steps, given, low)
        return to_levels(image).movedim(1, -1).cpu()

    def labels(self, numbers: Sequence[int]) -> Tensor:
        """Class of each image: the one asked for, or all in turn."""
        known = max(1, self.known_classes)
        wanted = self.options.label
        return torch.tensor([number % known if wanted is None else wanted for number in numbers])

    def _check(self) -> None:
        options, task, path = self.options, self.generator.task, self.saved.path
        if isinstance(task, PatchedDiffusion):
            raise UsageError(f"{path}: a patched model restores patches of images; it makes none of its own")
        build.sampler(options.sampler or self.generator.config.sampling.sampler)
        if task.factor is not None:
            raise UsageError(f"{path}: an upsampler enlarges the images of another model: give it with --upsampler")
        if options.label is not None and not task.num_classes and options.classifier is None:
            raise UsageError(f"{path}: this model knows no classes; leave --class out")
        if options.guidance != 1 and not (task.num_classes and self.generator.config.condition.drop):
            raise UsageError(f"{path}: --guidance needs a model whose training dropped its classes now and then")
        if task.num_classes:
            self._check_class(task.num_classes)
        if self.classifier is not None and self.generator.codec is not None:
            raise UsageError(f"{path}: --classifier sees pixels, but this model diffuses latents; use --guidance")
        if self.upsampler:
            size = self.generator.config.data.shape
            factor = None if isinstance(self.upsampler.task, PatchedDiffusion) else self.upsampler.task.factor
            channels = self.generator.config.data.channels, self.upsampler.config.data.channels
            if channels[0] != channels[1]:
                raise UsageError(f"{options.upsampler}: enlarges {channels[1]} channels, not {channels[0]}")
            if factor is None or self.upsampler.config.data.shape != tuple(factor * side for side in size):
                raise UsageError(f"{options.upsampler}: does not enlarge images of {' x '.join(map(str, size))}")
            known = len(self.upsampler.classes)
            if known and known != self.known_classes:
                raise UsageError(
                    f"{options.upsampler}: needs one of {known} classes, the images have {self.known_classes}"
                )

    def _check_classifier(self, config: NoisyClassifierConfig) -> None:
        """A classifier guides a generator of the same images, schedule and classes."""
        own, path = self.generator.config, self.options.classifier
        for what, found, needed in (
            ("size", config.data.shape, own.data.shape),
            ("channels", config.data.channels, own.data.channels),
            ("noise schedule", config.schedule, own.diffusion.schedule),
            ("number of classes", self.known_classes, len(self.generator.classes) or self.known_classes),
        ):
            if found != needed:
                raise UsageError(f"{path}: its {what} is {found}, the generator's {needed}; use one made for it")
        self._check_class(self.known_classes)

    def _check_class(self, known: int) -> None:
        label = self.options.label
        if label is not None and not 0 <= label < known:
            raise UsageError(f"--class {label}: the model knows classes 0 to {known - 1}")
