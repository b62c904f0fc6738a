"""`medseg sample --masks`: images of label maps, as a labelled folder that `train-segmenter` and nnU-Net read.

DIR/imagesTr/CASE_0000.nii.gz   the images, levels 0 to 255 on the grid of their label map (.png for image files)
DIR/labelsTr/CASE.nii.gz        the label maps
DIR/dataset.json                names of the labels and channels
DIR/patients.csv                the patient of each case: all images of a label map are of one
DIR/samples.json                the options, to finish an interrupted call with
DIR/grid.png                    the first images, and beside each the outlines of its mask
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from medseg_diffusion.data.cases import find_cases
from medseg_diffusion.data.class_names import class_names, misnamed
from medseg_diffusion.data.image_cache import to_unit
from medseg_diffusion.data.pairs import find_masks
from medseg_diffusion.data.patients import COLUMNS, patients_of
from medseg_diffusion.data.patients import FILE as PATIENTS
from medseg_diffusion.diffusion.noise import derive_seed
from medseg_diffusion.errors import InputError
from medseg_diffusion.files import write_files
from medseg_diffusion.models.image_source import ImageSource
from medseg_diffusion.models.placed_mask import PlacedMask, place_mask
from medseg_diffusion.reports.pictures import grid, outlined, png
from medseg_diffusion.reports.theme import class_colours
from medseg_diffusion.training.progress import OnProgress
from medseg_diffusion.volumes.io import read_labels, read_map, write_labels, write_map
from medseg_diffusion.volumes.paths import is_image

from .label_files import label_table

SHOWN = 32
"""Images on the contact sheet."""
TILE_PIXELS = 160
"""Smaller images are enlarged up to this side, so that outlines are thin."""


@dataclass(frozen=True)
class MaskFile:
    """A label map of which images are drawn. All images of a ``patient`` stay on one side of a split."""

    name: str
    path: Path
    patient: str


@dataclass(frozen=True)
class LabelledSample:
    """One image of a label map: its number among them, and the files of a labelled folder."""

    mask: MaskFile
    number: int
    image: Path
    label: Path

    @property
    def name(self) -> str:
        """Name of the case."""
        return case_name(self.mask, self.number)


def case_name(mask: MaskFile, number: int) -> str:
    """Name of the case of a label map's ``number``-th image, counted from 0."""
    return f"{mask.name.replace('/', '_')}_s{number + 1:03d}"


def find_mask_files(masks: Path) -> list[MaskFile]:
    """The label maps of a folder or file, or of a labelled folder (`medseg_diffusion.data.cases`), sorted by name.

    Patients are those of the labelled folder, or of the patients.csv in the folder of masks or, for a folder called
    labels, labelsTr or masks, beside it. Without one, every label map has a patient of its own.

    Raises:
        InputError: A path that does not exist, a folder without label maps, or one of images and volumes.
    """
    names = {path.name for path in masks.iterdir()} if masks.is_dir() else set()
    if "dataset.json" in names or any({"images", labels} <= names for labels in ("labels", "masks", "raters")):
        files = [MaskFile(case.name, case.label, case.patient) for case in find_cases(masks).cases]
    else:
        paths = find_masks(masks)
        patients = patients_of(masks, paths) if masks.is_dir() else {}
        files = [MaskFile(name, path, patients.get(name, name)) for name, path in sorted(paths.items())]
    names_of_cases = [case_name(mask, 0) for mask in files]
    if twice := sorted({name for name in names_of_cases if names_of_cases.count(name) > 1}):
        raise InputError(masks, f"two masks that give {twice[0]}", "names that differ", "rename one of them")
    pictures = [mask.path for mask in files if is_image(mask.path)]
    if pictures and len(pictures) < len(files):
        raise InputError(pictures[0], "an image file among volumes", "masks of one kind", "give them one by one")
    return files


def require_same_classes(masks: Sequence[MaskFile], source: ImageSource) -> None:
    """InputError for label maps whose files name the classes otherwise than the model, as far as they name them."""
    if source.generator.config.data.merge_labels:
        return
    classes = source.generator.mask_classes
    stored, _ = class_names([mask.path for mask in masks])
    if (wrong := misnamed(classes, stored)) is not None:
        value, other = wrong
        raise InputError(
            masks[0].path.parent,
            f"label {value} named {stored[value]!r}",
            f"{classes.get(value, 'no such label')!r}, as in the model, whose {classes[other]!r} is label {other}",
            "give the labels the model's numbers",
        )


def folder_state(masks: Sequence[MaskFile]) -> str:
    """SHA-256 of the names, patients and contents of label maps: images of other masks do not join a folder."""
    lines = [f"{mask.name}\t{mask.patient}\t{hashlib.sha256(mask.path.read_bytes()).hexdigest()}" for mask in masks]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def labelled_samples(masks: Sequence[MaskFile], output: Path, count: int) -> list[LabelledSample]:
    """``count`` images of each label map, all first images before all second ones."""
    suffix, samples = _suffix(masks[0]), []
    for number in range(count):
        for mask in masks:
            name = case_name(mask, number)
            image, label = output / "imagesTr" / f"{name}_0000{suffix}", output / "labelsTr" / f"{name}{suffix}"
            samples.append(LabelledSample(mask, number, image, label))
    return samples


def _suffix(mask: MaskFile) -> str:
    return ".png" if is_image(mask.path) else ".nii.gz"


def with_earlier(masks: Sequence[MaskFile], output: Path, count: int) -> list[LabelledSample]:
    """``count`` images of each label map, and those that an earlier call for more of them has written."""
    while any(one.image.is_file() for one in labelled_samples(masks, output, count + 1)[count * len(masks) :]):
        count += 1
    return labelled_samples(masks, output, count)


