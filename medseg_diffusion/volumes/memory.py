"""Images in memory, of nibabel or as arrays, and volumes: with the checks that files get."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
import numpy.typing as npt
import torch

from medseg_diffusion.errors import InputError, UsageError

from .io import labels_of, map_of
from .label_table import LabelTable
from .nifti import image_of, opened_in_memory
from .volume import FileImage, FloatArray, Header, Volume

InMemory = nib.spatialimages.SpatialImage | npt.NDArray[Any]
_ARRAY = Path("the array")
_SIZE_OF_ARRAY = "give spacing_mm=(1.0, 1.0, 3.0), its voxel size along each axis, or affine="


def volume_in_memory(
    image: InMemory,
    spacing_mm: Sequence[float] | None = None,
    affine: npt.ArrayLike | None = None,
    kind: Literal["image", "labels"] = "image",
) -> Volume:
    """An image of nibabel or an array as a volume, (C, I, J, K), checked as a file is.

    Args:
        image: An image of nibabel, or an array (I, J, K), (I, J, K, C) of C channels, or (I, J) of one slice.
        spacing_mm: Voxel size of an array along its axes, which point to right, front and top (RAS).
        affine: Voxel indices of an array -> RAS millimetres, (4, 4), instead of ``spacing_mm``.
        kind: "image" gives float32; "labels" gives int32, of one channel of whole numbers.

    Raises:
        InputError: An unusable image (`volumes.io.read_map`, `volumes.io.read_labels`), or an array without a voxel
            size.
        UsageError: Both ``spacing_mm`` and ``affine``, or one of them for an image of nibabel.
    """
    if isinstance(image, nib.spatialimages.SpatialImage):
        refuse_geometry(spacing_mm, affine)
        file = image.get_filename()
        source = Path(file) if file else None
        name = source or Path("the nibabel image")
        opened = opened_in_memory(image, name)
    else:
        source, name = None, _ARRAY
        opened = _opened_array(np.asarray(image), spacing_mm, affine)
    volume = map_of(opened, name) if kind == "image" else labels_of(opened, name)
    return replace(volume, source=source)


def refuse_geometry(spacing_mm: Sequence[float] | None, affine: npt.ArrayLike | None) -> None:
    """UsageError for a voxel size beside an image that has its own."""
    if spacing_mm is not None or affine is not None:
        given = "affine" if spacing_mm is None else "spacing_mm"
        raise UsageError(f"{given} is for arrays; files, nibabel images and volumes have their own voxel size")


def _opened_array(
    array: npt.NDArray[Any], spacing_mm: Sequence[float] | None, affine: npt.ArrayLike | None
) -> FileImage:
    if spacing_mm is not None and affine is not None:
        raise UsageError("spacing_mm and affine both say how large voxels are; give one of them")
    single = array.ndim == 2
    if single:
        array = array[..., None]
    if affine is not None:
        matrix: FloatArray = np.array(affine, dtype=np.float64)
    else:
        matrix = np.diag([*_spacing(spacing_mm, single), 1.0])
    return FileImage(array.shape, array.dtype, matrix, Header(), lambda: array)


def _spacing(spacing_mm: Sequence[float] | None, single: bool) -> list[float]:
    """Three voxel sizes; a ``single`` slice may have two."""
    if spacing_mm is None:
        raise InputError(_ARRAY, "no voxel size", "that of the scan in mm", _SIZE_OF_ARRAY)
    sizes = np.ravel(spacing_mm).astype(float).tolist()  # a single number is refused below, not an error of Python
    sizes += [1.0] * (single and len(sizes) == 2)
    if len(sizes) != 3 or not all(0 < size < float("inf") for size in sizes):
        given = ", ".join(f"{size:g}" for size in sizes)
        raise InputError(_ARRAY, f"spacing_mm=({given})", "three sizes above 0, in mm", _SIZE_OF_ARRAY)
    return sizes


def to_nibabel(data: torch.Tensor | npt.NDArray[Any], like: Volume, table: LabelTable | None = None) -> nib.Nifti1Image:
    """Voxels (I, J, K) or (C, I, J, K) on the grid of ``like`` as an image of nibabel; channels become its last axis.

    Whole numbers from 0 to 255 become uint8, other whole numbers int32, and all other values float32. ``table`` goes
    into the header of a label map.
    """
    array = np.asarray(data)
    if array.dtype.kind in "iub":
        array = array.astype(np.uint8 if array.size == 0 or 0 <= array.min() <= array.max() <= 255 else np.int32)
    else:
        array = array.astype(np.float32)
    if array.ndim == 4:
        array = array[0] if len(array) == 1 else np.moveaxis(array, 0, -1)
    return image_of(np.ascontiguousarray(array), like, table)
