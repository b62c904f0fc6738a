"""Zips from others: their entries are read in place, and none is ever written to a path that the archive names."""

from __future__ import annotations

import lzma
import stat
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from medseg_diffusion.errors import InputError

MOST_BYTES = 2**36
"""Largest total size of the unpacked entries of a zip (64 GB)."""
MOST_OF_ENTRY = 2**32
"""Largest size of one unpacked entry (4 GB)."""
UNREADABLE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, OSError, EOFError, RuntimeError, ValueError)
"""What zipfile raises: RuntimeError for encryption or an unknown compression, ValueError for an entry's name."""


def zip_entries(archive: zipfile.ZipFile, source: Path, most_of_entry: int = MOST_OF_ENTRY) -> list[zipfile.ZipInfo]:
    """The files of a zip, sorted by name, without hidden ones and the copies of macOS.

    The sizes that are checked here are those that reading stops at, so that no entry takes more memory.

    Raises:
        InputError: an entry with an absolute path, with "..", or of a name that another one has; a link; an entry
            larger than ``most_of_entry``, or entries larger than `MOST_BYTES` together.
    """
    files: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name = info.filename.replace("\\", "/")
        parts = PurePosixPath(name).parts
        if name.startswith("/") or ".." in parts or ":" in name.partition("/")[0]:
            raise _refused(source, f"the path {name[:80]!r} in a zip", "paths inside it")
        if stat.S_ISLNK(info.external_attr >> 16):
            raise _refused(source, f"the link {name[:80]!r} in a zip", "files")
        if info.is_dir():
            continue
        if name in files:
            raise _refused(source, f"two files named {name[:80]!r} in a zip", "one file of a name")
        files[name] = info
        if info.file_size > most_of_entry:
            raise _refused(source, f"{info.file_size} bytes in {name[:80]!r}", f"at most {most_of_entry}")
    if (total := sum(info.file_size for info in files.values())) > MOST_BYTES:
        raise _refused(source, f"a zip of {total} bytes", f"at most {MOST_BYTES}")
    visible = (name for name in files if not any(part.startswith(".") for part in name.split("/")))
    return [files[name] for name in sorted(visible) if "__MACOSX" not in name.split("/")]


def _refused(source: Path, found: str, expected: str) -> InputError:
    return InputError(source, found, expected, "unpack it, look at it and give the folder")
