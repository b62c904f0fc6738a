"""Finds scans and tells their names, from file names and the first bytes alone, without importing torch."""

from __future__ import annotations

from pathlib import Path

from medseg_diffusion.errors import InputError

VOLUME_SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".mha", ".mhd")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
"""Images without geometry. They are read as volumes of one slice, with a voxel size of 1 mm as a placeholder."""
SUFFIXES = VOLUME_SUFFIXES + IMAGE_SUFFIXES
RESULTS = ("_seg", "_prob", "_uncertainty", "_members", "_pseudo", "_anomaly", "_anomaly_mask", "_anomaly_foreground")
"""Endings of the names of files that the commands write."""
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


def scan_files(folder: Path) -> list[Path]:
    """The visible files with known suffixes directly in a folder, sorted by name: scans, masks and results.

    If there is a volume that is no result, images are taken for pictures of volumes and left out. The previews that
    `medseg` writes are always left out.
    """
    files = sorted(
        path
        for path in folder.iterdir()
        if path.name.lower().endswith(SUFFIXES) and not path.name.startswith(".") and path.is_file()
    )
    if any(not is_image(path) and not scan_name(path).endswith(RESULTS) for path in files):
        return [path for path in files if not is_image(path)]
    return [path for path in files if not path.name.lower().endswith("_preview.png")]


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
