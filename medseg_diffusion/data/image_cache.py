"""Packed images: a collection decoded once into one memory-mapped uint8 array.

Any image is read in microseconds, and the collection takes no RAM. A packed collection is a folder with two files:

images.u8     all images, (N, *size, channels) uint8, without a header
masks.u8      their masks, (N, *size) uint8, if they have masks
index.json    shape, class names, labels, splits, names, skipped files
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from medseg_diffusion.errors import InputError
from medseg_diffusion.files import whole_folder
from medseg_diffusion.volumes.paths import file_states
from medseg_diffusion.volumes.preprocessing import Preprocessing

from .cases import Bounds, SplitName, split_of_patients
from .file_lists import FileList
from .image_files import PLAIN, Pixels
from .images import ImageCollection, find_images

VERSION = 6
"""Version of the packed content. After a change of it, collections are packed again."""
VOXELS_AT_ONCE = 2**21
"""Positions that an autoencoder computes together, about."""


@dataclass(frozen=True, eq=False)
class PackedImages:
    """A packed collection.

    Attributes:
        folder: the folder of the packed collection.
        images: (N, *size, channels) uint8, memory-mapped and read-only.
        labels: (N,) int64, -1 without a class.
        parts: split -> positions of its images.
        classes: class names by label.
        names: name of the file of each image.
        skipped: broken files that were left out.
        draws: positions of the images of one training epoch, with repetitions; empty if an epoch is the training split.
        held_out: bounds of the splits by hash; None if the collection has official splits.
        masks: (N, *size) uint8 labels of every pixel, memory-mapped and read-only; None for images without masks.
        mask_classes: names of the masks' labels by value, background first.
    """

    folder: Path
    images: Pixels
    labels: npt.NDArray[np.int64]
    parts: Mapping[SplitName, npt.NDArray[np.int64]]
    classes: tuple[str, ...]
    names: tuple[str, ...]
    skipped: tuple[str, ...]
    draws: npt.NDArray[np.int64]
    held_out: Bounds | None
    masks: Pixels | None = None
    mask_classes: tuple[str, ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the folder's name alone. A memory map would be sent to worker processes as a copy of the file."""
        return open_packed, (self.folder,)

    def part(self, name: SplitName) -> npt.NDArray[np.int64]:
        """Positions of the images of one split; may be empty."""
        return self.parts.get(name, np.zeros(0, np.int64))

    @property
    def epoch(self) -> npt.NDArray[np.int64]:
        """Positions of the images of one training epoch."""
        return self.draws if len(self.draws) else self.part("train")


def packed(
    source: Path | FileList,
    store: Path,
    size: int | Sequence[int],
    channels: int = 3,
    *,
    preprocessing: Preprocessing = PLAIN,
    held_out: tuple[int, int] = (0, 0),
    skip_broken: bool = False,
    on_file: Callable[[int, int], None] = lambda done, total: None,
) -> PackedImages:
    """The images of a folder, zip or list. The first call packs them into ``store``; later calls open them there.

    Args:
        source: what `find_images` reads.
        store: folder of packed collections. A changed source is packed into a new one.
        size: side of the images, or the sides of slices (2) or whole volumes (3).
        channels: 1 or 3.
        preprocessing: preprocessing of scans.
        held_out: number of groups (scans or images) in the test and validation splits, chosen by the SHA-256 of their
            names (`split_of_patients`). It is ignored if the collection has official splits.
        skip_broken: leave broken files out instead of stopping.
        on_file: called with (files done, files in all) while packing.

    Raises:
        InputError: no image, a broken file, or too few groups to hold out this many.
    """
    if isinstance(source, Path) and not source.exists():
        raise InputError(source, "no such file or folder", "a zip or folder of images", "check the path")
    sides = (size, size) if isinstance(size, int) else tuple(size)
    collection = find_images(source)
    # A collection with official splits is packed once for all values of held_out.
    held_out = (0, 0) if all(entry.part for entry in collection.entries) else held_out
    about = [
        str(collection.source.resolve()),
        _state(source),
        sides,
        channels,
        asdict(preprocessing),
        held_out,
        skip_broken,
    ]
    about.append(VERSION)
    key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
    folder = store / f"{collection.source.stem}-{'x'.join(map(str, sides))}-{key}"
    if not (folder / "index.json").is_file():
        with whole_folder(folder) as temporary:
            _pack(collection, temporary, sides, channels, preprocessing, held_out, skip_broken, on_file)
    return open_packed(folder)


