"""DICOM series: a folder of slices as one volume. SimpleITK reads the voxels, pydicom reads the headers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pydicom
import SimpleITK as sitk
from pydicom.dataset import Dataset

from medseg_diffusion.errors import InputError

from .itk import affine_of
from .volume import FileImage, Header

_TAGS = ["Modality", "ImagePositionPatient", "ImageOrientationPatient", "NumberOfFrames"]
# Both as a share of the distance between slices.
_UNEVEN = 0.05  # largest variation of the distance: many files round the positions
_TILTED = 0.05  # largest shift of a slice against its neighbour


def open_image(folder: Path) -> FileImage:
    """Read the headers of the one series in a folder: slices in order of their position, or one multi-frame file.

    Raises:
        InputError: several series; missing, repeated, unevenly spaced or sheared slices; a single slice; or a damaged
            file.
    """
    series = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
    if len(series) != 1:
        raise InputError(
            folder, f"{len(series)} DICOM series", "one series", "put every series into a folder of its own"
        )
    files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), series[0])
    try:
        headers = [pydicom.dcmread(file, stop_before_pixels=True, specific_tags=list(_TAGS)) for file in files]
    except Exception as error:
        raise _unreadable(folder) from error
    if len(headers) > 1 or int(headers[0].get("NumberOfFrames") or 1) == 1:
        _require_even(folder, headers)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(files)
    try:
        image = reader.Execute()
    except RuntimeError as error:
        raise _unreadable(folder) from error
    array = sitk.GetArrayViewFromImage(image)  # (K, J, I[, components])
    order = [2, 1, 0, 3][: array.ndim]
    shape = tuple(array.shape[axis] for axis in order)

    def load() -> npt.NDArray[np.generic]:
        return np.asarray(sitk.GetArrayFromImage(image).transpose(order))

    return FileImage(shape, array.dtype, affine_of(image), Header(modality=str(headers[0].get("Modality", ""))), load)


def _require_even(folder: Path, headers: Sequence[Dataset]) -> None:
    """InputError unless the slices are stacked evenly along their normal."""
    axes = headers[0].get("ImageOrientationPatient")
    positions = [header.get("ImagePositionPatient") for header in headers]
    if not axes or not all(positions):
        raise InputError(
            folder, "slices without position or orientation", "both in every file", "export the series again"
        )
    if len(headers) == 1:
        raise InputError(folder, "a series of one slice", "a volume of several", "export the whole series")
    normal = np.cross(*np.array(axes, float).reshape(2, 3))
    steps = np.diff(np.array(positions, float), axis=0)
    gaps = steps @ normal
    typical = float(np.median(gaps))
    if abs(gaps).min() < 1e-3:
        raise InputError(
            folder,
            "several images at one position",
            "one image at each position of a slice",
            "export one time point, echo or reconstruction alone",
        )
    if abs(gaps - typical).max() > _UNEVEN * abs(typical):
        raise InputError(
            folder,
            f"slices {abs(gaps).min():.3g} to {abs(gaps).max():.3g} mm apart",
            "slices at one distance",
            "add the missing slices, or resample the series elsewhere",
        )
    if np.linalg.norm(steps - gaps[:, None] * normal, axis=1).max() > _TILTED * abs(typical):
        raise InputError(
            folder,
            "slices shifted against each other (a tilted gantry)",
            "slices stacked at a right angle",
            "resample the series elsewhere",
        )


def _unreadable(folder: Path) -> InputError:
    return InputError(folder, "an unreadable DICOM series", "complete files", "copy or export the series again")
