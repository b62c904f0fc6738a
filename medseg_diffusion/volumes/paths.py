"""Names, suffixes and kinds of scan files, from file names and the first bytes alone, without importing torch."""

from __future__ import annotations

from pathlib import Path

from medseg_diffusion.errors import InputError

VOLUME_SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".mha", ".mhd")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
"""Images without geometry. They are read as volumes of one slice, with a nominal voxel size of 1 mm."""
SUFFIXES = VOLUME_SUFFIXES + IMAGE_SUFFIXES
_DICOM = b"DICM"  # bytes 128 to 131 of a DICOM file
# The first element of a DICOM file without its preamble: group 2 or 8, little endian.
_BARE_DICOM = (b"\x02\0\0\0", b"\x08\0\0\0", b"\x08\0\x05\0", b"\x08\0\x08\0", b"\x08\0\x16\0")
_DICOM_SUFFIXES = (".dcm", ".dicom", ".ima", ".zip")


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
        return path.stem if path.suffix.lower() in _DICOM_SUFFIXES else path.name
    return path.name[: -len(suffix_of(path))]


def is_image(path: Path | str) -> bool:
    """Whether a name ends with the suffix of an image without geometry, such as PNG."""
    return Path(path).name.lower().endswith(IMAGE_SUFFIXES)


def is_series(folder: Path) -> bool:
    """Whether DICOM files, of any name, lie directly in a folder."""
    return folder.is_dir() and any(_has_dicom(path) for path in sorted(folder.iterdir()) if path.is_file())


def is_dicom(path: Path) -> bool:
    """Whether a path is the folder of a DICOM series, a zip, or a DICOM file whose suffix names no other format."""
    if path.is_dir():
        return is_series(path)
    if not path.is_file() or path.name.lower().endswith(SUFFIXES):
        return False
    return path.suffix.lower() == ".zip" or _has_dicom(path)


def require_file(path: Path) -> None:
    """InputError unless ``path`` is a file with one of `SUFFIXES`, or DICOM (`is_dicom`)."""
    if not path.exists():
        raise InputError(path, "no such file", "a scan", "check the path")
    if is_dicom(path):
        return
    if not path.is_file():
        raise InputError(path, "a folder", "a file", "name one scan in it")
    suffix_of(path)


def _has_dicom(path: Path) -> bool:
    if path.name.lower().endswith(SUFFIXES):  # a folder of 100,000 other scans is not opened file by file
        return False
    with path.open("rb") as file:
        start = file.read(132)
    return start[128:] == _DICOM or start[:4] in _BARE_DICOM
