"""Packed images, validation batches, sample pictures and card entries for all trainings on images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medseg_diffusion import build
from medseg_diffusion.config.generator import GeneratorDataSection
from medseg_diffusion.config.load import ImageConfig
from medseg_diffusion.data.cases import find_cases
from medseg_diffusion.data.draws import Examples
from medseg_diffusion.data.file_lists import FileList
from medseg_diffusion.data.image_cache import PackedImages, packed
from medseg_diffusion.data.labelled_images import LabelledImages, packed_labelled
from medseg_diffusion.diffusion.noise import derive_seed
from medseg_diffusion.errors import InputError
from medseg_diffusion.models.card import common_entries
from medseg_diffusion.models.store import home
from medseg_diffusion.reports.pictures import as_pictures, grid, write_png
from medseg_diffusion.training.job import Job
from medseg_diffusion.training.runtime import Runtime
from medseg_diffusion.training.trainer import require_trainable

from .segmenter_data import class_names_of

VALIDATION_IMAGES = 512
"""Number of validation images. They and their noise are always the same; their loss chooses the best weights."""


@dataclass(frozen=True)
class ImageSourceOptions:
    """The source of a training's images.

    Attributes:
        data: A folder or zip of images, a folder of scans (`medseg_diffusion.data.images`), a list of either, or packed
            images.
        skip_broken: Leave broken files out instead of stopping.
        download: Download the weights of LPIPS if they are missing; nothing is downloaded otherwise.
        masks: Section of a generator that is conditioned by masks: its images, and those of its autoencoder, are read
            with their masks.
    """

    data: Path | FileList | PackedImages
    skip_broken: bool = False
    download: bool = False
    masks: GeneratorDataSection | None = None


def prepare_images(
    config: ImageConfig,
    source: ImageSourceOptions,
    job: Job,
    runtime: Runtime,
    build_model: Callable[[PackedImages], nn.Module],
    notes: Mapping[str, Any] | None = None,
) -> PackedImages:
    """Pack the images, check everything, and then create the run folder.

    Args:
        config: Configuration of the training.
        source: Source of the images.
        job: The training job.
        runtime: Its device and processes.
        build_model: Builds the network, so that its errors occur before the run folder exists.
        notes: Further values that must be the same when the run is resumed.
    """
    if runtime.is_main:
        job.require_startable(config, notes)
    with runtime.main_first():
        images = _packed(config, source, job)
    if runtime.is_main:
        with torch.device("meta"):
            require_trainable(build_model(images), config.training.batch_size, runtime)
        sides = None if images.held_out is None else asdict(images.held_out)
        job.start(config, notes, sides, images.folder, "held_out.json")
    runtime.wait()
    return images


def _packed(config: ImageConfig, source: ImageSourceOptions, job: Job) -> PackedImages:
    if isinstance(source.data, PackedImages):
        return source.data
    section, store = config.data, home() / "images"
    preprocessing = build.image_preprocessing(config.preprocessing, section.shape)
    held_out = section.test_images, section.validation_images

    def on_file(done: int, total: int) -> None:
        job.on_prepare("images", done, total)

    if source.masks is not None:
        folder = find_cases(source.data)
        names = class_names_of(source.masks, folder, source.data)
        labelled = LabelledImages(folder, names, section.channels, source.masks.merge_labels, held_out)
        return packed_labelled(
            labelled, store, section.shape, preprocessing, skip_broken=source.skip_broken, on_case=on_file
        )
    images = packed(
        source.data,
        store,
        section.shape,
        section.channels,
        preprocessing=preprocessing,
        held_out=held_out,
        skip_broken=source.skip_broken,
        on_file=on_file,
    )
    if not len(images.part("validation")):
        raise InputError(str(source.data), "no validation images", "a val/ side with annotations", "restore it")
    return images


def validation_batches(examples: Examples, batch_size: int) -> list[dict[str, Tensor]]:
    """The first validation examples, each with its own fixed seed."""
    drawn = []
    for i in range(min(VALIDATION_IMAGES, len(examples))):
        seed = derive_seed("validation", i)
        example = dict(examples.example(i, torch.Generator().manual_seed(seed)))
        drawn.append({**example, "seed": torch.tensor(seed)})
    parts = (drawn[first : first + batch_size] for first in range(0, len(drawn), batch_size))
    return [{name: torch.stack([example[name] for example in part]) for name in part[0]} for part in parts]


@torch.no_grad()
def mean_loss(
    model: nn.Module,
    batches: list[dict[str, Tensor]],
    runtime: Runtime,
    on_prepare: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> float:
    """Mean loss of ``model`` over all images of the batches."""
    total, count = 0.0, 0
    for done, batch in enumerate(batches):
        on_prepare("validation: batch", done, len(batches))
        with runtime.accelerator.autocast():
            loss = model(runtime.to_device(batch))
        total, count = total + float(loss) * len(batch["image"]), count + len(batch["image"])
    return total / count


def write_pictures(images: Tensor, run: Path) -> None:
    """Write images (N, C, *S) in [-1, 1] as the next picture in RUN/samples."""
    folder = run / "samples"
    number = len(list(folder.glob("*.png"))) + 1
    write_png(grid(as_pictures(images)), folder / f"{number:03d}.png")


def image_card(
    config: ImageConfig, images: PackedImages, job: Job, step: int, numbers: Mapping[str, float]
) -> dict[str, Any]:
    """The card entries that all models trained on images have."""
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
        labels=dict(enumerate(images.mask_classes)),
        training={"seed": job.seed, "step": step, "data": data, **held_out},
        metrics={"validation": {name: value for name, value in numbers.items() if name != "score"}},
    )
