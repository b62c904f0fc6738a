"""A model as one zip file: the files of its folder, with their checksums, in a folder of the model's name."""

from __future__ import annotations

import lzma
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from medseg_diffusion.errors import InputError
from medseg_diffusion.files import whole_file
from medseg_diffusion.volumes.archives import zip_entries

from .store import FILES, SUMS

MOST_BYTES = {"model.json": 2**26, "README.md": 2**24, SUMS: 2**16, "weights.safetensors": 2**34}
"""Largest size of each file (weights: 16 GB)."""
MOST_EXPANSION = 100
"""Largest ratio of the unpacked files to the zip. Trained weights hardly compress; zeros do a thousandfold."""
_AT_ONCE = 2**20
_UNREADABLE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, RuntimeError, NotImplementedError, EOFError, ValueError)
"""What reading a damaged or encrypted zip raises."""


def pack(folder: Path, file: Path) -> None:
    """Write the model in ``folder`` into the zip ``file``. Equal models give equal bytes.

    Nothing is compressed: it would make weights smaller by a tenth, and take long.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name in (*FILES, SUMS):
            entry = zipfile.ZipInfo(f"{folder.name}/{name}")  # of 1980-01-01
            entry.external_attr = 0o644 << 16
            with (folder / name).open("rb") as source, archive.open(entry, "w", force_zip64=True) as target:
                while part := source.read(_AT_ONCE):
                    target.write(part)


def unpack(file: Path, folder: Path) -> str:
    """Write the files of the model in a zip into ``folder``; return the name of its folder in the zip, or of the zip.

    Nothing is written to a path that the zip names, and other files in it are left out. Whether the checksums are right
    is not checked.

    Raises:
        InputError: No zip, a damaged or strange one, none or several models in it, or files that are too large.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            most = max(MOST_BYTES.values())
            entries = {PurePosixPath(entry.filename): entry for entry in zip_entries(archive, file, most)}
            root = _root(entries, file)
            chosen = {name: entries[root / name] for name in MOST_BYTES if root / name in entries}
            _require_moderate(chosen, file)
            for name, entry in chosen.items():
                with archive.open(entry) as source, (folder / name).open("wb") as target:
                    while part := source.read(_AT_ONCE):
                        target.write(part)
    except _UNREADABLE as error:
        raise InputError(file, f"an unreadable zip ({error})", "the zip of a model", "copy the file again") from error
    return root.name or file.stem


def _root(names: Iterable[PurePosixPath], file: Path) -> PurePosixPath:
    roots = [name.parent for name in names if name.name == "model.json"]
    if len(roots) != 1:
        found = "no model" if not roots else f"{len(roots)} models"
        raise InputError(file, found, "a zip of one model, with its model.json", "make it with `medseg models export`")
    return roots[0]


def _require_moderate(entries: Mapping[str, zipfile.ZipInfo], file: Path) -> None:
    for name, entry in entries.items():
        if entry.file_size > MOST_BYTES[name]:
            raise InputError(
                file, f"{name} of {entry.file_size} bytes", f"at most {MOST_BYTES[name]}", "do not install it"
            )
    unpacked, packed = sum(entry.file_size for entry in entries.values()), max(file.stat().st_size, 1)
    if unpacked > MOST_EXPANSION * packed:
        raise InputError(
            file,
            f"files that unpack to {unpacked // packed} times the size of the zip",
            f"at most {MOST_EXPANSION} times, since trained weights hardly compress",
            "do not install it",
        )
