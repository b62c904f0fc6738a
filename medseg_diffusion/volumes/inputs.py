"""Finds the scans in folders, without importing torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from medseg_diffusion.errors import InputError, listed

from .outputs import RESULTS, SEGMENTATION
from .paths import (
    SUFFIXES,
    UNREAD_SUFFIXES,
    is_dicom,
    is_dicom_segmentation,
    is_image,
    is_series,
    require_file,
    scan_name,
)


def scan_files(folder: Path) -> list[Path]:
    """The visible files with known suffixes directly in a folder, sorted by name: scans, masks and results.

    If there is a volume that is no result, images are taken for pictures of volumes and left out. The previews that
    `medseg` writes are always left out.
    """
    named = [p for p in folder.iterdir() if p.name.lower().endswith(SUFFIXES) and not p.name.startswith(".")]
    files = sorted(path for path in named if path.is_file())
    refuse_lost(named)
    if any(not is_image(path) and not scan_name(path).endswith(RESULTS) for path in files):
        return [path for path in files if not is_image(path)]
    return [path for path in files if not path.name.lower().endswith(SEGMENTATION["preview"])]


def dicom_segmentations(folder: Path) -> list[Path]:
    """The visible DICOM segmentations directly in a folder, sorted by name."""
    files = (path for path in sorted(folder.iterdir()) if not path.name.startswith(".") and path.is_file())
    return [path for path in files if is_dicom(path) and is_dicom_segmentation(path)]


def refuse_lost(paths: Iterable[Path]) -> None:
    """InputError if one of the paths is a link to a file that does not exist."""
    if lost := sorted(path for path in paths if path.is_symlink() and not path.exists()):
        raise InputError(
            lost[0],
            f"a link to a file that does not exist{f' (and {len(lost) - 1} more)' if len(lost) > 1 else ''}",
            "the file itself",
            "fetch it (datalad get, git annex get), or remove the link",
        )


def unread_files(folder: Path) -> list[Path]:
    """The visible files directly in a folder that look like scans in formats that are not read, sorted by name."""
    named = (path for path in folder.iterdir() if path.name.lower().endswith(UNREAD_SUFFIXES))
    return sorted(path for path in named if path.is_file() and not path.name.startswith("."))


def of_unread_formats(files: Sequence[Path | str]) -> str:
    """What messages say of files that `unread_files` finds: their number, and the first of them."""
    return f"{len(files)} file{'s' if len(files) > 1 else ''} in formats that are not read ({listed(files, 3)})"


def find_scans(path: Path | str) -> list[Path]:
    """The scans of a path: the path itself if it is a file or a DICOM series, else the scans in the folder.

    A folder's scans are its files (`scan_files`) without those whose names end like results (`RESULTS`), then its
    DICOM series, each sorted by name.

    Raises:
        InputError: a missing path, a file of another kind, or a folder without scans.
    """
    path = Path(path)
    if not path.is_dir():
        require_file(path)
        return [path]
    if is_series(path):
        return [path]
    files = scan_files(path)
    scans = [file for file in files if not scan_name(file).endswith(RESULTS)]
    scans += sorted(inner for inner in path.iterdir() if is_series(inner))
    if not scans:
        found = f"a folder with only results ({len(files)} files)" if files else "a folder without scans"
        raise InputError(path, found, f"files that end with {', '.join(SUFFIXES)}", "check the path")
    return scans
