"""Trained generators to images: the whole of `medseg sample` as functions."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from . import build
from .checkpoint import SavedModel, load_model_files
from .config import GeneratorConfig, ImageAutoencoderConfig, NoisyClassifierConfig, parse_config
from .data.image_cache import to_levels, to_unit
from .diffusion.denoiser import Clipped, Denoiser
from .diffusion.guidance import ClassifierGradient, ClassifierGuided, FreeGuided
from .diffusion.noise import derive_seed, gaussian, generators
from .errors import InputError, ModelError, UsageError
from .networks.autoencoder import Codec, KLAutoencoder, VQAutoencoder
from .reports.files import write_files
from .reports.pictures import grid, png
from .sampling.loop import sample, spaced
from .tasks.image import ImageDiffusion
from .training.runtime import arranged, autocast_dtype, choose_device, tune


@dataclass(frozen=True, eq=False)
class Generator:
    """A trained generator, ready to sample.

    Attributes:
        task: the diffusion model, on its device.
        config: what it was trained with.
        shape: of x0, (C, *S): the image's, or the latent's.
        codec: of a latent generator.
        classes: their names.
    """

    task: ImageDiffusion
    config: GeneratorConfig
    shape: tuple[int, ...]
    codec: Codec | None = None
    classes: tuple[str, ...] = ()

    @torch.no_grad()
    def sample(
        self,
        seeds: Sequence[int],
        sampler: str | None = None,
        steps: int | None = None,
        label: Tensor | None = None,
        low: Tensor | None = None,
        guidance: float = 1.0,
        classifier: ClassifierGradient | None = None,
    ) -> Tensor:
        """Images (B, C, H, W) in [-1, 1], one a seed; a seed gives the same image in any batch (to rounding).

        Args:
            seeds: one an image.
            sampler: "ddpm", "ddim" or "dpm++"; None, like ``steps``, takes the model's default.
            steps: denoiser calls.
            label: (B,) classes, for a model that is conditioned by them.
            low: (B, C, H / factor, W / factor) low-resolution images, for an upsampler.
            guidance: strength of classifier-free guidance, 1 for none.
            classifier: gradient of a noisy classifier.
        """
        task = self.task
        device = next(task.parameters()).device
        denoiser: Denoiser = task.denoiser
        if guidance != 1:
            denoiser = FreeGuided(denoiser, task.null(torch.zeros((), device=device)), guidance)
        if classifier is not None:
            denoiser = ClassifierGuided(denoiser, classifier)
        if self.codec is None:  # pixels have a range, latents have none
            denoiser = Clipped(denoiser)
        own = generators(seeds)
        noise = gaussian(self.shape, own, like=torch.zeros((), device=device))
        defaults = self.config.sampling
        name, count = sampler or defaults.sampler, steps or defaults.steps
        # Published scores of DDPM and DDIM are for evenly spaced times, DPM-Solver's for times even in log-SNR.
        times = spaced(task.denoiser.schedule, count, "log-snr" if name == "dpm++" else "linspace")
        x0 = sample(denoiser, build.sampler(name), noise, times, task.condition(label, low), generators=own)
        return (x0 if self.codec is None else self.codec.decode(x0)).clamp(-1, 1)


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


def restore_generator(saved: SavedModel, device: torch.device | str = "cpu") -> Generator:
    """The generator of a model directory.

    Raises:
        ModelError: a model of another kind or version.
    """
    config = _config(saved, GeneratorConfig, "a generator", "train-generator")
    try:
        shape, classes = tuple(saved.card["shape"]), tuple(saved.card["classes"])
        codec: KLAutoencoder | VQAutoencoder | None = None
        if config.method == "latent":
            stage = ImageAutoencoderConfig.model_validate(saved.card["autoencoder"])
            codec = build.autoencoder(stage)
            codec.load_state_dict(_under("codec.", saved.weights))
            codec.requires_grad_(False).to(device).eval()
        task = build.generator(config, len(classes), None if codec is None else shape[0])
        task.load_state_dict({k: v for k, v in saved.weights.items() if not k.startswith("codec.")})
    except (KeyError, ValueError, RuntimeError, UsageError) as error:
        raise _unusable(saved, error) from error
    arranged(task.denoiser.network, config.training.channels_last, compiled=False)
    return Generator(task.requires_grad_(False).to(device).eval(), config, shape, codec, classes)


def restore_autoencoder(saved: SavedModel) -> tuple[KLAutoencoder | VQAutoencoder, ImageAutoencoderConfig]:
    """The autoencoder of a model directory, in evaluation mode on the CPU, and its configuration."""
    config = _config(saved, ImageAutoencoderConfig, "an autoencoder", "train-generator")
    try:
        codec = build.autoencoder(config)
        codec.load_state_dict(saved.weights)
    except (RuntimeError, UsageError) as error:
        raise _unusable(saved, error) from error
    return codec.requires_grad_(False).eval(), config


def restore_classifier(saved: SavedModel, device: torch.device | str = "cpu") -> tuple[nn.Module, int]:
    """The noisy classifier of a model directory, and its number of classes."""
    config = _config(saved, NoisyClassifierConfig, "a noisy classifier", "train-generator")
    classes = len(saved.card["classes"])
    try:
        network = build.noisy_classifier(config, classes).network
        network.load_state_dict(saved.weights)
    except (RuntimeError, UsageError) as error:
        raise _unusable(saved, error) from error
    return network.requires_grad_(False).to(device).eval(), classes


class Source:
    """Numbered images of a generator, guided and enlarged as the options say: number i is always the same image."""

    def __init__(self, name_or_path: str | Path, options: SampleOptions = SampleOptions()) -> None:
        self.options = options
        self.device = choose_device(options.device)
        tune(self.device)
        self.saved = load_model_files(name_or_path)
        self.generator = restore_generator(self.saved, self.device)
        self.upsampler = options.upsampler and restore_generator(load_model_files(options.upsampler), self.device)
        self.classifier: nn.Module | None = None
        if options.classifier is not None and options.classifier_scale != 0:
            self.classifier, known = restore_classifier(load_model_files(options.classifier), self.device)
            self._check_class(known)
        self._check()

    def draw(self, numbers: Sequence[int]) -> Tensor:
        """Images (B, H, W, C) uint8 of these numbers."""
        options, task = self.options, self.generator.task
        label = self.labels(numbers).to(self.device)
        seeds = [derive_seed(options.seed, "sample", number) for number in numbers]
        gradient = None
        if self.classifier is not None:
            gradient = ClassifierGradient(cast(Any, self.classifier), label, options.classifier_scale)
        dtype = autocast_dtype(self.device, self.generator.config.training.precision)
        with torch.autocast(self.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
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
        return to_levels(image).permute(0, 2, 3, 1).cpu()

    def labels(self, numbers: Sequence[int]) -> Tensor:
        """Class of each image: the one asked for, or all in turn."""
        known = max(1, len(self.generator.classes))
        wanted = self.options.label
        return torch.tensor([number % known if wanted is None else wanted for number in numbers])

    def _check(self) -> None:
        options, task, path = self.options, self.generator.task, self.saved.path
        build.sampler(options.sampler or self.generator.config.sampling.sampler)
        if task.factor is not None:
            raise UsageError(f"{path}: an upsampler enlarges the images of another model: give it with --upsampler")
        if options.label is not None and not task.num_classes and options.classifier is None:
            raise UsageError(f"{path}: this model knows no classes; leave --class out")
        if options.guidance != 1 and not task.num_classes:
            raise UsageError(f"{path}: --guidance needs a model that is conditioned by classes")
        if task.num_classes:
            self._check_class(task.num_classes)
        if self.classifier is not None and self.generator.codec is not None:
            raise UsageError(f"{path}: --classifier sees pixels, but this model diffuses latents; use --guidance")
        if self.upsampler:
            size, factor = self.generator.config.data.size, self.upsampler.task.factor
            if factor is None or self.upsampler.config.data.size != factor * size:
                raise UsageError(f"{options.upsampler}: does not enlarge images of {size} x {size}")

    def _check_class(self, known: int) -> None:
        label = self.options.label
        if label is not None and not 0 <= label < known:
            raise UsageError(f"--class {label}: the model knows classes 0 to {known - 1}")


def sample_images(
    name_or_path: str | Path,
    output: Path,
    options: SampleOptions = SampleOptions(),
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Path]:
    """Samples images into the folder ``output``: 00000.png, ..., grid.png of the first 64, and samples.json.

    Images that are there already, made by the same model with the same options, are left alone, so that an interrupted
    call can be repeated.

    Raises:
        UsageError: options that the model cannot follow, or a folder with samples of other options.
        ModelError: no usable model.
    """
    source = Source(name_or_path, options)
    about = {
        "model": str(name_or_path),
        "sha256": source.saved.sha256,
        **{k: v for k, v in asdict(options).items() if k not in ("count", "batch_size", "device")},
    }
    note = output / "samples.json"
    if note.is_file() and json.loads(note.read_text()) != about:
        raise UsageError(f"{output}: holds samples of another model or of other options; choose another folder")
    write_files(output, {"samples.json": json.dumps(about, indent=2) + "\n"})
    paths = [output / f"{i:05d}.png" for i in range(options.count)]
    missing = [i for i, path in enumerate(paths) if not path.is_file()]
    for first in range(0, len(missing), options.batch_size):
        numbers = missing[first : first + options.batch_size]
        images = source.draw(numbers).numpy()
        content = {paths[i].name: png(image.squeeze(-1) if image.shape[-1] == 1 else image)
                   for i, image in zip(numbers, images, strict=True)}  # fmt: skip
        write_files(output, content)
        on_progress(min(first + options.batch_size, len(missing)), len(missing))
    shown = torch.stack([to_unit(torch.from_numpy(read_png(path))).permute(2, 0, 1) for path in paths[:64]])
    write_files(output, {"grid.png": png(grid(shown))})
    return paths


def read_png(path: Path) -> np.ndarray:
    """A sampled image, (H, W, 1 or 3) uint8."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            pixels = np.array(image)
    except OSError as error:
        raise InputError(path, f"a broken image ({error})", "a PNG", "delete it and sample again") from error
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _config(saved: SavedModel, kind: type, what: str, command: str) -> Any:
    try:
        config = parse_config(saved.card["config"], str(saved.path / "model.json"))
    except (KeyError, AttributeError, UsageError) as error:
        raise ModelError(f"{saved.path}: not {what}; use a model made by {command}") from error
    if not isinstance(config, kind):
        raise ModelError(f"{saved.path}: a {config.method}, not {what}; use a model made by {command}")
    return config


def _under(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _unusable(saved: SavedModel, error: Exception) -> ModelError:
    return ModelError(f"{saved.path}: not a model of this version ({str(error).splitlines()[0]}); train it again")
