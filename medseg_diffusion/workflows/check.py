"""`medseg check`: report counts, sizes, classes and whatever would stop a training or a segmentation."""

from __future__ import annotations

import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

from medseg_diffusion.data.image_check import ImageCheck, check_images
from medseg_diffusion.data.images import Entry, ImageCollection, find_images, images_and_scans
from medseg_diffusion.errors import InputError
from medseg_diffusion.training.progress import OnProgress, count_of, silent
from medseg_diffusion.volumes.inputs import of_unread_formats, unread_files
from medseg_diffusion.volumes.paths import folders_below, is_dicom_zip, is_image, is_series, require_file
from medseg_diffusion.volumes.sources import series_below


def check(data: str | Path, on_progress: OnProgress = silent) -> ImageCheck:
    """Open every file of a data set. What is wrong is listed in the result and raises no error.

    Args:
        data: A folder or zip of images, a folder of scans or DICOM series with or without labels, or one scan or image.
        on_progress: Called with a text and the share done, 0 to 1.

    Raises:
        InputError: The path holds neither images nor scans.
    """
    data = Path(data)
    report = check_images(_everything(data), partial(count_of(on_progress), "files"))
    folders = [folder for folder in folders_below(data) if not is_series(folder)]  # slices have any suffix
    if unread := [file for folder in folders for file in unread_files(folder)]:
        report.remarks.append(f"left out {of_unread_formats(unread)}; convert them to NIfTI")
    return report


def _everything(data: Path) -> ImageCollection:
    """The images of a path, and the DICOM series that `medseg segment` would read."""
    if data.is_file() and data.suffix.lower() != ".zip":
        require_file(data)
        return replace(_scans(data.parent, [data]), kind="images" if is_image(data) else "scans")
    if is_series(data):
        return _scans(data, [data])
    try:
        # Scans in a zip cannot be opened, so that a mixture there is refused.
        collection = images_and_scans(data) if data.is_dir() else find_images(data)
    except InputError:
        if data.is_dir() and (series := series_below(data)):
            return _scans(data, series)
        if zipfile.is_zipfile(data) and is_dicom_zip(data):
            return _scans(data.parent, [data])
        raise
    if data.is_file() or collection.kind in ("tiny-imagenet", "images and scans"):
        return collection
    return replace(collection, entries=(*collection.entries, *_scans(data, series_below(data)).entries))


def _scans(folder: Path, scans: list[Path]) -> ImageCollection:
    entries = tuple(Entry(scan.relative_to(folder).as_posix(), scan.name) for scan in scans)
    return ImageCollection(folder, "scans", entries, (), lambda name: (folder / name).read_bytes())
