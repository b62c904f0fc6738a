"""Names, suffixes and kinds of scan files, from file names and the first bytes alone, without importing torch."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable
from pathlib import Path

from medseg_diffusion.errors import InputError, UsageError

from .archives import UNREADABLE

MAKER = "medseg-diffusion"
"""First word of what results say of themselves in their headers, and manufacturer of DICOM segmentations."""
VOLUME_SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".mha", ".mhd")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
"""Images without geometry. They are read as volumes of one slice, with a nominal voxel size of 1 mm."""
SUFFIXES = VOLUME_SUFFIXES + IMAGE_SUFFIXES
_OTHER_SCANS = (".mgz", ".mgh", ".mnc", ".img", ".hdr", ".nhdr", ".mif", ".rec", ".npy", ".npz")
_PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip")
UNREAD_SUFFIXES = (
    *(suffix + packed for suffix in VOLUME_SUFFIXES for packed in _PACKED if suffix + packed not in VOLUME_SUFFIXES),
    *(suffix + packed for suffix in _OTHER_SCANS for packed in ("", *_PACKED)),
)
"""Formats of scans that are not read."""
_DICOM = b"DICM"  # bytes 128 to 131 of a DICOM file
# The first element of a DICOM file without its preamble: group 2 or 8, little endian.
_BARE_DICOM = (b"\x02\0\0\0", b"\x08\0\0\0", b"\x08\0\x05\0", b"\x08\0\x08\0", b"\x08\0\x16\0")
# UIDs of segmentations (66.4, 66.7, ...) begin like this; it stands in the first elements of a file.
_DICOM_SEGMENTATION = b"1.2.840.10008.5.1.4.1.1.66."
DICOM_SUFFIXES = (".dcm", ".dicom", ".ima", ".zip")


def suffix_of(path: Path | str) -> str:
    """The entry of `SUFFIXES` with which a name ends, in lower case.

    Raises:
        InputError: another suffix.
    """
    name = Path(path).name.lower()
    for suffix in SUFFIXES:
        if name.endswith(suffix):
            return suffix
    raise InputError(
        path, f"the suffix {Path(path).suffix!r}", f"one of {', '.join(SUFFIXES)}", "convert or rename the file"
    )


def scan_name(path: Path | str) -> str:
    """The file's name without its suffix: "a/scan.1.nii.gz" -> "scan.1". For a DICOM series, the folder's name."""
    path = Path(path)
    if path.is_dir():
        return path.resolve().name
    if not path.name.lower().endswith(SUFFIXES) and is_dicom(path):
        return path.stem if path.suffix.lower() in DICOM_SUFFIXES else path.name
    return path.name[: -len(suffix_of(path))]


def is_image(path: Path | str) -> bool:
    """Whether a name ends with the suffix of an image without geometry, such as PNG."""
    return Path(path).name.lower().endswith(IMAGE_SUFFIXES)


def is_series(folder: Path) -> bool:
    """Whether DICOM files, of any name but DICOMDIR, lie directly in a folder.

    Segmentations are results, no series of a scan.
    """
    return folder.is_dir() and any(
        _has_dicom(path) and not is_dicom_segmentation(path) for path in _visible_files(folder)
    )


def is_dicom(path: Path) -> bool:
    """Whether a path is a folder with DICOM files at any depth, a zip, or DICOM whose suffix names no other format."""
    if path.is_dir():
        return any(_has_dicom(file) for file in dicom_files(path))
    if not path.is_file() or path.name.lower().endswith(SUFFIXES):
        return False
    return path.suffix.lower() == ".zip" or _has_dicom(path)


def is_dicom_segmentation(path: Path) -> bool:
    """Whether a file is a DICOM segmentation."""
    with path.open("rb") as file:
        start = file.read(512)
    return _starts_dicom(start) and _DICOM_SEGMENTATION in start


def is_dicom_zip(path: Path) -> bool:
    """Whether a path is a zip with DICOM images, or one that cannot be read: reading it as a scan says why.

    Segmentations are no images. `is_dicom` takes every zip for DICOM, because it looks at the name alone.
    """
    if path.suffix.lower() != ".zip" or not path.is_file():
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(_is_slice(archive, info) for info in archive.infolist())
    except UNREADABLE:
        return True


def dicom_files(folder: Path) -> list[Path]:
    """The visible files directly in the folder of a DICOM series (`is_series`); in another, those of all subfolders.

    A DICOMDIR is left out: it lists the images, but holds none, and names paths that are not to be trusted.
    """
    if is_series(folder):
        return _visible_files(folder)
    return [path for inner in folders_below(folder) for path in _visible_files(inner)]


def file_states(paths: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Path, size and time of the last change of all files, those of DICOM series included.

    What was made from the files is out of date if this differs.
    """
    files = [file for path in paths for file in (dicom_files(path) if path.is_dir() else [path])]
    return [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def folders_below(folder: Path) -> list[Path]:
    """The folder and all its visible subfolders, sorted; of one that is linked several times, the first."""
    folders, known = [], set[str]()
    for root, inner, _ in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in known:  # also a link to a folder above, which would never end
            inner.clear()
            continue
        known.add(real)
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        folders.append(Path(root))
    return folders


def is_dicomdir(path: Path) -> bool:
    """Whether a path is the index of a DICOM medium."""
    return path.name.upper() == "DICOMDIR" and path.is_file()


def _visible_files(folder: Path) -> list[Path]:
    files = (path for path in sorted(folder.iterdir()) if not path.name.startswith("."))
    return [path for path in files if path.is_file() and not is_dicomdir(path)]


def require_file(path: Path) -> None:
    """InputError unless ``path`` is a file with one of `SUFFIXES`, or DICOM (`is_dicom`)."""
    if not path.exists():
        raise InputError(path, "no such file", "a scan", "check the path")
    if is_dicom(path):
        return
    if not path.is_file():
        raise InputError(path, "a folder", "a file", "name one scan in it")
    suffix_of(path)


def refuse_scan_name(path: Path) -> None:
    """UsageError for a page or a text that is named like a scan, or would replace one: its own name was forgotten."""
    if path.name.lower().endswith((*SUFFIXES, *UNREAD_SUFFIXES, *DICOM_SUFFIXES)) or is_dicom(path):
        raise UsageError(f"{path}: is the name of a scan, but the result is a text; give it another name")


def _has_dicom(path: Path) -> bool:
    if path.name.lower().endswith(SUFFIXES):  # a folder of 100,000 other scans is not opened file by file
        return False
    with path.open("rb") as file:
        return _starts_dicom(file.read(132))


def _starts_dicom(start: bytes) -> bool:
    return start[128:132] == _DICOM or start[:4] in _BARE_DICOM


def _is_slice(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bool:
    name = info.filename.rpartition("/")[2].lower()
    if not name or name == "dicomdir" or name.endswith(SUFFIXES):
        return False
    with archive.open(info) as file:
        start = file.read(512)
    return _starts_dicom(start) and _DICOM_SEGMENTATION not in start
