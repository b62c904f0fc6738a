"""NIfTI files: the geometry's codes and matrices are preserved; slope and intercept are applied to the voxels."""

from __future__ import annotations

import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt

from medseg_diffusion.errors import InputError

from .volume import FileImage, FloatArray, Header, Volume, grid_distance

# What nibabel, gzip and numpy raise for files that are truncated, damaged or of another format.
_BROKEN = (OSError, EOFError, zlib.error, ValueError, OverflowError, MemoryError)
_BROKEN_HEADER = (nib.filebasedimages.ImageFileError, nib.spatialimages.HeaderDataError)
_MILLIMETRES = {1: 1000.0, 3: 0.001}  # NIfTI unit codes of metres and micrometres; all others count as millimetres


def open_image(path: Path) -> FileImage:
    """Read the header of a .nii or .nii.gz file.

    Raises:
        InputError: a file of another format, or a damaged one.
    """
    try:
        image = nib.load(path)
        if not isinstance(image, nib.Nifti1Image):
            raise InputError(path, f"a {type(image).__name__}", "a NIfTI volume", "convert it to a NIfTI volume")
        dtype = np.dtype(image.header.get_data_dtype())
        affine, header = _geometry(image)
    except (*_BROKEN, *_BROKEN_HEADER) as error:
        raise _unreadable(path, error) from error

    def load() -> npt.NDArray[np.generic]:
        try:
            return np.asanyarray(image.dataobj)
        except _BROKEN as error:
            raise _unreadable(path, error) from error

    return FileImage(tuple(image.shape), dtype, affine, header, load)


def write(path: Path, array: npt.NDArray[np.generic], like: Volume) -> None:
    """Write voxels (I, J, K) or (I, J, K, C) unscaled (slope 1, intercept 0) with the geometry of `like`."""
    kind = nib.Nifti1Image if max(array.shape) < 2**15 else nib.Nifti2Image
    header = kind.header_class()
    header.set_data_dtype(array.dtype)
    header.set_data_shape(array.shape)
    units = like.header.xyzt_units
    to_file = np.diag([*[1 / _MILLIMETRES.get(units & 7, 1.0)] * 3, 1.0])
    qform = like.affine if like.header.qform is None else like.header.qform
    header.set_qform(to_file @ qform, code=like.header.qform_code)
    header.set_sform(to_file @ like.affine, code=like.header.sform_code)
    header["xyzt_units"] = units
    header.set_slope_inter(1, 0)
    nib.save(kind(array, None, header), path)


def _geometry(image: nib.Nifti1Image) -> tuple[FloatArray, Header]:
    raw = image.header
    units = int(raw["xyzt_units"])
    scale = _MILLIMETRES.get(units & 7, 1.0)
    to_mm = np.diag([scale, scale, scale, 1.0])
    affine: FloatArray = to_mm @ np.asarray(image.affine, dtype=np.float64)
    qform_code, sform_code = int(raw["qform_code"]), int(raw["sform_code"])
    qform: FloatArray | None = to_mm @ raw.get_qform() if qform_code and sform_code else None
    if qform is not None and grid_distance(qform, affine, tuple(image.shape)) < 1e-3:
        qform = None
    return affine, Header(qform_code, sform_code, units, qform)


def _unreadable(path: Path, error: Exception) -> InputError:
    # Some of nibabel's messages have several lines; ours have one.
    reason = " ".join(str(error).split())[:120].rstrip(".") or type(error).__name__
    return InputError(path, f"an unreadable file ({reason})", "a complete NIfTI file", "copy or convert the scan again")
