"""What the trainings on images share: the packed images, validation batches, pictures and the card."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medseg_diffusion import build
from medseg_diffusion.config.generator import GeneratorConfig, ImageAutoencoderConfig, NoisyClassifierConfig
from medseg_diffusion.data.draws import Examples
from medseg_diffusion.data.image_cache import PackedImages, packed
from medseg_diffusion.diffusion.noise import derive_seed
from medseg_diffusion.errors import InputError
from medseg_diffusion.models.card import common_entries
from medseg_diffusion.models.store import home
from medseg_diffusion.reports.pictures import as_pictures, grid, write_png
from medseg_diffusion.training.job import Job
from medseg_diffusion.training.runtime import Runtime

ImageConfig = GeneratorConfig | ImageAutoencoderConfig | NoisyClassifierConfig

VALIDATION_IMAGES = 512
"""Images, always the same with the same noise, whose loss is logged and chooses the best weights."""


@dataclass(frozen=True)
class ImageSourceOptions:
    """Where the images of a training come from.

    Attributes:
        data: a folder or zip of images, a folder of scans (`medseg_diffusion.data.images`), or packed images.
        skip_broken: leave broken files out instead of stopping.
        download: fetch the weights of LPIPS if they are missing; nothing is downloaded otherwise.
    """

    data: Path | PackedImages
    skip_broken: bool = False
    download: bool = False


def prepare_images(
    config: ImageConfig,
    source: ImageSourceOptions,
    job: Job,
    runtime: Runtime,
    build_model: Callable[[PackedImages], object] = lambda images: None,
    noted: Mapping[str, Any] | None = None,
) -> PackedImages:
    """The packed images. The run folder is made once nothing can be refused any more.

    Args:
        config: of the training.
        source: of the images.
        job: the call.
        runtime: its processes.
        build_model: builds the network, for what that refuses.
        noted: what else has to be the same to resume.
    """
    job.require_startable(config, noted)
    with runtime.main_first():
        images = _packed(config, source, job)
    with torch.device("meta"):
        build_model(images)
    if runtime.is_main:
        sides = None if images.held_out is None else asdict(images.held_out)
        job.start(config, noted, sides, images.folder, "held_out.json")
    return images


def _packed(config: ImageConfig, source: ImageSourceOptions, job: Job) -> PackedImages:
    if isinstance(source.data, PackedImages):
        return source.data
    section = config.data
    images = packed(
        source.data,
        home() / "images",
        section.shape,
        section.channels,
        preprocessing=build.image_preprocessing(config.preprocessing, section.shape),
        held_out=(section.test_images, section.validation_images),
        skip_broken=source.skip_broken,
        on_file=lambda done, total: job.on_prepare("images", done, total),
    )
    if not len(images.part("validation")):
        raise InputError(source.data, "no validation images", "a val/ side with annotations", "restore it")
    return images


def validation_batches(examples: Examples, batch_size: int) -> list[dict[str, Tensor]]:
    """The first validation examples, each with a seed of its own that never changes."""
    drawn = []
    for i in range(min(VALIDATION_IMAGES, len(examples))):
        seed = derive_seed("validation", i)
        example = dict(examples.example(i, torch.Generator().manual_seed(seed)))
        drawn.append({**example, "seed": torch.tensor(seed)})
    parts = (drawn[first : first + batch_size] for first in range(0, len(drawn), batch_size))
    return [{name: torch.stack([example[name] for example in part]) for name in part[0]} for part in parts]


@torch.no_grad()
def mean_loss(model: nn.Module, batches: list[dict[str, Tensor]], runtime: Runtime) -> float:
    """The mean loss of ``model`` over all images of the batches."""
    total, count = 0.0, 0
    for batch in batches:
        with runtime.accelerator.autocast():
            loss = model(runtime.to_device(batch))
        total, count = total + float(loss) * len(batch["image"]), count + len(batch["image"])
    return total / count


def write_pictures(images: Tensor, run: Path) -> None:
    """Writes images (N, C, *S) in [-1, 1] as the next picture of RUN/samples."""
    folder = run / "samples"
    number = len(list(folder.glob("*.png"))) + 1
    write_png(grid(as_pictures(images)), folder / f"{number:03d}.png")


def image_card(
    config: ImageConfig, images: PackedImages, job: Job, step: int, numbers: Mapping[str, float]
) -> dict[str, Any]:
    """The common entries of the card of a model that was trained on images."""
    tasks = {"autoencoder": "image-autoencoder", "classifier": "image-classifier"}
    data = {
        "images": len(images.part("train")),
        "validation_images": len(images.part("validation")),
        "broken_files_left_out": len(images.skipped),
    }
    held_out = {} if images.held_out is None else {"held_out": asdict(images.held_out)}
    return common_entries(
        config,
        task=tasks.get(config.method, "image"),
        method=config.method,
        dims=len(config.data.shape),
        channels=["red", "green", "blue"] if config.data.channels == 3 else ["grey"],
        labels={},
        training={"seed": job.seed, "step": step, "data": data, **held_out},
        metrics={"validation": {name: value for name, value in numbers.items() if name != "score"}},
    )
