"""Folders and zips of images, and folders of scans, as one kind of collection: Tiny ImageNet first.

Three layouts are told apart by what is there:

"tiny-imagenet"  wnids.txt, words.txt, train/<wnid>/images/ with <wnid>_boxes.txt, val/ with val_annotations.txt, test/
"images"         images anywhere below; where all of them lie in subfolders, the first folder is the class
"scans"          volumes (NIfTI, NRRD, MetaImage): their slices across the third axis (RAS), or the whole volumes

A folder and a zip of it are the same collection. Of a folder of labelled images (imagesTr/ beside labelsTr/, images/
beside labels/ or masks/) only the images are taken, in groups by patient as `medseg_diffusion.data.cases` has them, so
that the sides of a split are the same there.
"""

from __future__ import annotations

import io
import lzma
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError

from medseg_diffusion.errors import InputError
from medseg_diffusion.volumes.fitting import to_generator_grid
from medseg_diffusion.volumes.io import read_volume
from medseg_diffusion.volumes.paths import RESULTS, SUFFIXES, VOLUME_SUFFIXES, scan_name
from medseg_diffusion.volumes.preprocessing import Preprocessing

Kind = Literal["tiny-imagenet", "images", "scans"]
Part = Literal["train", "validation", "test"]
Pixels = npt.NDArray[np.uint8]

IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".tif", ".tiff", ".webp")
FOREGROUND_SHARE = 0.1
"""A scan's slice is an image if so much of it is brighter than the scan's darkest level: the rest would be black."""
UNLABELLED = -1
PLAIN = Preprocessing()
"""Of scans: RAS, voxels as they are, percentiles of the intensities."""


@dataclass(frozen=True)
class Entry:
    """One file of a collection.

    Attributes:
        name: where it is, relative to the collection.
        group: what must stay on one side of a split: the scan, or the image itself.
        label: class, `UNLABELLED` without one.
        part: the official side, or None where there is none.
        box: (x0, y0, x1, y1) of the object in pixels, where the collection says.
    """

    name: str
    group: str
    label: int = UNLABELLED
    part: Part | None = None
    box: tuple[int, int, int, int] | None = None


@dataclass(frozen=True, eq=False)
class ImageCollection:
    """What `find_images` found; ``classes`` are names by label, empty if there are none."""

    source: Path
    kind: Kind
    entries: tuple[Entry, ...]
    classes: tuple[str, ...]
    read: Callable[[str], bytes] = field(repr=False)

    def pixels(self, entry: Entry, size: Sequence[int], channels: int, preprocessing: Preprocessing = PLAIN) -> Pixels:
        """The images of an entry, (n, *size, channels) uint8: one, or the slices of a scan.

        Images are cropped to their central square and resized; scans are preprocessed and fitted as a whole
        (`medseg_diffusion.volumes.fitting`). Greyscale becomes RGB and back as ``channels`` says.

        Args:
            entry: of this collection.
            size: two sides for images and slices, three for whole volumes.
            channels: 1 or 3.
            preprocessing: of scans.

        Raises:
            InputError: a file that cannot be read whole, levels that are no whole 8 or 16 bits, or volumes asked of
                what is none.
        """
        if self.kind == "scans":
            return _scan(self.source / entry.name, size, channels, preprocessing)
        if len(size) != 2:
            raise InputError(self.source, "images", "scans, for data.size of three sides", "give data.size one number")
        with _opened(self.source, entry.name, self.read(entry.name)) as image:
            return np.asarray(_fitted(image, size[0], channels)).reshape(1, *size, channels)


