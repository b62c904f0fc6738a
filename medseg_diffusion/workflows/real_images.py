"""The images that a generator was trained on and those that were held out, read again from the data of its training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from medseg_diffusion import build
from medseg_diffusion.data.cases import find_cases
from medseg_diffusion.data.image_cache import PackedImages, packed
from medseg_diffusion.data.images import find_images
from medseg_diffusion.data.labelled_images import LabelledImages, packed_labelled
from medseg_diffusion.models.generator import Generator
from medseg_diffusion.models.image_source import ImageSource
from medseg_diffusion.models.store import home

OnFile = Callable[[int, int], None]
"""Called with the files read, and all."""


def images_of_training(source: ImageSource, data: Path, on_file: OnFile = lambda done, total: None) -> PackedImages:
    """The images of ``data`` at the size of the final images, on the sides of the training's split.

    Raises:
        InputError: Unusable data.
    """
    if source.generator.mask_classes:
        return labelled_images_of_training(source.generator, data, on_file)
    config, bounds = source.last.config, source.generator.held_out
    return packed(
        data,
        home() / "images",
        config.data.shape,
        config.data.channels,
        preprocessing=build.image_preprocessing(config.preprocessing, config.data.shape),
        held_out=(0, 0) if bounds is None else bounds.count(entry.group for entry in find_images(data).entries),
        on_file=on_file,
    )


def labelled_images_of_training(
    generator: Generator, data: Path, on_file: OnFile, skip_broken: bool = False
) -> PackedImages:
    """`images_of_training` for a generator of masks: a labelled folder."""
    section, bounds, folder = generator.config.data, generator.held_out, find_cases(data)
    held_out = (0, 0) if bounds is None else bounds.count(case.patient for case in folder.cases)
    labelled = LabelledImages(folder, generator.mask_classes, section.channels, section.merge_labels, held_out)
    preprocessing = build.image_preprocessing(generator.config.preprocessing, section.shape)
    return packed_labelled(
        labelled, home() / "images", section.shape, preprocessing, skip_broken=skip_broken, on_case=on_file
    )
