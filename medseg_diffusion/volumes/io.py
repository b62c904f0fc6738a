"""Reads and writes scans and label maps. A file that cannot be used is refused with a message of one line."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from medseg_diffusion.errors import InputError, MedsegError, UsageError, remarks
from medseg_diffusion.files import require_replaceable, temporary_folder

from . import nifti
from .label_table import LabelTable
from .modality import SeriesChoice
from .paths import MAKER, SUFFIXES, is_dicom, is_dicom_segmentation, is_image, require_file, suffix_of
from .volume import FileImage, FloatArray, Shape, Volume, check_affine, check_spacing, grid_distance

NIFTI_SUFFIXES = (".nii", ".nii.gz")
_MAX_LABEL = 65535
_BLOCK = 64  # voxels along the first axis that are turned at once, so that they are in the caches


def read_volume(path: Path | str, channels: int | None = 1, series: SeriesChoice = SeriesChoice()) -> Volume:
    """Read an image of three spatial axes.

    Args:
        path: a file with one of `SUFFIXES`, or a DICOM series: its folder, a zip of it, or a multi-frame file.
        channels: number of channels that it must have (last axis in the file; a colour image has three). None accepts
            any number.
        series: which of several DICOM series is read.

    Returns:
        (C, I, J, K) float32, slope and intercept applied.

    Raises:
        InputError: a file that is missing, damaged or of another kind; another number of axes or channels; voxels
            that are NaN, infinite or beyond float32; a constant channel; an unusable affine (`check_affine`).
    """
    return with_contrast(read_map(path, channels, series))


def with_contrast(volume: Volume) -> Volume:
    """The same volume; InputError if a channel is constant."""
    flat = [index for index, channel in enumerate(volume.data) if channel.min() == channel.max()]
    # One or two channels of a colour image may be constant: a blue stain leaves red and green black.
    if flat and not (is_image(volume.source or "") and len(flat) < len(volume.data)):
        which = f" in channel {flat[0]}" if len(volume.data) > 1 else ""
        found = f"the constant value {float(volume.data[flat[0]].flatten()[0]):g}{which}"
        raise InputError(volume.source, found, "an image with contrast", "check its export")
    return volume


def stacked(volumes: Iterable[Volume]) -> Volume:
    """Stack volumes on one grid, one for each channel, into one volume: (C, I, J, K) with the header of the first.

    Raises:
        InputError: a volume on another grid than the first.
    """
    first, *others = volumes
    for other in others:
        first.require_same_grid(other)
    return first.like(torch.cat([volume.data for volume in (first, *others)])) if others else first


def read_map(path: Path | str, channels: int | None = None, series: SeriesChoice = SeriesChoice()) -> Volume:
    """`read_volume` for maps, such as probabilities: a channel may be constant."""
    path = Path(path)
    return map_of(_opened(path, channels, series=series), path, channels)


def map_of(opened: FileImage, source: Path, channels: int | None = None) -> Volume:
    """The volume of an opened image, which `read_map` describes; ``source`` is its file or, in messages, its name."""
    array = _voxels(source, opened, channels)
    limit = float(np.finfo(np.float32).max)
    if array.dtype.itemsize > 4 and max(float(array.max()), -float(array.min())) > limit:
        raise InputError(source, "voxels beyond 3.4e38", "values that fit float32", "rescale the intensities")
    return Volume(torch.from_numpy(_copied(array, np.dtype(np.float32))), opened.affine, source, opened.header)


def read_grid(path: Path | str) -> tuple[Shape, FloatArray | None]:
    """Sizes and affine of an image, from its header alone; no affine for an image file, which has no voxel size.

    Raises:
        InputError: a file that is missing, damaged or of another kind.
    """
    path = Path(path)
    opened = _opened(path, None)
    i, j, k = opened.shape[:3]
    return (i, j, k), None if is_image(path) else opened.affine


def read_labels(path: Path | str) -> Volume:
    """Read a label map. From an image with a palette, the indices are read, not the colours.

    The labels of a DICOM segmentation are the numbers of its segments. It may hold a part of its scan's grid
    (`Header.sparse`).

    Returns:
        (1, I, J, K) int32 of values 0 to 65535.

    Raises:
        InputError: as `read_volume`, and for values that are not whole numbers from 0 to 65535.
    """
    path = Path(path)
    if _is_segmentation(path):
        from . import dicom_labels

        return dicom_labels.read_segmentation(path)[0]
    return labels_of(_opened(path, channels=1, labels=True), path)


def labels_of(opened: FileImage, source: Path) -> Volume:
    """The label map of an opened image, which `read_labels` describes; ``source`` as for `map_of`."""
    array = _voxels(source, opened, channels=1)
    expected, remedy = f"whole numbers from 0 to {_MAX_LABEL}", "pass a label map, not an image or a probability map"
    whole = array
    if array.dtype.kind == "f":
        whole = np.rint(array)
        # A slope that float32 cannot hold exactly leaves labels such as 0.99999994.
        wrong = np.abs(array - whole) > 1e-3
        if wrong.any():
            raise InputError(source, f"the label {array[wrong].flat[0]:g}", expected, remedy)
    if whole.min() < 0 or whole.max() > _MAX_LABEL:
        raise InputError(source, f"labels from {whole.min():g} to {whole.max():g}", expected, remedy)
    return Volume(torch.from_numpy(_copied(whole, np.dtype(np.int32))), opened.affine, source, opened.header)


def stored_labels(path: Path | str) -> dict[int, str]:
    """Label value -> name, by the header of a NIfTI mask or DICOM segmentation; empty for files without names.

    Raises:
        InputError: a DICOM segmentation that cannot be read, or a file of no known kind.
    """
    path = Path(path)
    if _is_segmentation(path):
        from . import dicom_labels

        return dicom_labels.segment_names(path)
    return nifti.stored_labels(path) if suffix_of(path) in NIFTI_SUFFIXES else {}


def _is_segmentation(path: Path) -> bool:
    return is_dicom(path) and path.is_file() and is_dicom_segmentation(path)


def maker_of(path: Path) -> str:
    """What a result of medseg says of its model (`SavedModel.signature`); empty for a file that medseg did not write.

    A file that was edited since by a program that keeps the words is still medseg's. One that cannot be read is not:
    medseg writes whole files only.
    """
    if path.name.lower().endswith(SUFFIXES):
        text: str = format_of(path).description(path)
    else:
        from . import dicom_seg

        text = dicom_seg.description(path)
    return text if text.startswith(MAKER) else ""


def write_labels(labels: Tensor, like: Volume, path: Path | str, table: LabelTable | None = None) -> None:
    """Write a label map with the geometry of a scan, without slope: as uint8, or as uint16 if a label is above 255.

    Args:
        labels: (I, J, K), or (N, I, J, K) for N maps along the file's last axis, integers or bool, 0 to 65535.
        like: the scan; its header codes and units go into the file too.
        path: the file. It is renamed into place when it is complete.
        table: names and colours of the labels, for the header of a NIfTI file; other formats have no place for them.

    Raises:
        ValueError: another shape, type or range.
        InputError: an unknown suffix.
        UsageError: a missing folder, a folder of this name, or an image file that is no .png or is given more than one
            slice.
    """
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    array = labels.detach().cpu().numpy()
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    if low < 0 or high > _MAX_LABEL:
        raise ValueError(f"labels must lie in 0..{_MAX_LABEL}, got {low}..{high}")
    if array.ndim == 4:
        array = array[0] if len(array) == 1 else np.moveaxis(array, 0, -1)
    dtype = np.dtype(np.uint8 if high <= 255 else np.uint16)
    # In the order of the file: turned while it is written, it takes ten times as long.
    turned = _copied(array.T[None], dtype)[0].T if array.ndim == 3 else array.astype(dtype)
    _write(turned, like, Path(path), table)


def write_map(data: Tensor, like: Volume, path: Path | str) -> None:
    """Write a map as float32 with the geometry of a scan; channels are the last axis in the file.

    Args:
        data: (C, I, J, K) or (I, J, K), any real values.
        like: the scan; its header codes and units go into the file too.
        path: the file. It is renamed into place when it is complete.

    Raises:
        ValueError: another shape.
        InputError: an unknown suffix.
        UsageError: a missing folder, a folder of this name, or an image file.
    """
    array = data.detach().cpu().to(torch.float32).numpy()
    if array.ndim == 4:
        array = array[0] if len(array) == 1 else np.moveaxis(array, 0, -1)
    _write(array, like, Path(path))


def upright(volume: Volume, scan: Path | str) -> Volume:
    """One channel of a volume, oriented for pictures: LAS, so that the patient's right is drawn on the left.

    A volume on the grid of a scan gives its first channel. A volume on the grid of an image file gives the mean of its
    channels, drawn as in the file: image files are read with ITK's axes, so their left side is called the patient's
    right, although nobody knows it.

    Args:
        volume: anything on the grid of the scan.
        scan: the scan's file; its suffix tells the two cases apart.
    """
    many = is_image(scan) and len(volume.data) > 1
    return volume.like(volume.data.mean(0, keepdim=True) if many else volume.data[:1]).oriented("LAS")


def format_of(path: Path | str) -> ModuleType:
    """The module whose ``open_image`` and ``write`` handle files with this suffix.

    Raises:
        InputError: an unknown suffix.
    """
    # Imported here, because a NIfTI file needs neither SimpleITK nor Pillow.
    if suffix_of(path) in NIFTI_SUFFIXES:
        return nifti
    if is_image(path):
        from . import raster

        return raster
    from . import itk

    return itk


def _opened(path: Path, channels: int | None, labels: bool = False, series: SeriesChoice = SeriesChoice()) -> FileImage:
    """Open a file of any format."""
    require_file(path)
    if not os.access(path, os.R_OK):
        raise InputError(path, "a file that may not be read (permission denied)", "a readable file", "change its mode")
    opened: FileImage
    if is_image(path):
        from . import raster

        opened = raster.open_labels(path) if labels else raster.open_image(path)
        _check_colours(path, opened.shape, channels, labels)
        return opened
    if is_dicom(path):
        from . import dicom

        return dicom.open_image(path, series)
    opened = format_of(path).open_image(path)
    return opened


def _voxels(source: Path, opened: FileImage, channels: int | None) -> npt.NDArray[Any]:
    """Check the header, then the voxels: (C, I, J, K) of finite numbers in the image's own type."""
    _check_shape(source, opened.shape, channels)
    if opened.dtype.fields is not None or opened.dtype.kind not in "iubf":
        kind = "colour (RGB)" if opened.dtype.fields is not None else str(opened.dtype)
        raise InputError(source, f"{kind} voxels", "one number per voxel", "convert the scan to greyscale")
    check_affine(opened.affine, source)
    if not is_image(source):
        check_spacing(opened.affine, source)
    array: npt.NDArray[Any] = opened.load()
    array = np.moveaxis(array.reshape(*array.shape[:3], -1), -1, 0)
    if array.dtype.kind == "f":
        bad = array.size - int(np.count_nonzero(np.isfinite(array)))
        if bad:
            raise InputError(
                source,
                f"{bad} NaN or infinite voxels ({bad / array.size:.2g} of all)",
                "finite intensities",
                "replace them, for example with the image's minimum",
            )
    return array