def find_images(source: Path) -> ImageCollection:
    """Reads the layout of a folder or zip.

    Raises:
        InputError: nothing there, no zip, no image, or a Tiny ImageNet with a part missing or a malformed row.
    """
    names, read = _zip(source) if source.is_file() else _folder(source)
    roots = [name.removesuffix("wnids.txt") for name in names if name.rpartition("/")[2] == "wnids.txt"]
    if roots:
        return _tiny_imagenet(source, min(roots, key=len), names, read)
    labelled = _images_beside_labels(names)
    wanted = [name for name in names if labelled is None or name.startswith(labelled + "/")]
    there = set(wanted)
    images = [name for name in wanted if name.lower().endswith(IMAGE_SUFFIXES) and not _is_result(name, there)]
    if images:
        if labelled is not None:
            entries = tuple(Entry(name, _patient(name, labelled)) for name in images)
            return ImageCollection(source, "images", entries, (), read)
        return _images(source, images, read)
    scans = [n for n in wanted if n.lower().endswith(VOLUME_SUFFIXES) and not scan_name(n).endswith(RESULTS)]
    if source.is_dir() and scans:
        groups = _patients(scans) if labelled is None else [_patient(name, labelled) for name in scans]
        entries = tuple(Entry(name, group) for name, group in zip(scans, groups, strict=True))
        return ImageCollection(source, "scans", entries, (), read)
    raise InputError(
        source,
        f"{len(names)} files, none of them an image",
        f"Tiny ImageNet, or files that end with {', '.join(IMAGE_SUFFIXES)} or {', '.join(VOLUME_SUFFIXES)}",
        "check the path given with --data",
    )


def _is_result(name: str, names: set[str]) -> bool:
    """Whether an image is the mask or the preview that `medseg segment` wrote beside the scan of the same name."""
    for ending in ("_seg.png", "_preview.png"):
        if name.endswith(ending):
            scan = name.removesuffix(ending)
            return any(scan + suffix in names for suffix in (*IMAGE_SUFFIXES, *VOLUME_SUFFIXES))
    return False


def _images_beside_labels(names: Sequence[str]) -> str | None:
    """The folder of images in a labelled collection, None in any other."""
    folders = {name.partition("/")[0] for name in names if "/" in name}
    for images, labels in (("imagesTr", "labelsTr"), ("images", "labels"), ("images", "masks")):
        if {images, labels} <= folders:
            return images
    return None


def _patients(names: Sequence[str]) -> list[str]:
    """Of scans that no labels tell apart: the first subfolder that a scan is in, else its name without suffix.

    A single folder around everything is no patient.
    """
    parts = _without_common_folder(names)
    return [p[0] if len(p) > 1 else scan_name(p[0]) for p in parts]


def _without_common_folder(names: Sequence[str]) -> list[list[str]]:
    """The parts of the paths, less the folders that are around all of them (as zips often have)."""
    parts = [name.split("/") for name in names]
    while all(len(p) > 1 for p in parts) and len({p[0] for p in parts}) == 1:
        parts = [p[1:] for p in parts]
    return parts


def _patient(name: str, images: str) -> str:
    """The subfolder of ``images`` that a file is in, else the file's name without suffix."""
    parts = name.removeprefix(images + "/").split("/")
    if len(parts) > 1:
        return parts[0]
    return scan_name(name) if name.lower().endswith(SUFFIXES) else Path(name).stem


_BROKEN_ENTRY = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, OSError, EOFError, RuntimeError, ValueError)
"""What zipfile raises: RuntimeError where an entry is encrypted or its compression unknown, ValueError for its name."""


def _zip(source: Path) -> tuple[list[str], Callable[[str], bytes]]:
    try:
        archive = zipfile.ZipFile(source)
    except (zipfile.BadZipFile, OSError) as error:
        raise InputError(
            source, f"no readable zip ({error})", "a zip or a folder of images", "download or unpack it again"
        ) from error
    names = [name for name in archive.namelist() if not name.endswith("/") and "__MACOSX" not in name]

    def read(name: str) -> bytes:
        try:
            return archive.read(name)
        except _BROKEN_ENTRY as error:
            raise InputError(f"{source}/{name}", f"an unreadable entry ({error})", "a whole file", _REPAIR) from error

    return sorted(names), read


def _folder(source: Path) -> tuple[list[str], Callable[[str], bytes]]:
    if not source.is_dir():
        raise InputError(source, "no such file or folder", "a zip or folder of images", "check the path")
    files = (path.relative_to(source) for path in source.rglob("*") if path.is_file())
    names = sorted(path.as_posix() for path in files if not any(part.startswith(".") for part in path.parts))
    return names, lambda name: (source / name).read_bytes()


