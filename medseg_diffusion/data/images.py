"""Collections of images: folders and zips of image files, and folders of scans.

There are three layouts, recognised in this order:

"tiny-imagenet"  wnids.txt, words.txt, train/<wnid>/images/ with <wnid>_boxes.txt, val/ with val_annotations.txt, test/
"images"         images at any depth; if all of them are in subfolders, the first folder is the class
"scans"          volumes (NIfTI, NRRD, MetaImage): their slices across the third axis (RAS), or the whole volumes

A folder of images and scans (or DICOM series) is refused. Pictures that `medseg` itself writes, such as previews, are
no images. A folder and a zip of it are the same collection. From a folder of labelled images (imagesTr/ beside
labelsTr/, images/ beside labels/ or masks/) only the images are used. They are grouped by patient as in
`medseg_diffusion.data.cases`, so that a segmenter and a generator of the same folder have the same splits.
"""

from __future__ import annotations

import os
import posixpath
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from medseg_diffusion.errors import InputError, listed
from medseg_diffusion.volumes.archives import UNREADABLE, zip_entries
from medseg_diffusion.volumes.inputs import of_unread_formats
from medseg_diffusion.volumes.outputs import MASK_OF_IMAGE, RESULTS, SAMPLES, SEGMENTATION
from medseg_diffusion.volumes.paths import SUFFIXES, UNREAD_SUFFIXES, VOLUME_SUFFIXES, scan_name
from medseg_diffusion.volumes.preprocessing import Preprocessing
from medseg_diffusion.volumes.sources import series_below

from .cases import SplitName, case_of_image, case_of_mask
from .file_lists import FileList
from .image_files import PLAIN, Pixels, open_image, pixels_of_image, pixels_of_scan
from .patients import FILE as PATIENTS
from .patients import patients_of

Kind = Literal["tiny-imagenet", "images", "scans", "images and scans"]

IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".tif", ".tiff", ".webp")
UNLABELLED = -1


@dataclass(frozen=True)
class Entry:
    """One file of a collection.

    Attributes:
        name: path relative to the collection.
        group: all entries of a group are in the same split. It is the patient, the scan or the image itself.
        label: class, or `UNLABELLED`.
        part: the official split, or None.
        box: bounding box (x0, y0, x1, y1) of the object in pixels, if the collection has one.
    """

    name: str
    group: str
    label: int = UNLABELLED
    part: SplitName | None = None
    box: tuple[int, int, int, int] | None = None


@dataclass(frozen=True, eq=False)
class ImageCollection:
    """A collection of images, as `find_images` returns it.

    Attributes:
        source: the folder or zip.
        kind: layout. "images and scans" is one that only `images_and_scans` returns.
        entries: the files.
        classes: class names by label; empty without classes.
        read: name of an entry -> content of its file.
    """

    source: Path
    kind: Kind
    entries: tuple[Entry, ...]
    classes: tuple[str, ...]
    read: Callable[[str], bytes] = field(repr=False)

    def pixels(self, entry: Entry, size: Sequence[int], channels: int, preprocessing: Preprocessing = PLAIN) -> Pixels:
        """The images of an entry, (n, *size, channels) uint8: one image, or the slices of a scan.

        Images are cropped to their central square and resized. Scans are preprocessed and brought to the generator's
        grid as a whole (`medseg_diffusion.volumes.fitting`). Greyscale is converted to RGB, or RGB to greyscale, to
        give ``channels``.

        Args:
            entry: an entry of this collection.
            size: two sides for images and slices, three for whole volumes.
            channels: 1 or 3.
            preprocessing: preprocessing of scans.

        Raises:
            InputError: a broken file, levels that are not integers of 8 or 16 bits, or three sides for an image.
        """
        if self.kind == "scans":
            return pixels_of_scan(self.source / entry.name, size, channels, preprocessing)
        if len(size) != 2:
            raise InputError(self.source, "images", "scans, for data.size of three sides", "give data.size one number")
        with open_image(self.source, entry.name, self.read(entry.name)) as image:
            return pixels_of_image(image, size[0], channels)


