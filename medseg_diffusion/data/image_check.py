"""Opens every file of a collection of images and counts sizes, colours and broken files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from medseg_diffusion.errors import InputError
from medseg_diffusion.volumes.io import read_volume

from .images import UNLABELLED, ImageCollection, Kind, open_image


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
    """

    kind: Kind
    parts: dict[str, int]
    classes: int
    images_per_class: tuple[int, int] | None
    sizes: dict[str, int]
    modes: dict[str, int]
    broken: list[str]

    def rows(self) -> dict[str, Any]:
        """The rows of the report, by name."""
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
    """Open every file and count. Broken files are listed; no error is raised.

    Args:
        collection: the collection.
        on_file: called with (files done, files in all).
    """
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
                with open_image(collection.source, entry.name, collection.read(entry.name)) as image:
                    sizes["{} x {}".format(*image.size)] += 1
                    modes[image.mode] += 1
        except InputError as error:
            broken.append(str(error))
        on_file(i + 1, len(collection.entries))
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
    )