def _tiny_imagenet(source: Path, root: str, names: Sequence[str], read: Callable[[str], bytes]) -> ImageCollection:
    """The official layout. Classes are numbered in the order of their sorted ids, as ImageFolder would do."""
    there = set(names)

    def lines(name: str) -> dict[int, list[str]]:
        if root + name not in there:
            raise InputError(f"{source}/{root}{name}", "no such file", "the official Tiny ImageNet", _REPAIR)
        text = read(root + name).decode(errors="replace")
        return {i: line.split("\t") for i, line in enumerate(text.splitlines(), start=1) if line.strip()}

    def boxed(name: str, names: int) -> Iterator[tuple[str, list[str], tuple[int, int, int, int]]]:
        for i, row in lines(name).items():
            where = f"{source}/{root}{name}, line {i}"
            try:
                x0, y0, x1, y1 = map(int, row[names : names + 4])
            except ValueError as error:
                wanted = f"{names + 4} columns between tabs, the last four whole numbers (x0, y0, x1, y1)"
                raise InputError(where, f"{' '.join(row)[:80]!r}", wanted, _REPAIR) from error
            yield where, row, (x0, y0, x1, y1)

    wnids = sorted(line[0].strip() for line in lines("wnids.txt").values())
    words = {line[0]: line[-1] for line in lines("words.txt").values()} if root + "words.txt" in there else {}
    label = {wnid: i for i, wnid in enumerate(wnids)}
    inside: dict[str, list[str]] = {}
    for name in names:
        if name.lower().endswith(IMAGE_SUFFIXES) and name.startswith(root):
            inside.setdefault(name.rpartition("/")[0].removeprefix(root), []).append(name)
    entries: list[Entry] = []
    for wnid in wnids:
        folder = f"train/{wnid}/images"
        if folder not in inside:
            raise InputError(f"{source}/{root}{folder}", "no images", f"those of class {wnid} in wnids.txt", _REPAIR)
        noted = f"train/{wnid}/{wnid}_boxes.txt"
        boxes = {row[0]: box for _, row, box in boxed(noted, 1)} if root + noted in there else {}
        entries += [
            Entry(name, name, label[wnid], "train", boxes.get(name.rpartition("/")[2])) for name in inside[folder]
        ]
    for where, row, box in boxed("val/val_annotations.txt", 2) if "val/images" in inside else ():
        name = f"{root}val/images/{row[0]}"
        if row[1] not in label:
            raise InputError(where, f"class {row[1]}", "a class of wnids.txt", _REPAIR)
        if name in there:
            entries.append(Entry(name, name, label[row[1]], "validation", box))
    entries += [Entry(name, name, UNLABELLED, "test") for name in inside.get("test/images", [])]
    classes = tuple(words.get(wnid, wnid).partition(",")[0] for wnid in wnids)
    return ImageCollection(source, "tiny-imagenet", tuple(entries), classes, read)


def _images(source: Path, names: Sequence[str], read: Callable[[str], bytes]) -> ImageCollection:
    """Plain images; a single folder around everything is no class."""
    parts = _without_common_folder(names)
    classes = sorted({p[0] for p in parts}) if all(len(p) > 1 for p in parts) else []
    label: Mapping[str, int] = {name: i for i, name in enumerate(classes)}
    # Of a flat folder, names without suffix: as where the same images lie beside their labels.
    flat = all(len(p) == 1 for p in parts)
    entries = [
        Entry(n, Path(p[0]).stem if flat else n, label.get(p[0], UNLABELLED)) for n, p in zip(names, parts, strict=True)
    ]
    return ImageCollection(source, "images", tuple(entries), tuple(classes), read)


def _opened(source: Path, name: str, content: bytes) -> Image.Image:
    """The image decoded whole: PIL itself stays silent about a truncated file until its pixels are asked for."""
    try:
        image = Image.open(io.BytesIO(content))
        image.load()
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(
            f"{source}/{name}",
            f"a broken image ({error})",
            "a whole image",
            "replace it, or leave it out with --skip-broken",
        ) from error
    levels = np.asarray(image) if image.mode == "I" else np.zeros(1)
    if image.mode == "F" or levels.min() < 0 or levels.max() > 65535:
        raise InputError(
            f"{source}/{name}",
            f"levels that no 16 bits hold (mode {image.mode})",
            "whole levels of 8 or 16 bits",
            "convert it, or leave it out with --skip-broken",
        )
    return image


