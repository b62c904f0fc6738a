"""Writing report files so that a reader never meets half of one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def write_files(folder: Path, contents: Mapping[str, str | bytes]) -> tuple[Path, ...]:
    """Write files into a folder, each complete or not at all; text is UTF-8.

    Everything is written under temporary names first and renamed only when all of it is on disk, so that a full disk
    leaves an earlier result as it was.

    Args:
        folder: Created if it does not exist.
        contents: File name -> content.

    Returns:
        The paths, in the order of `contents`.

    Raises:
        OSError: The folder cannot be created or written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # The process id keeps two runs into one folder from sharing temporary files.
    temporary = {name: folder / f".{name}.{os.getpid()}.tmp" for name in contents}
    try:
        for name, content in contents.items():
            temporary[name].write_bytes(content.encode() if isinstance(content, str) else content)
        for name, path in temporary.items():
            os.replace(path, folder / name)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
    return tuple(folder / name for name in contents)
