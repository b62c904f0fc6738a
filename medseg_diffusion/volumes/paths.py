"""Names, suffixes and kinds of scan files, from file names and the first bytes alone, without importing torch."""

from __future__ import annotations

from pathlib import Path

from medseg_diffusion.errors import InputError

VOLUME_SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".mha", ".mhd")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
"""Images without geometry. They are read as volumes of one slice, with a nominal voxel size of 1 mm."""
SUFFIXES = VOLUME_SUFFIXES + IMAGE_SUFFIXES
_DICOM = b"DICM"  # bytes 128 to 131 of a DICOM file


def suffix_of(path: Path | str) -> str:
    """The entry of `SUFFIXES` with which a name ends, in lower case.

    Raises:
        InputError: another suffix.
    """
    name = Path(path).name.lower()
    for suffix in SUFFIXES:
        if name.endswith(suffix):
            return suffix
    if name.endswith(".dcm"):
        raise InputError(path, "one slice of a DICOM series", "the whole series", "name its folder")
    raise InputError(
        path, f"the suffix {Path(path).suffix!r}", f"one of {', '.join(SUFFIXES)}", "convert or rename the file"
    )


def scan_name(path: Path | str) -> str:
    """The file's name without its suffix: "a/scan.1.nii.gz" -> "scan.1". For a DICOM series, the folder's name."""
    if Path(path).is_dir():
        return Path(path).resolve().name
    return Path(path).name[: -len(suffix_of(path))]


def is_image(path: Path | str) -> bool:
    """Whether a name ends with the suffix of an image without geometry, such as PNG."""
    return Path(path).name.lower().endswith(IMAGE_SUFFIXES)


def is_series(folder: Path) -> bool:
    """Whether DICOM files, of any name, lie directly in a folder."""
    return folder.is_dir() and any(_is_dicom(path) for path in sorted(folder.iterdir()) if path.is_file())


def require_file(path: Path) -> None:
    """InputError unless ``path`` is a file with one of `SUFFIXES`, or the folder of a DICOM series."""
    if not path.exists():
        raise InputError(path, "no such file", "a scan", "check the path")
    if is_series(path):
        return
    if not path.is_file():
        raise InputError(path, "a folder", "a file", "name one scan in it")
    suffix_of(path)


def _is_dicom(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(132)[128:] == _DICOM
