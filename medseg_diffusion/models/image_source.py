"""Numbered images of a generator, guided and enlarged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
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
from medseg_diffusion.tasks.image import ImageDiffusion
from medseg_diffusion.tasks.patched import PatchedDiffusion

from .generator import Generator, restore_classifier, restore_generator
from .store import SavedModel, load_model_files

OnStep = Callable[[int, int], None]
"""Called with the denoising steps done, and those in all."""


def _silent(done: int, total: int) -> None:
    """Show no progress."""


@dataclass(frozen=True)
class SampleOptions:
    """Options of `sample`.

    Attributes:
        count: Number of images; with masks, of each mask. None is the default of what draws them: `sample` 16 images,
            or 1 of each mask; `evaluate_generator` 10,000 images, or as many volumes as there are real ones, up to 100.
        sampler: "ddpm", "ddim", "dpm++", "euler" or "heun"; None takes the model's default.
        steps: Steps of the sampler; None takes the model's default.
        label: Number of the class of all images; None cycles through the classes.
        guidance: Strength of classifier-free guidance; 1 for none.
        classifier: Noisy classifier that guides the sampling: model folder, run folder or installed name.
        classifier_scale: Strength of its guidance; 0 for none.
        clip_first: Clip predicted pixels before the classifier's gradient, as guided diffusion does.
        upsampler: Model that enlarges the images: model folder, run folder or installed name.
        batch_size: Images that are drawn together.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        seed: Seed of all randomness.
        compile: Compile the denoisers; images differ by rounding.

    Raises:
        UsageError: A number of images, steps or images of a batch below 1.
    """

    count: int | None = None
    sampler: str | None = None
    steps: int | None = None
    label: int | None = None
    guidance: float = 1.0
    classifier: str | None = None
    classifier_scale: float = 1.0
    clip_first: bool = False
    upsampler: str | None = None
    batch_size: int = 16
    device: str = "auto"
    seed: int = 0
    compile: bool = False

    def __post_init__(self) -> None:
        for name in ("classifier", "upsampler"):  # they are stored as text
            if isinstance(value := getattr(self, name), Path):
                object.__setattr__(self, name, str(value))
        for name in ("count", "steps", "batch_size"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise UsageError(f"{name}={number}: expected 1 or more")


class ImageSource:
    """Numbered images of a generator, guided and enlarged as the options say; number i is always the same image.

    Attributes:
        sha256: Hash of the weights of all its models.
        loss_extractors: Fingerprints of the feature extractors that were used in a training loss.
    """

    def __init__(
        self,
        name_or_path: str | Path | SavedModel,
        options: SampleOptions = SampleOptions(),
        masked: bool | None = False,
    ) -> None:
        """Load the models and check the options.

        Args:
            name_or_path: Generator: model folder, run folder or installed name.
            options: The options.
            masked: Whether images of masks will be drawn (`draw_masks`); None if that is not known yet.

        Raises:
            ModelError: No usable model.
            UsageError: Options that do not fit the models, masks for a model that takes none, or none for one that
                needs them.
        """
        self.options, self.masked = options, masked
        self.device = choose_device(options.device)
        tune(self.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.saved = load_model_files(name_or_path)
        self.generator = restore_generator(self.saved, self.device, options.compile)
        self.sha256 = {"sha256": self.saved.sha256}
        self.loss_extractors = set(self.saved.card.get("loss_extractors", []))
        self.upsampler: Generator | None = None
        if options.upsampler:
            saved = load_model_files(options.upsampler)
            self.upsampler = restore_generator(saved, self.device, options.compile)
            self.loss_extractors |= set(saved.card.get("loss_extractors", []))
            self.sha256["upsampler_sha256"] = saved.sha256
        self.classifier: nn.Module | None = None
        self.num_classes = len(self.generator.classes)
        if options.classifier is not None and options.classifier_scale != 0:
            saved = load_model_files(options.classifier)
            self.classifier, self.num_classes, config = restore_classifier(saved, self.device)
            self.sha256["classifier_sha256"] = saved.sha256
            self._check_classifier(config)
        self._check()

    def with_options(self, options: SampleOptions, masked: bool = False) -> ImageSource:
        """The same models on the same device, with the other options from ``options``.

        ``masked`` says whether images of masks will be drawn.

        Raises:
            UsageError: options that do not fit the models.
        """
        loaded = {name: getattr(self.options, name) for name in ("classifier", "upsampler", "device", "compile")}
        other = copy(self)
        other.options, other.masked = replace(options, **loaded), masked
        other._check()
        if other.classifier is not None:
            other._check_class(other.num_classes)
        return other

    @property
    def last(self) -> Generator:
        """The model that makes the final images: the upsampler, or the generator where there is none."""
        return self.upsampler or self.generator

    def draw(self, numbers: Sequence[int], on_step: OnStep = _silent) -> Tensor:
        """The images with these numbers, (B, *S, C) uint8. ``on_step`` is called with the steps done and all."""
        seeds = [derive_seed(self.options.seed, "sample", number) for number in numbers]
        return self._drawn(seeds, self.labels(numbers).to(self.device), None, on_step)

    def draw_masks(self, masks: Tensor, seeds: Sequence[int], on_step: OnStep = _silent) -> Tensor:
        """An image of each mask, (B, *S, C) uint8.

        Args:
            masks: (B, *S) whole numbers on the model's grid (`placed_mask.place_mask`).
            seeds: One seed per image. A seed and a mask give the same image in any batch, up to rounding.
            on_step: Called with the steps done and those in all.
        """
        return self._drawn(seeds, torch.zeros(len(masks), dtype=torch.long), masks.to(self.device), on_step)

    def _drawn(self, seeds: Sequence[int], label: Tensor, masks: Tensor | None, on_step: OnStep) -> Tensor:
        options, task = self.options, self.generator.task
        gradient = None
        if self.classifier is not None:
            gradient = ClassifierGradient(cast(Any, self.classifier), label, options.classifier_scale)
        with autocast(self.device, self.generator.config.training.precision):
            classes = label if task.num_classes else None
            image = self.generator.sample(
                seeds,
                options.sampler,
                options.steps,
                classes,
                None,
                options.guidance,
                gradient,
                options.clip_first,
                masks,
                on_step,
            )
            if self.upsampler:
                upsampler_seeds = [derive_seed(seed, "upsampled") for seed in seeds]
                classes = label if self.upsampler.task.num_classes else None
                # The upsampler was trained on images of 256 levels.
                low = to_unit(to_levels(image))
                image = self.upsampler.sample(upsampler_seeds, options.sampler, options.steps, classes, low)
        return to_levels(image).movedim(1, -1).cpu()

    def labels(self, numbers: Sequence[int]) -> Tensor:
        """Class of each image: the requested one, or else all classes in turn."""
        num_classes = max(1, self.num_classes)
        label = self.options.label
        return torch.tensor([number % num_classes if label is None else label for number in numbers])

    def _check(self) -> None:
        options, task, path = self.options, self.generator.task, self.saved.path
        if isinstance(task, PatchedDiffusion):
            raise UsageError(f"{path}: a patched model restores patches of images; it cannot generate images")
        build.sampler(options.sampler or self.generator.config.sampling.sampler)
        if task.factor is not None:
            raise UsageError(f"{path}: an upsampler enlarges the images of another model: give it with --upsampler")
        if options.label is not None and not task.num_classes and options.classifier is None:
            raise UsageError(f"{path}: this model has no classes; leave --class out")
        if options.clip_first and self.classifier is None:
            raise UsageError(f"{path}: --clip-first is about a classifier's guidance; give --classifier")
        if options.guidance != 1 and not ((task.num_classes or task.mask_classes) and task.drop):
            raise UsageError(f"{path}: --guidance needs a model that was trained with condition.drop above 0")
        self._check_masks(task)
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
            upsampler_classes = len(self.upsampler.classes)
            if upsampler_classes and upsampler_classes != self.num_classes:
                raise UsageError(
                    f"{options.upsampler}: needs one of {upsampler_classes} classes, the images have {self.num_classes}"
                )

    def _check_masks(self, task: ImageDiffusion) -> None:
        options, path = self.options, self.saved.path
        if self.masked and not task.mask_classes:
            raise UsageError(f"{path}: is not conditioned by masks (condition.mask); leave --masks out")
        if self.masked and options.upsampler is not None:
            raise UsageError("--upsampler: images of masks are not enlarged; leave it or --masks out")
        if self.masked and options.classifier is not None:
            raise UsageError("--classifier: images of masks are guided by --guidance; leave it or --masks out")
        if task.mask_classes and self.masked is False:
            if not task.drop:
                raise UsageError(f"{path}: trained with condition.drop 0, it draws images of masks only: give --masks")
            if options.guidance != 1:
                raise UsageError(f"{path}: --guidance strengthens the mask, and there is none: give --masks")

    def _check_classifier(self, config: NoisyClassifierConfig) -> None:
        """Require that the classifier was made for the images, schedule and classes of the generator."""
        generator_config, path = self.generator.config, self.options.classifier
        for quantity, actual, expected in (
            ("size", config.data.shape, generator_config.data.shape),
            ("channels", config.data.channels, generator_config.data.channels),
            ("noise schedule", config.schedule, generator_config.diffusion.schedule),
            ("number of classes", self.num_classes, len(self.generator.classes) or self.num_classes),
        ):
            if actual != expected:
                raise UsageError(f"{path}: its {quantity} is {actual}, the generator's {expected}; use one made for it")
        self._check_class(self.num_classes)

    def _check_class(self, num_classes: int) -> None:
        label = self.options.label
        if label is not None and not 0 <= label < num_classes:
            raise UsageError(f"--class {label}: the model has classes 0 to {num_classes - 1}")
