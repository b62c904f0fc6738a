"""Images decoded once into one memory-mapped uint8 array: any image in microseconds, no copy of the collection in RAM.

images.u8     all images, (N, *size, channels) uint8, nothing else
index.json    shape, class names, labels, sides, names, what was skipped
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from medseg_diffusion.errors import InputError
from medseg_diffusion.files import whole_folder
from medseg_diffusion.volumes.preprocessing import Preprocessing

from .cases import Bounds, Side, split_of_patients
from .images import PLAIN, ImageCollection, Part, Pixels, find_images

VERSION = 4
"""Of what files become; a higher one packs them again."""


@dataclass(frozen=True, eq=False)
class PackedImages:
    """A packed collection.

    Attributes:
        folder: where it lies.
        images: (N, *size, channels) uint8, memory-mapped and read-only.
        labels: (N,) int64, -1 without a class.
        parts: side to the positions of its images.
        classes: names by label.
        names: of the files, one an image.
        skipped: broken files that were left out.
        draws: positions that an epoch of training passes through, some of them repeatedly; empty for the training side.
        held_out: where the sides by hash end; None where the collection names its sides itself.
    """

    folder: Path
    images: Pixels
    labels: npt.NDArray[np.int64]
    parts: Mapping[Part, npt.NDArray[np.int64]]
    classes: tuple[str, ...]
    names: tuple[str, ...]
    skipped: tuple[str, ...]
    draws: npt.NDArray[np.int64]
    held_out: Bounds | None

    def __reduce__(self) -> tuple[Any, ...]:
        """For worker processes: a memory map would travel as a copy of the whole file."""
        return open_packed, (self.folder,)

    def part(self, name: Part) -> npt.NDArray[np.int64]:
        """Positions of the images of one side; empty where there are none."""
        return self.parts.get(name, np.zeros(0, np.int64))

    @property
    def epoch(self) -> npt.NDArray[np.int64]:
        """Positions of the images that training draws from."""
        return self.draws if len(self.draws) else self.part("train")


def packed(
    source: Path,
    store: Path,
    size: int | Sequence[int],
    channels: int = 3,
    *,
    preprocessing: Preprocessing = PLAIN,
    held_out: tuple[int, int] = (0, 0),
    skip_broken: bool = False,
    on_file: Callable[[int, int], None] = lambda done, total: None,
) -> PackedImages:
    """The images of a folder or zip, packed into ``store`` at the first call and opened from there ever after.

    Args:
        source: what `find_images` reads.
        store: folder of packed collections; a changed source gets a new one.
        size: side of the images, or three sides of whole volumes.
        channels: 1 or 3.
        preprocessing: of scans.
        held_out: numbers of groups (scans or images) for the test and validation sides where the collection itself
            names none; those of smallest SHA-256 of the name.
        skip_broken: leave broken files out instead of stopping.
        on_file: called with (files done, files in all) while packing.

    Raises:
        InputError: nothing to read, a broken file, or too few images to hold any out.
    """
    if not source.exists():
        raise InputError(source, "no such file or folder", "a zip or folder of images", "check the path")
    sides = (size, size) if isinstance(size, int) else tuple(size)
    found = find_images(source)
    # A collection that names its sides itself is packed once, however many are asked to be held out.
    held_out = (0, 0) if all(entry.part for entry in found.entries) else held_out
    about = [str(source.resolve()), _state(source), sides, channels, asdict(preprocessing), held_out, skip_broken]
    about.append(VERSION)
    key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
    folder = store / f"{source.stem}-{'x'.join(map(str, sides))}-{key}"
    if not (folder / "index.json").is_file():
        with whole_folder(folder) as temporary:
            _pack(found, temporary, sides, channels, preprocessing, held_out, skip_broken, on_file)
    return open_packed(folder)


def open_packed(folder: Path) -> PackedImages:
    """Opens a packed collection without reading its images."""
    index = json.loads((folder / "index.json").read_text())
    images = np.memmap(folder / "images.u8", np.uint8, "r", shape=tuple(index["shape"]))
    parts = {part: np.asarray(positions, np.int64) for part, positions in index["parts"].items()}
    labels, draws = (np.asarray(index.get(key, []), np.int64) for key in ("labels", "draws"))
    classes, names, skipped = (tuple(index[key]) for key in ("classes", "names", "skipped"))
    held_out = None if index["held_out"] is None else Bounds(**index["held_out"])
    return PackedImages(folder, images, labels, parts, classes, names, skipped, draws, held_out)


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
    sides = _sides(collection, held_out)
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
            yield Row(entry.name, entry.label, entry.part or sides[entry.group], images)
            on_file(i + 1, len(collection.entries))

    bounds = Bounds.of(sides) if sides else None
    write_packed(folder, rows(), collection.source, (*size, channels), collection.classes, skipped, held_out=bounds)


@dataclass(frozen=True, eq=False)
class Row:
    """Images (n, *size, channels) of one file, of one class and side."""

    name: str
    label: int
    part: Part
    images: Pixels


def write_packed(
    folder: Path,
    rows: Iterable[Row],
    source: Path,
    shape: Sequence[int],
    classes: Sequence[str] = (),
    skipped: Sequence[str] = (),
    draws: Sequence[int] = (),
    held_out: Bounds | None = None,
) -> None:
    """Writes a packed collection into an empty folder; ``skipped`` and ``draws`` may still grow as ``rows`` are taken.

    Raises:
        InputError: nothing to train on.
    """
    labels: list[int] = []
    names: list[str] = []
    parts: dict[str, list[int]] = {}
    with (folder / "images.u8").open("wb") as file:
        for row in rows:
            file.write(np.ascontiguousarray(row.images).tobytes())
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
    }
    (folder / "index.json").write_text(json.dumps(index))


def _sides(collection: ImageCollection, held_out: tuple[int, int]) -> dict[str, Side]:
    """Side of every group that has no official one."""
    groups = {entry.group for entry in collection.entries if entry.part is None}
    if groups and len(groups) <= sum(held_out):
        raise InputError(
            collection.source,
            f"{len(groups)} {'scans or subfolders of them' if collection.kind == 'scans' else 'files'}",
            f"more than {held_out[0]} for testing and {held_out[1]} for validation",
            "lower data.test_images or data.validation_images",
        )
    return split_of_patients(sorted(groups), *held_out) if groups else {}


def _state(source: Path) -> list[object]:
    """What changes when the source does: sizes and times of all files."""
    files = [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file())
    stats = [(str(file.relative_to(source)), file.stat()) for file in files]
    return [len(files), hashlib.sha256(str([(n, s.st_size, s.st_mtime_ns) for n, s in stats]).encode()).hexdigest()]


def mirrored_axis(ndim: int) -> int:
    """The axis from left to right of a picture (H, W) or a RAS volume (I, J, K), counted from the last: -1 or -3."""
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
        """The "image" (C, *size) float32 in [-1, 1] and "label" () int64."""
        position = self.positions[index]
        pixels = np.moveaxis(self.images.images[position], -1, 0)
        if self.flip and float(torch.rand((), generator=generator)) < 0.5:
            pixels = np.flip(pixels, mirrored_axis(pixels.ndim - 1))
        image = to_unit(torch.from_numpy(np.array(pixels)))
        return {"image": image, "label": torch.tensor(int(self.images.labels[position]))}


def to_unit(pixels: Tensor) -> Tensor:
    """uint8 levels 0..255 to float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def to_levels(image: Tensor) -> Tensor:
    """Float images in [-1, 1] to uint8 levels, values outside clipped: the inverse of `to_unit` on its range."""
    return ((image.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