def open_packed(folder: Path) -> PackedImages:
    """Open a packed collection without reading its images."""
    index = json.loads((folder / "index.json").read_text())
    images = np.memmap(folder / "images.u8", np.uint8, "r", shape=tuple(index["shape"]))
    parts = {part: np.asarray(positions, np.int64) for part, positions in index["parts"].items()}
    labels, draws = (np.asarray(index.get(key, []), np.int64) for key in ("labels", "draws"))
    classes, names, skipped = (tuple(index[key]) for key in ("classes", "names", "skipped"))
    held_out = None if index["held_out"] is None else Bounds(**index["held_out"])
    mask_classes = tuple(index.get("mask_classes", []))
    masks = np.memmap(folder / "masks.u8", np.uint8, "r", shape=tuple(index["shape"][:-1])) if mask_classes else None
    return PackedImages(folder, images, labels, parts, classes, names, skipped, draws, held_out, masks, mask_classes)


def _pack(
    collection: ImageCollection,
    folder: Path,
    size: Sequence[int],
    channels: int,
    preprocessing: Preprocessing,
    held_out: tuple[int, int],
    skip_broken: bool,
    on_file: Callable[[int, int], None],
) -> None:
    splits = _splits(collection, held_out)
    skipped: list[str] = []

    def rows() -> Iterator[Row]:
        for i, entry in enumerate(collection.entries):
            try:
                images = collection.pixels(entry, size, channels, preprocessing)
            except InputError:
                if not skip_broken:
                    raise
                skipped.append(entry.name)
                continue
            yield Row(entry.name, entry.label, entry.part or splits[entry.group], images)
            on_file(i + 1, len(collection.entries))

    bounds = Bounds.of(splits) if splits else None
    write_packed(folder, rows(), collection.source, (*size, channels), collection.classes, skipped, held_out=bounds)


@dataclass(frozen=True, eq=False)
class Row:
    """The images (n, *size, channels) of one file, all of one class and split, and their masks (n, *size) if any."""

    name: str
    label: int
    part: SplitName
    images: Pixels
    masks: Pixels | None = None


# many: one for each entry of the index
def write_packed(
    folder: Path,
    rows: Iterable[Row],
    source: Path,
    shape: Sequence[int],
    classes: Sequence[str] = (),
    skipped: Sequence[str] = (),
    draws: Sequence[int] = (),
    held_out: Bounds | None = None,
    mask_classes: Sequence[str] = (),
) -> None:
    """Write a packed collection into an empty folder.

    Args:
        folder: the empty folder.
        rows: the images, file by file.
        source: the collection, for messages.
        shape: (*size, channels) of an image.
        classes: class names by label.
        skipped: names of broken files. It may grow while ``rows`` is consumed.
        draws: see `PackedImages`. It may grow while ``rows`` is consumed.
        held_out: see `PackedImages`.
        mask_classes: see `PackedImages`. With it, every row has masks.

    Raises:
        InputError: no image to train on.
    """
    labels: list[int] = []
    names: list[str] = []
    parts: dict[str, list[int]] = {}
    with ExitStack() as files:
        file = files.enter_context((folder / "images.u8").open("wb"))
        masks = files.enter_context((folder / "masks.u8").open("wb")) if mask_classes else None
        for row in rows:
            file.write(np.ascontiguousarray(row.images).tobytes())
            if masks is not None:
                assert row.masks is not None
                masks.write(np.ascontiguousarray(row.masks).tobytes())
            first = len(names)
            names += [row.name] * len(row.images)
            labels += [row.label] * len(row.images)
            parts.setdefault(row.part, []).extend(range(first, len(names)))
    if not parts.get("train"):
        raise InputError(source, "no image to train on", "at least one whole image", "check the folder")
    index = {
        "shape": [len(names), *shape],
        "classes": list(classes),
        "parts": parts,
        "labels": labels,
        "names": names,
        "skipped": list(skipped),
        "draws": list(draws),
        "held_out": None if held_out is None else asdict(held_out),
        "mask_classes": list(mask_classes),
    }
    (folder / "index.json").write_text(json.dumps(index))