def find_images(source: Path | FileList) -> ImageCollection:
    """Find the images of a folder or zip, or take those of a list: image files, or scans.

    patients.csv in a folder (`medseg_diffusion.data.patients`) says which images are of one patient. Its cases are
    paths without suffix in the folder, or in the folder of images beside labels.

    Raises:
        InputError: a missing path, a file that is no zip, no image, both images and scans, an incomplete or malformed
            Tiny ImageNet, or a patients.csv that lacks an image.
    """
    collection = _listed(source) if isinstance(source, FileList) else images_and_scans(source)
    if (mixed := mixture(collection)) is not None:
        raise mixed
    return collection


def images_and_scans(source: Path) -> ImageCollection:
    """`find_images` of a folder or zip, where both images and scans are no error, but a kind of their own.

    Raises:
        InputError: as `find_images`.
    """
    collection, cases = _collection(source)
    if not source.is_dir() or collection.kind == "images and scans":
        return collection
    names = [cases.get(entry.name) or _without_suffix(entry.name) for entry in collection.entries]
    patients = patients_of(source, names)
    grouped = [
        replace(entry, group=patients.get(name, entry.group))
        for entry, name in zip(collection.entries, names, strict=True)
    ]
    return replace(collection, entries=tuple(grouped))


def mixture(collection: ImageCollection) -> InputError | None:
    """Why a collection of images and scans is no training data; None for one of a single kind."""
    if collection.kind != "images and scans":
        return None
    names = [entry.name for entry in collection.entries]
    images, scans = [name for name in names if is_image_file(name)], [name for name in names if not is_image_file(name)]
    found = f"both images ({len(images)}: {listed(images, 2)}) and scans ({len(scans)}: {listed(scans, 2)})"
    return InputError(collection.source, found, "files of one kind", "put each kind into a folder of its own")


