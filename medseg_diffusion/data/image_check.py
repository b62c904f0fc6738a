"""Opens every file of a collection of images and counts sizes, colours and broken files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from medseg_diffusion.errors import InputError
from medseg_diffusion.volumes.io import read_labels, read_map, read_volume

from .cases import Case, find_cases
from .images import UNLABELLED, Entry, ImageCollection, Kind, open_image


@dataclass
class ImageCheck:
    """What `medseg check` reports on a collection of images.

    Attributes:
        kind: layout of the collection.
        parts: split -> number of files; "all" if the collection has no official splits.
        classes: number of classes.
        images_per_class: smallest and largest number of training files of a class; None without classes.
        sizes: the five most frequent sizes and their numbers of files.
        modes: colour mode -> number of files.
        broken: one message per broken file.
        labelled: number of labelled cases, whose labels were opened.
    """

    kind: Kind
    parts: dict[str, int]
    classes: int
    images_per_class: tuple[int, int] | None
    sizes: dict[str, int]
    modes: dict[str, int]
    broken: list[str]
    labelled: int = 0

    def rows(self) -> dict[str, Any]:
        """The rows of the report, by name."""
        per_class = "-" if self.images_per_class is None else "{} to {}".format(*self.images_per_class)
        return {
            "layout": self.kind,
            **{f"{part} files": count for part, count in self.parts.items()},
            **({"labelled cases": self.labelled} if self.labelled else {}),
            "classes": self.classes,
            "training files per class": per_class,
            "sizes": ", ".join(f"{size} ({count})" for size, count in self.sizes.items()),
            "colours": ", ".join(f"{mode} ({count})" for mode, count in self.modes.items()),
            "broken files": len(self.broken),
        }


def check_images(
    collection: ImageCollection, on_file: Callable[[int, int], None] = lambda done, total: None
) -> ImageCheck:
    """Open every file and count. Broken files are listed; no error is raised.

    Labels beside the images are opened, too: they must be label maps on the grids of their images.

    Args:
        collection: the collection.
        on_file: called with (files done, files in all).
    """
    sizes: Counter[str] = Counter()
    modes: Counter[str] = Counter()
    broken = []
    cases, missing = _cases(collection.source)
    broken += missing
    total = len(collection.entries) + len(cases)
    with ThreadPoolExecutor() as pool:  # reading and decompressing release the interpreter
        opened = pool.map(partial(_open_image, collection), collection.entries)
        for done, found in enumerate(chain(opened, pool.map(_open_labels, cases)), 1):
            if isinstance(found, InputError):
                broken.append(str(found))
            elif found is not None:
                sizes[found[0]] += 1
                modes[found[1]] += 1
            on_file(done, total)
    parts = Counter[str](entry.part or "all" for entry in collection.entries)
    labels = [e.label for e in collection.entries if e.label != UNLABELLED and e.part in (None, "train")]
    counts = Counter(labels).values()
    per_class = (min(counts), max(counts)) if counts else None
    return ImageCheck(
        collection.kind,
        dict(parts),
        len(collection.classes),
        per_class,
        dict(sizes.most_common(5)),
        dict(modes.most_common()),
        broken,
        len(cases),
    )


def _open_image(collection: ImageCollection, entry: Entry) -> tuple[str, str] | InputError:
    """Size and colours of a file, in words, or what is wrong with it."""
    try:
        if collection.kind == "scans":
            volume = read_volume(collection.source / entry.name, channels=None)
            return " x ".join(map(str, volume.shape)), f"{len(volume.data)} channels"
        with open_image(collection.source, entry.name, collection.read(entry.name)) as image:
            return "{} x {}".format(*image.size), image.mode
    except InputError as error:
        return error


def _cases(folder: Path) -> tuple[list[Case], list[str]]:
    """The labelled cases of a folder, and what is wrong with them as a whole; nothing for other collections."""
    layouts = (("images", "labels"), ("images", "masks"), ("images", "raters"), ("imagesTr", "labelsTr"))
    if not any((folder / images).is_dir() and (folder / labels).is_dir() for images, labels in layouts):
        return [], []
    try:
        return list(find_cases(folder).cases), []
    except InputError as error:
        return [], [str(error)]


def _open_labels(case: Case) -> InputError | None:
    """What is wrong with the labels of a case; None if nothing is."""
    try:
        image = read_map(case.image)
        for path in case.labels:
            image.require_same_grid(read_labels(path))
    except InputError as error:
        # A broken image is reported once, by `_open_image`.
        return None if error.source == case.image else error
    return None