def folder_files(samples: Sequence[LabelledSample], source: ImageSource) -> dict[str, str]:
    """dataset.json, in the form of nnU-Net, and patients.csv of all images in the folder."""
    classes = source.generator.mask_classes
    dataset = {
        "channel_names": {str(i): name for i, name in enumerate(source.saved.card["channels"])},
        "labels": {name: value for value, name in sorted(classes.items())},
        "numTraining": len(samples),
        "file_ending": _suffix(samples[0].mask),
        "description": f"images drawn by {source.saved.signature}",
    }
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(COLUMNS)
    rows.writerows((sample.name, sample.mask.patient) for sample in samples)
    return {"dataset.json": json.dumps(dataset, indent=2) + "\n", PATIENTS: text.getvalue()}


@dataclass(eq=False)
class _Open:
    """A sample whose slices are being drawn."""

    sample: LabelledSample
    placed: PlacedMask
    images: list[Tensor] = field(default_factory=list)


def draw_missing(samples: Sequence[LabelledSample], source: ImageSource, on_progress: OnProgress) -> None:
    """Draw and write the samples whose image does not exist. The label is written first: a case with an image is whole.

    Slices of all samples share batches.
    """
    missing = [sample for sample in samples if not sample.image.is_file()]
    if missing:
        for folder in (missing[0].image.parent, missing[0].label.parent):
            folder.mkdir(parents=True, exist_ok=True)
    written = 0
    batch: list[tuple[_Open, int]] = []

    def on_step(done: int, total: int) -> None:
        begun = len({id(one) for one, _ in batch})
        share = (written + begun * done / total) / len(missing)
        on_progress(f"images of masks: {written} of {len(missing)}, step {done} of {total}", min(share, 1.0))

    def draw() -> None:
        nonlocal written
        labels = torch.stack([one.placed.labels[k] for one, k in batch])
        seeds = [_seed(source, one.sample, k) for one, k in batch]
        for (one, _), image in zip(batch, source.draw_masks(labels, seeds, on_step), strict=True):
            one.images.append(image)
            if len(one.images) == len(one.placed.labels):
                _write(one, source)
                one.images.clear()
                written += 1
        on_progress(f"images of masks: {written} of {len(missing)}", written / len(missing))

    for place in _places(missing, source):
        batch.append(place)
        if len(batch) == source.options.batch_size:
            draw()
            batch.clear()
    if batch:
        draw()


def _places(samples: Sequence[LabelledSample], source: ImageSource) -> Iterator[tuple[_Open, int]]:
    """Every slice of every sample, or every sample of a model of volumes. Label maps are read when they are needed."""
    for sample in samples:
        one = _Open(sample, place_mask(read_labels(sample.mask.path), source.generator))
        yield from ((one, k) for k in range(len(one.placed.labels)))


def _seed(source: ImageSource, sample: LabelledSample, place: int) -> int:
    return derive_seed(derive_seed(source.options.seed, sample.mask.name), sample.number, place)


def _write(one: _Open, source: ImageSource) -> None:
    image, volume, sample = one.placed.restored(torch.stack(one.images)), one.placed.volume, one.sample
    classes = {value: name for value, name in source.generator.mask_classes.items() if value}
    write_labels(volume.data, volume, sample.label, label_table(classes))
    if is_image(sample.image):
        write_files(sample.image.parent, {sample.image.name: png(_picture(image))})
    else:
        write_map(image, volume.described(source.saved.signature), sample.image)


def contact_sheet(samples: Sequence[LabelledSample], source: ImageSource) -> npt.NDArray[np.uint8]:
    """The first images, each beside itself with the outlines of its mask; of a volume the slice with the largest mask.

    Slices are drawn in the radiological convention, image files as they are.
    """
    colours = class_colours({value: name for value, name in source.generator.mask_classes.items() if value})
    tiles = []
    for sample in samples[:SHOWN]:
        if is_image(sample.image):
            image, mask = read_png(sample.image), read_png(sample.label)[..., 0]
        else:
            volume, labels = read_map(sample.image).oriented("LAS"), read_labels(sample.label).oriented("LAS")
            place = int((labels.data > 0).sum((0, 1, 2)).argmax()) if labels.data.any() else labels.shape[2] // 2
            image = volume.data[..., place].permute(2, 1, 0).flip(0).round().to(torch.uint8).numpy()
            mask = labels.data[0, ..., place].T.flip(0).numpy()
        times = max(1, TILE_PIXELS // max(mask.shape))
        image, mask = (array.repeat(times, 0).repeat(times, 1) for array in (image, mask))
        plain = np.ascontiguousarray(np.broadcast_to(image, (*mask.shape, 3)))
        tiles += [plain, outlined(plain, mask, colours)]
    height, width = (max(tile.shape[axis] for tile in tiles) for axis in (0, 1))
    padded = [np.pad(tile, ((0, height - len(tile)), (0, width - tile.shape[1]), (0, 0))) for tile in tiles]
    images = to_unit(torch.from_numpy(np.stack(padded)).movedim(-1, 1))
    return grid(images, columns=2 * math.ceil(math.sqrt(len(tiles) / 4)))


def read_png(path: Path) -> np.ndarray:
    """Read a sampled image, (H, W, 1 or 3) uint8."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            pixels = np.array(image)
    except OSError as error:
        raise InputError(path, f"a broken image ({error})", "a PNG", "delete it and sample again") from error
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _picture(image: Tensor) -> npt.NDArray[np.uint8]:
    """(H, W, 3) or (H, W) uint8 of an image (C, W, H, 1), as in an image file."""
    pixels: npt.NDArray[np.uint8] = image[..., 0].permute(2, 1, 0).round().to(torch.uint8).numpy()
    return pixels[..., 0] if pixels.shape[-1] == 1 else pixels