def is_image_file(name: str) -> bool:
    """Whether a name ends like one of `IMAGE_SUFFIXES`."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def _listed(files: FileList) -> ImageCollection:
    paths = [Path(os.path.abspath(entry.images[0])) for entry in files.entries]
    if several := [entry.images[0] for entry in files.entries if len(entry.images) > 1]:
        raise InputError(
            several[0], "one of several channels of an image", "one file for each image", "give one of them"
        )
    images = [path for path in paths if is_image_file(path.name)]
    if images and len(images) < len(paths):
        raise InputError(images[0], "an image file in a list of scans", "either of them alone", "make two lists")
    folder = Path(os.path.commonpath([path.parent for path in paths]))
    classes = sorted({entry.category for entry in files.entries if entry.category})
    entries = tuple(
        Entry(
            path.relative_to(folder).as_posix(),
            entry.patient,
            classes.index(entry.category) if entry.category else UNLABELLED,
        )
        for path, entry in zip(paths, files.entries, strict=True)
    )
    kind: Kind = "images" if images else "scans"
    return ImageCollection(folder, kind, entries, tuple(classes), lambda name: (folder / name).read_bytes())


def _collection(source: Path) -> tuple[ImageCollection, dict[str, str]]:
    """The images grouped by names alone, and the cases of images beside labels by name; empty without labels."""
    names, read = _zip(source) if source.is_file() else _folder(source)
    roots = [name.removesuffix("wnids.txt") for name in names if name.rpartition("/")[2] == "wnids.txt"]
    if roots:
        return _tiny_imagenet(source, min(roots, key=len), names, read), {}
    if source.is_file() and any(name.rpartition("/")[2] == PATIENTS for name in names):
        raise InputError(source, f"{PATIENTS} in a zip", "a folder, in which it can be read", "unpack the zip")
    if (inner := _common_folder(names)) and inner + PATIENTS in names:
        place = f"its {PATIENTS} in {inner}"
        raise InputError(source, place, "a folder that holds it itself", f"give {source / inner}")
    cases = _cases(source, names)
    candidates = list(cases) or names
    unique = set(candidates)
    images = [name for name in candidates if is_image_file(name) and not _is_result(name, unique)]
    scans = [n for n in candidates if n.lower().endswith(VOLUME_SUFFIXES) and not scan_name(n).endswith(RESULTS)]
    if images and source.is_dir() and not cases:
        scans += [path.relative_to(source).as_posix() for path in series_below(source)]
    if images and scans:
        entries = tuple(Entry(name, name) for name in (*images, *scans))
        return ImageCollection(source, "images and scans", entries, (), read), cases
    if images and not cases:
        return _images(source, images, read), cases
    if images or (source.is_dir() and scans):
        found = images or scans
        # The patient of a case is its subfolder, else its name.
        groups = [cases[name].partition("/")[0] for name in found] if cases else _patients(found)
        entries = tuple(Entry(name, group) for name, group in zip(found, groups, strict=True))
        return ImageCollection(source, "images" if images else "scans", entries, (), read), cases
    expected = f"Tiny ImageNet, or files that end with {', '.join(IMAGE_SUFFIXES)} or {', '.join(VOLUME_SUFFIXES)}"
    if unread := [name for name in names if name.lower().endswith(UNREAD_SUFFIXES)]:
        raise InputError(source, f"no image, but {of_unread_formats(unread)}", expected, "convert them to NIfTI")
    raise InputError(source, f"{len(names)} files, none of them an image", expected, "check the path")


def _is_result(name: str, names: set[str]) -> bool:
    """Whether an image is one that `medseg` writes: a preview, a contact sheet, or the mask of a scan beside it."""
    file = name.rpartition("/")[2]
    if file in (SAMPLES["grid"], SAMPLES["reference"]):
        return name.removesuffix(file) + SAMPLES["options"] in names
    scan = name.removesuffix(MASK_OF_IMAGE)
    mask = scan != name and any(scan + suffix in names for suffix in (*IMAGE_SUFFIXES, *VOLUME_SUFFIXES))
    return mask or name.endswith(SEGMENTATION["preview"])


_LABELLED = (("imagesTr", "labelsTr"), ("images", "labels"), ("images", "masks"), ("images", "raters"))


def _cases(source: Path, names: Sequence[str]) -> dict[str, str]:
    """The files in the folder of images of a labelled collection, and their cases; empty for any other collection.

    The collection may lie in a folder of its own, as in most zips, or be given by its folder of images.
    """
    top = _common_folder(names)
    folders = {name.removeprefix(top).partition("/")[0] for name in names if "/" in name.removeprefix(top)}
    for images, labels in _LABELLED:
        if {images, labels} <= folders:
            inside = [name for name in names if name.startswith(f"{top}{images}/")]
            return _cases_of(inside, f"{top}{images}/", names, f"{top}{labels}/")
        beside = source.resolve().parent / labels
        if source.is_dir() and source.resolve().name == images and beside.is_dir():
            return _cases_of(names, "", _folder(beside)[0], "")
    return {}


def _cases_of(images: Sequence[str], before: str, masks: Sequence[str], before_masks: str) -> dict[str, str]:
    """The cases of images, by the names of the masks; both without what stands before them."""
    stems = [_without_suffix(name) for name in masks if name.lower().endswith(SUFFIXES)]
    cases = {case_of_mask(stem.removeprefix(before_masks)) for stem in stems if stem.startswith(before_masks)}
    return {name: case_of_image(_without_suffix(name).removeprefix(before), cases) for name in images}


def _common_folder(names: Sequence[str]) -> str:
    """The folders that contain all files, such as "data/", or ""; whatever lies loose beside them does not count."""
    folders = {name.rpartition("/")[0] for name in names if "/" in name}
    common = posixpath.commonpath(folders) if folders else ""
    return f"{common}/" if common else ""


def _patients(names: Sequence[str]) -> list[str]:
    """The patients of unlabelled scans: a scan's first subfolder, else its name without suffix.

    A single folder that contains everything does not count.
    """
    parts = _without_common_folder(names)
    return [p[0] if len(p) > 1 else scan_name(p[0]) for p in parts]


def _without_common_folder(names: Sequence[str]) -> list[list[str]]:
    """The parts of the paths without the folders that contain all of them, which zips often have."""
    parts = [name.split("/") for name in names]
    while all(len(p) > 1 for p in parts) and len({p[0] for p in parts}) == 1:
        parts = [p[1:] for p in parts]
    return parts


def _without_suffix(name: str) -> str:
    """A path without the suffix of its file: "a/scan.1.nii.gz" -> "a/scan.1"."""
    stem = scan_name(name) if name.lower().endswith(SUFFIXES) else Path(name).stem
    return name.removesuffix(Path(name).name) + stem


_MOST_OF_IMAGE = 2**28  # bytes of one image file, which is read whole


def _zip(source: Path) -> tuple[list[str], Callable[[str], bytes]]:
    try:
        archive = zipfile.ZipFile(source)
    except (zipfile.BadZipFile, OSError) as error:
        raise InputError(
            source, f"no readable zip ({error})", "a zip or a folder of images", "download or unpack it again"
        ) from error
    names = [info.filename for info in zip_entries(archive, source, _MOST_OF_IMAGE)]

    def read(name: str) -> bytes:
        try:
            return archive.read(name)
        except UNREADABLE as error:
            raise InputError(f"{source}/{name}", f"an unreadable entry ({error})", "a whole file", _REPAIR) from error

    return names, read


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _folder(source: Path) -> tuple[list[str], Callable[[str], bytes]]:
    if not source.is_dir():
        raise InputError(source, "no such file or folder", "a zip or folder of images", "check the path")
    files = (path.relative_to(source) for path in source.rglob("*") if path.is_file())
    names = sorted(path.as_posix() for path in files if not _is_hidden(path.as_posix()))
    return names, lambda name: (source / name).read_bytes()


def _tiny_imagenet(source: Path, root: str, names: Sequence[str], read: Callable[[str], bytes]) -> ImageCollection:
    """The official layout. Classes are numbered in the order of their sorted ids, as torchvision's ImageFolder does."""
    unique = set(names)

    def lines(name: str) -> dict[int, list[str]]:
        if root + name not in unique:
            raise InputError(f"{source}/{root}{name}", "no such file", "the official Tiny ImageNet", _REPAIR)
        text = read(root + name).decode(errors="replace")
        return {i: line.split("\t") for i, line in enumerate(text.splitlines(), start=1) if line.strip()}

    def boxed(name: str, names: int) -> Iterator[tuple[str, list[str], tuple[int, int, int, int]]]:
        for i, row in lines(name).items():
            where = f"{source}/{root}{name}, line {i}"
            try:
                x0, y0, x1, y1 = map(int, row[names : names + 4])
            except ValueError as error:
                expected = f"{names + 4} columns between tabs, the last four whole numbers (x0, y0, x1, y1)"
                raise InputError(where, f"{' '.join(row)[:80]!r}", expected, _REPAIR) from error
            yield where, row, (x0, y0, x1, y1)

    wnids = sorted(line[0].strip() for line in lines("wnids.txt").values())
    words = {line[0]: line[-1] for line in lines("words.txt").values()} if root + "words.txt" in unique else {}
    label = {wnid: i for i, wnid in enumerate(wnids)}
    inside: dict[str, list[str]] = {}
    for name in names:
        if is_image_file(name) and name.startswith(root):
            inside.setdefault(name.rpartition("/")[0].removeprefix(root), []).append(name)
    entries: list[Entry] = []
    for wnid in wnids:
        folder = f"train/{wnid}/images"
        if folder not in inside:
            raise InputError(f"{source}/{root}{folder}", "no images", f"those of class {wnid} in wnids.txt", _REPAIR)
        box_file = f"train/{wnid}/{wnid}_boxes.txt"
        boxes = {row[0]: box for _, row, box in boxed(box_file, 1)} if root + box_file in unique else {}
        entries += [
            Entry(name, name, label[wnid], "train", boxes.get(name.rpartition("/")[2])) for name in inside[folder]
        ]
    for where, row, box in boxed("val/val_annotations.txt", 2) if "val/images" in inside else ():
        name = f"{root}val/images/{row[0]}"
        if row[1] not in label:
            raise InputError(where, f"class {row[1]}", "a class of wnids.txt", _REPAIR)
        if name in unique:
            entries.append(Entry(name, name, label[row[1]], "validation", box))
    entries += [Entry(name, name, UNLABELLED, "test") for name in inside.get("test/images", [])]
    classes = tuple(words.get(wnid, wnid).partition(",")[0] for wnid in wnids)
    return ImageCollection(source, "tiny-imagenet", tuple(entries), classes, read)


def _images(source: Path, names: Sequence[str], read: Callable[[str], bytes]) -> ImageCollection:
    """Image files without official splits. A single folder that contains everything is no class."""
    parts = _without_common_folder(names)
    classes = sorted({p[0] for p in parts}) if all(len(p) > 1 for p in parts) else []
    label: Mapping[str, int] = {name: i for i, name in enumerate(classes)}
    # In a flat folder, the group is the name without suffix, as it is for the same images beside their labels.
    flat = all(len(p) == 1 for p in parts)
    entries = [
        Entry(n, Path(p[0]).stem if flat else n, label.get(p[0], UNLABELLED)) for n, p in zip(names, parts, strict=True)
    ]
    return ImageCollection(source, "images", tuple(entries), tuple(classes), read)


_REPAIR = "download the official archive again"
