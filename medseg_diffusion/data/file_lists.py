"""Files that a call names one by one, in the place of a folder."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medseg_diffusion.errors import InputError, UsageError
from medseg_diffusion.volumes.paths import scan_name

Files = str | Path | Sequence[str | Path]
"""One file, or several: the channels of an image, or the label maps of several readers."""
FileEntry = Files | tuple[Files, Files] | Mapping[str, Any]
"""An image; an image and its labels; or a mapping with the key "image" and, if known, `KEYS`."""
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
    images = [_paths(entry["image"]) for entry in entries]
    labels = [_paths(entry.get("label") or ()) for entry in entries]
    for file in (file for files in (*images, *labels) for file in files):
        if not file.exists():
            raise InputError(file, "no such file", "a file of the list", "check the path")
    names = [str(entry.get("name") or name) for entry, name in zip(entries, _names(images), strict=True)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"two entries of the list have the name {twice[0]!r}; give each its own")
    return FileList(
        tuple(
            ListedFile(name, image, label, str(entry.get("patient") or name), str(entry.get("class") or ""))
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


def _paths(files: Files) -> tuple[Path, ...]:
    return (Path(files),) if isinstance(files, str | Path) else tuple(Path(file) for file in files)


def _names(images: Sequence[tuple[Path, ...]]) -> list[str]:
    """The images' names, with the fewest folders before them that tell all apart."""
    whole = [Path(os.path.abspath(files[0])) for files in images]
    if twice := [path for i, path in enumerate(whole) if path in whole[:i]]:
        raise InputError(twice[0], "the same image twice in the list", "each image once", "remove one of the entries")
    for depth in range(max(len(path.parts) for path in whole)):
        names = ["/".join((*path.parent.parts[len(path.parent.parts) - depth :], scan_name(path))) for path in whole]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in whole]  # files that differ in their suffix alone
