"""`medseg sample`: sample images from a trained generator into a folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medseg_diffusion.data.image_cache import to_unit
from medseg_diffusion.errors import UsageError
from medseg_diffusion.files import require_folder, write_files
from medseg_diffusion.models.image_source import ImageSource, SampleOptions
from medseg_diffusion.models.placed_mask import place_mask
from medseg_diffusion.reports.pictures import as_pictures, grid, png
from medseg_diffusion.training.progress import OnProgress, count_of, silent
from medseg_diffusion.volumes.io import read_labels, read_map, write_map
from medseg_diffusion.volumes.outputs import SAMPLES
from medseg_diffusion.volumes.volume import Volume

from .sample_masks import (
    contact_sheet,
    draw_missing,
    find_mask_files,
    folder_files,
    folder_state,
    labelled_samples,
    read_png,
    require_same_classes,
    with_earlier,
)
from .sample_reference import Reference, read_samples

DEFAULT_COUNT = 16
"""Number of images, unless the options or masks say it."""


def sample(
    name_or_path: str | Path,
    output: str | Path,
    options: SampleOptions = SampleOptions(),
    on_progress: OnProgress = silent,
    *,
    masks: str | Path | None = None,
    reference: str | Path | None = None,
    extractor: str = "auto",
) -> list[Path]:
    """Sample images into the folder ``output``: 00000.png, ..., grid.png of the first 64, and samples.json.

    Volumes become 00000.nii.gz, ..., with levels 0 to 255 in RAS, and grid.png shows their middle slices. Images that
    the same model has made with the same options are kept, so that an interrupted call can be repeated.

    With ``masks`` the images obey them, and the folder is a labelled one for trainings of segmenters
    (`medseg_diffusion.workflows.sample_masks`): an image has the grid of its label map.

    Args:
        name_or_path: Generator: model folder, run folder or installed name.
        output: The folder, new or of the same samples.
        options: The options.
        on_progress: Called with a text and the share done, 0 to 1.
        masks: Label map, folder of label maps, or labelled folder, for a generator that is conditioned by masks.
            ``options.count`` images are drawn of each label map, by default 1.
        reference: The data of the generator's training. Real images are shown beside the samples, and samples that are
            copies of training images are looked for: reference.png and reference.json.
        extractor: Name or file of the feature extractor that compares images, as in `evaluate_generator`.

    Returns:
        The files of the images, in their order.

    Raises:
        UsageError: Options that do not fit the model, or a folder with samples of other options.
        InputError: Label maps or real images that do not fit the model.
        ModelError: No usable model or feature extractor.
    """
    output = Path(output)
    require_folder(output)
    source = ImageSource(name_or_path, options, masked=masks is not None)
    about = {
        "model": str(name_or_path),
        **source.sha256,
        **{k: v for k, v in asdict(options).items() if k not in ("count", "batch_size", "device", "compile")},
    }
    real = None if reference is None else Reference(source, Path(reference), extractor, on_progress)
    if masks is not None:
        return _sample_masks(source, output, about, Path(masks), real, on_progress)
    _start(output, about)
    volumes = len(source.last.config.data.shape) == 3
    spacing = source.last.config.preprocessing.spacing_mm or (1.0, 1.0, 1.0)
    count = DEFAULT_COUNT if options.count is None else options.count
    paths = [output / f"{i:05d}{'.nii.gz' if volumes else '.png'}" for i in range(count)]
    missing = [i for i, path in enumerate(paths) if not path.is_file()]
    for first in range(0, len(missing), options.batch_size):
        numbers = missing[first : first + options.batch_size]
        on_step = _on_step(on_progress, first, len(numbers), len(missing))
        images = source.draw(numbers, on_step)
        for i, image in zip(numbers, images, strict=True):
            if volumes:
                levels = image.movedim(-1, 0).float()
                write_map(levels, Volume(levels, np.diag([*spacing, 1.0])), paths[i])
            else:
                write_files(output, {paths[i].name: png(image.squeeze(-1).numpy())})
        count_of(on_progress)("image", min(first + options.batch_size, len(missing)), len(missing))
    read = (lambda path: read_map(path).data) if volumes else (lambda path: _channels_first(read_png(path)))
    shown = torch.stack([to_unit(read(path)) for path in paths[:64]])
    write_files(output, {SAMPLES["grid"]: png(grid(as_pictures(shown)))})
    if real is not None:
        levels = [read(path).movedim(0, -1).round().to(torch.uint8).numpy() for path in paths]
        real.compare(np.stack(levels), output)
    return paths


def _start(output: Path, about: Mapping[str, Any], others: Mapping[str, str] = MappingProxyType({})) -> None:
    """Write samples.json and ``others``; UsageError for a folder of other samples."""
    note = output / SAMPLES["options"]
    if note.is_file() and json.loads(note.read_text()) != about:
        raise UsageError(f"{output}: holds samples of another model or of other options; choose another folder")
    if not note.is_file() and (taken := [name for name in others if (output / name).exists()]):
        raise UsageError(f"{output}: holds {taken[0]}, but no samples; choose another folder")
    write_files(output, {SAMPLES["options"]: json.dumps(about, indent=2) + "\n", **others})


def _sample_masks(
    source: ImageSource,
    output: Path,
    about: Mapping[str, Any],
    masks: Path,
    real: Reference | None,
    on_progress: OnProgress,
) -> list[Path]:
    files = find_mask_files(masks)
    require_same_classes(files, source)
    for done, file in enumerate(files, 1):  # a later one should not fail after hours
        place_mask(read_labels(file.path), source.generator)
        count_of(on_progress)("checking masks", done, len(files))
    count = 1 if source.options.count is None else source.options.count
    samples, listed = (make(files, output, count) for make in (labelled_samples, with_earlier))
    _start(output, {**about, "masks": folder_state(files)}, folder_files(listed, source))
    draw_missing(samples, source, on_progress)
    write_files(output, {SAMPLES["grid"]: png(contact_sheet(samples, source))})
    if real is not None:
        real.compare(read_samples(samples, source), output)
    return [sample.image for sample in samples]


def _on_step(on_progress: OnProgress, first: int, batch: int, total: int) -> Callable[[int, int], None]:
    """Tells of the steps of a batch that begins after ``first`` of ``total`` images."""

    def on_step(done: int, steps: int) -> None:
        on_progress(f"image: {first} of {total}, step {done} of {steps}", (first + batch * done / steps) / total)

    return on_step


def _channels_first(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).movedim(-1, 0)