def _splits(collection: ImageCollection, held_out: tuple[int, int]) -> dict[str, SplitName]:
    """Group -> split, for the groups without an official split."""
    groups = {entry.group for entry in collection.entries if entry.part is None}
    if groups and len(groups) <= sum(held_out):
        raise InputError(
            collection.source,
            f"{len(groups)} {'scans or subfolders of them' if collection.kind == 'scans' else 'files'}",
            f"more than {held_out[0]} for testing and {held_out[1]} for validation",
            "lower data.test_images or data.validation_images",
        )
    return split_of_patients(sorted(groups), *held_out) if groups else {}


def _state(source: Path | FileList) -> list[object]:
    """Sizes and modification times of all files: they change when the source does."""
    if isinstance(source, FileList):
        listed = [(entry.name, entry.patient, entry.category, file_states(entry.images)) for entry in source.entries]
        return [len(listed), hashlib.sha256(str(listed).encode()).hexdigest()]
    files = [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file())
    stats = [(str(file.relative_to(source)), file.stat()) for file in files]
    return [len(files), hashlib.sha256(str([(n, s.st_size, s.st_mtime_ns) for n, s in stats]).encode()).hexdigest()]


def images_at_once(size: Sequence[int], most: int) -> int:
    """How many images of ``size`` an autoencoder computes together: ``most``, or fewer volumes."""
    return max(1, min(most, VOXELS_AT_ONCE // math.prod(size)))


def mirrored_axis(ndim: int) -> int:
    """The left-right axis of a picture (H, W) or a RAS volume (I, J, K), counted from the last axis: -1 or -3."""
    return -1 if ndim == 2 else -3


class ImageExamples:
    """Packed images as training examples, each mirrored left to right with probability 1/2 if ``flip``."""

    def __init__(self, images: PackedImages, positions: npt.NDArray[np.int64], flip: bool = True) -> None:
        self.images = images
        self.positions = positions
        self.flip = flip

    def __len__(self) -> int:
        return len(self.positions)

    def example(self, index: int, generator: torch.Generator) -> Mapping[str, Tensor]:
        """The "image" (C, *size) float32 in [-1, 1] and "label" () int64; of images with masks "mask" (*size) uint8."""
        position = self.positions[index]
        pixels = np.moveaxis(self.images.images[position], -1, 0)
        mirrored = self.flip and float(torch.rand((), generator=generator)) < 0.5
        if mirrored:
            pixels = np.flip(pixels, mirrored_axis(pixels.ndim - 1))
        image = to_unit(torch.from_numpy(np.array(pixels)))
        label = torch.tensor(int(self.images.labels[position]))
        return {"image": image, "label": label, **mask_of(self.images, position, mirrored)}


def mask_of(images: PackedImages, position: int, mirrored: bool) -> dict[str, Tensor]:
    """The "mask" (*size) uint8 of an image, mirrored left to right if so; empty for images without masks."""
    if images.masks is None:
        return {}
    mask = images.masks[position]
    return {"mask": torch.from_numpy(np.array(np.flip(mask, mirrored_axis(mask.ndim)) if mirrored else mask))}


def to_unit(pixels: Tensor) -> Tensor:
    """Converts uint8 levels 0..255 to float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def to_levels(image: Tensor) -> Tensor:
    """The inverse of `to_unit`: float images in [-1, 1] to uint8 levels. Values beyond that range are clipped."""
    return ((image.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