def _copied(array: npt.NDArray[Any], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """A copy (C, I, J, K) in C order; the file may be memory-mapped.

    NIfTI files have the order of Fortran. Turned block by block, this takes a third of the time of `numpy.array`.
    """
    if array.flags.c_contiguous:
        return np.array(array, dtype=dtype)
    result = np.empty(array.shape, dtype)
    for to, channel in zip(result, array, strict=True):
        for j in range(channel.shape[1]):
            for i in range(0, len(channel), _BLOCK):
                to[i : i + _BLOCK, j] = channel[i : i + _BLOCK, j]
    return result


def _check_shape(path: Path, shape: tuple[int, ...], channels: int | None) -> None:
    size = " x ".join(map(str, shape))
    if 0 in shape:
        raise InputError(path, f"an empty image ({size})", "at least one voxel along each axis", "export it again")
    if len(shape) < 3:
        raise InputError(path, f"a {len(shape)}D image ({size})", "a 3D volume", "stack the slices into one volume")
    extra = [n for n in shape[3:] if n != 1]
    if len(extra) > 1:
        raise InputError(path, f"{len(extra) + 3} axes ({size})", "a 3D volume", "extract the volume to be used")
    count = extra[0] if extra else 1
    if channels is not None and count != channels:
        expected = "a 3D volume" if channels == 1 else f"{channels} channels along a fourth axis"
        remedy = "extract the volume to be used" if channels == 1 else f"merge the {channels} images into one file"
        raise InputError(path, f"{'a 3D' if count == 1 else 'a 4D'} image ({size})", expected, remedy)


def _check_colours(path: Path, shape: tuple[int, ...], channels: int | None, labels: bool) -> None:
    count = 3 if len(shape) == 4 else 1
    if channels is None or count == channels:
        return
    found = f"a {'colour' if count == 3 else 'greyscale'} image"
    if labels:
        raise InputError(path, found, "a greyscale or palette image of class values", "convert the mask to one")
    expected = {1: "a greyscale image", 3: "a colour image"}.get(channels, f"{channels} channels")
    raise InputError(path, found, expected, f"convert the image, or configure {count} for data.channels")


def _write(array: npt.NDArray[np.generic], like: Volume, path: Path, table: LabelTable | None = None) -> None:
    """Write under a temporary folder beside the target, read the header back, then rename."""
    module = format_of(path)
    if array.shape[:3] != like.shape or array.ndim > 4:
        raise ValueError(f"data of shape {array.shape} (channels last) is not on the grid {like.shape}")
    if not path.parent.is_dir():
        raise UsageError(f"{path.parent}: no such folder; make it or write elsewhere")
    require_replaceable(path)
    if is_image(path):
        from . import raster

        raster.require_mask(path, array)
    # A temporary folder, not a temporary name: an .mhd file stores the name of its data file.
    with temporary_folder(path) as folder:
        temporary = folder / path.name
        if module is nifti:
            nifti.write(temporary, array, like, table)
        else:
            module.write(temporary, array, like)
        with remarks():  # not made again: the header is the scan's
            written = module.open_image(temporary)
        _verify(written, array, like, path)
        parts = sorted(folder.iterdir(), key=lambda part: part == temporary)  # the header last
        for part in parts:
            os.replace(part, path.parent / part.name)


def _verify(written: FileImage, array: npt.NDArray[np.generic], like: Volume, path: Path) -> None:
    # A file without an sform stores the axes as a float32 quaternion, which is less exact.
    only_quaternion = written.header.sform_code == 0
    tolerance = (0.1 if only_quaternion else 1e-3) * min(like.spacing)
    header, expected = written.header, like.header
    wrong = [
        (written.shape != array.shape, "shape"),
        (written.dtype != array.dtype, "voxel type"),
        (grid_distance(written.affine, like.affine, array.shape) > tolerance, "affine"),
    ]
    if suffix_of(path) in NIFTI_SUFFIXES:
        wrong += [
            (
                (header.qform_code, header.sform_code) != (expected.qform_code, expected.sform_code),
                "qform or sform code",
            ),
            (header.xyzt_units != expected.xyzt_units, "units"),
        ]
    if lost := [what for failed, what in wrong if failed]:
        raise MedsegError(f"{path}: the format cannot keep the scan's {', '.join(lost)}; nothing was written")
