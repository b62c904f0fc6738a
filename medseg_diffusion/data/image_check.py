"""Opens every file of a data set, its labels too, and says what would stop a training or a segmentation."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from os.path import relpath
from pathlib import Path
from typing import Any

from medseg_diffusion.errors import InputError, listed, remarks
from medseg_diffusion.volumes.io import read_labels, read_map, read_volume
from medseg_diffusion.volumes.volume import Volume

from .cases import Case, CaseFolder, find_cases
from .image_files import open_image
from .images import UNLABELLED, Entry, ImageCollection, Kind, is_image_file, mixture


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
        broken: one message for everything that is wrong: what was found where, what is expected, and what to do.
        labelled: number of labelled cases, whose labels were opened.
        labels: label value, with its name if it has one -> number of cases that have it.
        remarks: one message for everything that is unusual, but would stop no training and no segmentation.
    """

    kind: Kind
    parts: dict[str, int]
    classes: int
    images_per_class: tuple[int, int] | None
    sizes: dict[str, int]
    modes: dict[str, int]
    broken: list[str]
    labelled: int = 0
    labels: dict[str, int] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def rows(self) -> dict[str, Any]:
        """The rows of the report, by name."""
        per_class = "-" if self.images_per_class is None else "{} to {}".format(*self.images_per_class)
        return {
            "layout": self.kind,
            **{f"{part} files": count for part, count in self.parts.items()},
            **({"labelled cases": self.labelled} if self.labelled else {}),
            **({"cases with label": _counts(self.labels)} if self.labels else {}),
            "classes": self.classes,
            "training files per class": per_class,
            "sizes": _counts(self.sizes),
            "colours": _counts(self.modes),
            "problems": len(self.broken),
        }


def _counts(numbers: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in numbers.items())


def check_images(
    collection: ImageCollection, on_file: Callable[[int, int], None] = lambda done, total: None
) -> ImageCheck:
    """Open every file and count. What is wrong is listed; no error is raised.

    Labels beside the images are opened, too: they must be label maps on the grids of their images, of values that have
    a name if any has one.

    Args:
        collection: the collection.
        on_file: called with (files done, files in all).
    """
    folder, broken = _cases(collection.source)
    if (mixed := mixture(collection)) is not None:
        broken.append(str(mixed))
    cases = {case.image: case for case in folder.cases} if folder else {}
    entries = {collection.source / entry.name: entry for entry in collection.entries}
    # dataset.json may list images elsewhere.
    jobs = [*entries.values(), *(Entry(relpath(path, collection.source), "") for path in cases if path not in entries)]
    opened: list[_Opened] = []
    # Reading and decompressing release the interpreter. Each thread holds a scan in memory.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for one in pool.map(partial(_open, collection, cases), jobs):
            opened.append(one)
            on_file(len(opened), len(jobs))
    broken += [line for one in opened for line in one.wrong]
    if folder:
        of_cases = [one for one, job in zip(opened, jobs, strict=True) if collection.source / job.name in cases]
        broken += _of_all(collection.source, folder, of_cases)
    parts = Counter[str](entry.part or "all" for entry in collection.entries)
    labels = [e.label for e in collection.entries if e.label != UNLABELLED and e.part in (None, "train")]
    counts = Counter(labels).values()
    per_class = (min(counts), max(counts)) if counts else None
    return ImageCheck(
        collection.kind,
        dict(parts),
        len(collection.classes),
        per_class,
        dict(Counter(one.size for one in opened if one.size).most_common(5)),
        dict(Counter(one.colours for one in opened if one.colours).most_common()),
        broken,
        len(cases),
        _with_labels(opened, folder.labels if folder else {}),
        list(dict.fromkeys(line for one in opened for line in one.remarks)),
    )


@dataclass
class _Opened:
    """Size and colours of a file in words, the values in its labels, what is wrong, and what is worth a remark."""

    size: str = ""
    colours: str = ""
    labels: frozenset[int] = frozenset()
    wrong: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def _open(collection: ImageCollection, cases: Mapping[Path, Case], entry: Entry) -> _Opened:
    with remarks() as said:
        opened = _opened(collection, cases, entry)
    opened.remarks += said
    return opened


def _opened(collection: ImageCollection, cases: Mapping[Path, Case], entry: Entry) -> _Opened:
    opened, path = _Opened(), collection.source / entry.name
    try:
        volume = None
        if is_image_file(entry.name):
            with open_image(collection.source, entry.name, collection.read(entry.name)) as image:
                opened.size, opened.colours = "{} x {}".format(*image.size), image.mode
        else:
            volume = read_volume(path, channels=None)
            opened.size, opened.colours = " x ".join(map(str, volume.shape)), f"{len(volume.data)} channels"
        if (case := cases.get(path)) is not None:
            _open_labels(case, read_map(path) if volume is None else volume, opened)
    except InputError as error:
        opened.wrong.append(str(error))
    except OSError as error:
        why = error.strerror or type(error).__name__
        opened.wrong.append(str(InputError(path, f"an unreadable file ({why})", "a file", "check its permissions")))
    return opened


def _open_labels(case: Case, image: Volume, opened: _Opened) -> None:
    """Open the further channels of a case and the labels of all its readers."""
    for path in case.further_channels:
        image.require_same_grid(read_volume(path))
    for path in case.labels:
        try:
            labels = read_labels(path)
            image.require_same_grid(labels)
            opened.labels |= frozenset(labels.data.unique().tolist())
        except InputError as error:
            opened.wrong.append(str(error))


def _with_labels(opened: Sequence[_Opened], names: Mapping[int, str]) -> dict[str, int]:
    counts = Counter(value for one in opened for value in one.labels)
    return {f"{value} {names.get(value, '')}".strip(): counts[value] for value in sorted(counts)}


def _of_all(source: Path, folder: CaseFolder, opened: Sequence[_Opened]) -> list[str]:
    """What is wrong with the labels or the channels of all cases together."""
    present, wrong = {value for one in opened for value in one.labels}, []
    names = ", ".join(f"{value} {name}" for value, name in sorted(folder.labels.items()))
    if folder.labels and (unnamed := sorted(present - set(folder.labels))):
        found, remedy = f"labels without a name ({listed(unnamed)})", "name them in dataset.json, or correct the masks"
        wrong.append(InputError(source, found, names, remedy))
    if present and (absent := sorted(set(folder.labels) - present)):
        found = f"no voxel of label {listed(absent)} in any case"
        wrong.append(InputError(source, found, names, "add such a case, or take the label out of dataset.json"))
    if folder.labels or present:
        kinds = Counter(one.colours for one in opened if one.colours)
        if len(kinds) > 1:
            found = ", ".join(f"{kind} in {count} files" for kind, count in kinds.most_common())
            wrong.append(
                InputError(source, f"images of different kinds ({found})", "one kind", "convert the fewer ones")
            )
    return [str(error) for error in wrong]


def _cases(folder: Path) -> tuple[CaseFolder | None, list[str]]:
    """The labelled cases of a folder, and what is wrong with them as a whole; None for other collections."""
    layouts = (("images", "labels"), ("images", "masks"), ("images", "raters"), ("imagesTr", "labelsTr"))
    labelled = any((folder / images).is_dir() and (folder / labels).is_dir() for images, labels in layouts)
    if not labelled and not (folder / "dataset.json").is_file():
        return None, []
    try:
        return find_cases(folder), []
    except InputError as error:
        return None, [str(error)]
