"""Files that a call names one by one, in the place of a folder."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medseg_diffusion.errors import InputError, UsageError
from medseg_diffusion.volumes.paths import scan_name

Files = str | Path | Sequence[str | Path]
"""One file, or several: the channels of an image, or the label maps of several readers."""
FileEntry = str | Path | tuple[Files, Files] | Mapping[str, Any]
"""An image; a pair of an image and its labels; or a mapping with the key "image" and, if known, the other `KEYS`."""
Data = str | Path | Sequence[FileEntry]
"""A folder, or a list of files."""

KEYS = ("image", "label", "patient", "name", "class")


@dataclass(frozen=True)
class ListedFile:
    """An entry of a list.

    Attributes:
        name: Its name: that of the image without suffix, with as many folders as tell it from the others.
        images: The file of the image, or one for each channel.
        labels: Its label map, or one of each reader; empty without labels.
        patient: Its patient. All entries of one are on the same side of a split.
        category: Name of its class, for generators of classes; empty without one.
    """

    name: str
    images: tuple[Path, ...]
    labels: tuple[Path, ...]
    patient: str
    category: str


@dataclass(frozen=True)
class FileList:
    """The entries of a list, with names that differ."""

    entries: tuple[ListedFile, ...]

    def __str__(self) -> str:
        return f"the list of {len(self.entries)} files"


def folder_or_files(data: Data | FileList) -> Path | FileList:
    """The path of a folder, or the entries of a list.

    Args:
        data: A folder, or a list whose entries are images, pairs of an image and its labels, or mappings with the keys
            `KEYS`: "image" and "label" (files), "patient", "name" and "class" (texts); all but "image" may be missing.

    Raises:
        UsageError: An entry of another form, or an empty list.
        InputError: A file that does not exist, or one that stands there twice.
    """
    if isinstance(data, FileList):
        return data
    if isinstance(data, str | Path):
        return Path(data)
    entries = [_mapping(entry, number) for number, entry in enumerate(data, 1)]
    if not entries:
        raise UsageError("an empty list of files; name at least one")
    images = [_paths(entry["image"], number) for number, entry in enumerate(entries, 1)]
    labels = [_paths(entry.get("label") or (), number) for number, entry in enumerate(entries, 1)]
    if () in images:
        raise UsageError(f"entry {images.index(()) + 1} of the list has no image; name its file")
    for file in (file for files in (*images, *labels) for file in files):
        if not file.exists():
            raise InputError(file, "no such file", "a file of the list", "check the path")
    names = [_text(entry, "name") or name for entry, name in zip(entries, _names(images), strict=True)]
    if twice := sorted(name for name, count in Counter(names).items() if count > 1):
        raise UsageError(f"two entries of the list have the name {twice[0]!r}; give each its own")
    return FileList(
        tuple(
            ListedFile(name, image, label, _text(entry, "patient") or name, _text(entry, "class"))
            for name, image, label, entry in zip(names, images, labels, entries, strict=True)
        )
    )


def _mapping(entry: FileEntry, number: int) -> Mapping[str, Any]:
    if isinstance(entry, str | Path):
        return {"image": entry}
    if isinstance(entry, tuple) and len(entry) == 2:
        return {"image": entry[0], "label": entry[1]}
    if not isinstance(entry, Mapping) or "image" not in entry or not set(entry) <= set(KEYS):
        given = f"the keys {', '.join(map(str, entry))}" if isinstance(entry, Mapping) else repr(entry)
        raise UsageError(
            f"entry {number} of the list is {given[:100]}; expected an image, a pair (image, label), or a mapping with "
            f"image and, if known, {', '.join(KEYS[1:])}"
        )
    return entry


def _text(entry: Mapping[str, Any], key: str) -> str:
    """A value as text; empty if there is none. The number 0 is the name of a patient or a class."""
    value = entry.get(key)
    return "" if value is None else str(value)


def _paths(files: Files, number: int) -> tuple[Path, ...]:
    if isinstance(files, str | Path):
        return (Path(files),)
    if not isinstance(files, Sequence) or not all(isinstance(file, str | Path) for file in files):
        raise UsageError(f"entry {number} of the list names {str(files)[:100]}; expected a file, or a list of files")
    return tuple(map(Path, files))


def _names(images: Sequence[tuple[Path, ...]]) -> list[str]:
    """The images' names, with the fewest folders before them that tell all apart.

    Files of one folder that differ in their suffix alone have one name, and need one of their own.
    """
    whole = [Path(os.path.abspath(files[0])) for files in images]
    if twice := [path for path, count in Counter(whole).items() if count > 1]:
        raise InputError(twice[0], "the same image twice in the list", "each image once", "remove one of the entries")
    folders = [path.parent.parts[1:] for path in whole]  # without the root
    for depth in range(max(map(len, folders)) + 1):
        last = [parts[max(0, len(parts) - depth) :] for parts in folders]
        names = ["/".join((*parts, scan_name(path))) for parts, path in zip(last, whole, strict=True)]
        if len(set(names)) == len(names):
            break
    return names