def _eight_bits(image: Image.Image) -> Image.Image:
    """Greyscale of mode I or I;16 as L, 65535 as 255: Pillow's own conversion cuts off everything above 255.

    Levels of mode I, whose depth is not stated, are of 8 bits if none is above 255; older Pillow reads a PNG's 16 so.
    """
    levels = np.asarray(image).astype(np.int64)
    deep = image.mode != "I" or image.format == "PNG" or levels.max() > 255
    return Image.fromarray(((levels + 128) // 257 if deep else levels).astype(np.uint8))


def _fitted(image: Image.Image, size: int, channels: int) -> Image.Image:
    image = (_eight_bits(image) if image.mode.startswith("I") else image).convert("L" if channels == 1 else "RGB")
    side = min(image.size)
    if image.size != (size, size):
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.resize((size, size), Image.Resampling.BOX if side >= 2 * size else Image.Resampling.BICUBIC,
                             box=(left, top, left + side, top + side))  # fmt: skip
    return image


def _scan(file: Path, size: Sequence[int], channels: int, preprocessing: Preprocessing) -> Pixels:
    """The slices of a scan that show something, or the whole scan, its percentiles spread over 0..255."""
    volume, _ = preprocessing.apply(read_volume(file))
    volume = volume.clamp(-1, 1)
    images = volume[None] if len(size) == 3 else volume.movedim(-1, 0)
    if len(size) == 2:
        shown = (images > -0.9).flatten(1).float().mean(1) >= FOREGROUND_SHARE
        images = images[shown]
    levels = ((to_generator_grid(images, size) + 1) * 127.5).round().to(torch.uint8)
    return levels.movedim(1, -1).expand(*levels.shape[:1], *size, channels).numpy()


_REPAIR = "download the official archive again"


@dataclass
class ImageCheck:
    """What `medseg check` says of a collection of images."""

    kind: Kind
    parts: dict[str, int]
    classes: int
    images_per_class: tuple[int, int] | None
    sizes: dict[str, int]
    modes: dict[str, int]
    broken: list[str]

    def rows(self) -> dict[str, Any]:
        """The findings by name."""
        per_class = "-" if self.images_per_class is None else "{} to {}".format(*self.images_per_class)
        return {
            "layout": self.kind,
            **{f"{part} files": count for part, count in self.parts.items()},
            "classes": self.classes,
            "training files per class": per_class,
            "sizes": ", ".join(f"{size} ({count})" for size, count in self.sizes.items()),
            "colours": ", ".join(f"{mode} ({count})" for mode, count in self.modes.items()),
            "broken files": len(self.broken),
        }


def check_images(
    collection: ImageCollection, on_file: Callable[[int, int], None] = lambda done, total: None
) -> ImageCheck:
    """Opens every file and counts; broken ones are listed, not raised."""
    sizes: Counter[str] = Counter()
    modes: Counter[str] = Counter()
    broken = []
    for i, entry in enumerate(collection.entries):
        try:
            if collection.kind == "scans":
                volume = read_volume(collection.source / entry.name)
                sizes[" x ".join(map(str, volume.shape))] += 1
                modes[f"{len(volume.data)} channels"] += 1
            else:
                with _opened(collection.source, entry.name, collection.read(entry.name)) as image:
                    sizes["{} x {}".format(*image.size)] += 1
                    modes[image.mode] += 1
        except InputError as error:
            broken.append(str(error))
        on_file(i + 1, len(collection.entries))
    parts = Counter[str](entry.part or "all" for entry in collection.entries)
    known = [e.label for e in collection.entries if e.label != UNLABELLED and e.part in (None, "train")]
    counts = Counter(known).values()
    per_class = (min(counts), max(counts)) if counts else None
    return ImageCheck(
        collection.kind,
        dict(parts),
        len(collection.classes),
        per_class,
        dict(sizes.most_common(5)),
        dict(modes.most_common()),
        broken,
    )
