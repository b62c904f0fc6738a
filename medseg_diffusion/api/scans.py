"""A scan, or a label map, in any form that users of Python have, as a volume."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy.typing as npt
import torch

from medseg_diffusion.errors import InputError, UsageError
from medseg_diffusion.volumes.io import read_labels, read_volume, stacked, with_contrast
from medseg_diffusion.volumes.memory import refuse_geometry, volume_in_memory
from medseg_diffusion.volumes.modality import ModelInput, SeriesChoice
from medseg_diffusion.volumes.sources import InputOptions, find_sources, read_source
from medseg_diffusion.volumes.volume import Volume

Image = str | Path | Volume | nib.spatialimages.SpatialImage | npt.NDArray[Any]
"""An image: a file or the folder of a DICOM series, a volume, an image of nibabel, or an array with its voxel size.

An array is (I, J, K), or (I, J, K, C) of C channels; (I, J) is a single slice. Its axes point to the patient's right,
front and top (RAS), unless an affine says otherwise.
"""
Scan = Image | Sequence[Image] | Mapping[str, Image]
"""A scan: one image of all channels, or one image for each channel, in the model's order or by the channels' names."""


def read_scan(
    scan: Scan, takes: ModelInput, spacing_mm: Sequence[float] | None = None, affine: npt.ArrayLike | None = None
) -> Volume:
    """A scan as a volume, (C, I, J, K) float32.

    Args:
        scan: The scan.
        takes: What the model takes. It decides which of several DICOM series is read.
        spacing_mm: Voxel size of an array along its axes.
        affine: Voxel indices of an array -> RAS millimetres, (4, 4), instead of ``spacing_mm``.

    Raises:
        InputError: An unusable scan, an array without a voxel size, or images on different grids.
        UsageError: A folder of several scans, unknown channels, or a voxel size for a scan that has its own.
    """
    if isinstance(scan, Mapping):
        images = _in_order(scan, takes)
    elif isinstance(scan, Sequence) and not isinstance(scan, str):
        images = list(scan)
    else:
        images = [scan]
    if len(images) == 1 and isinstance(images[0], str | Path):
        refuse_geometry(spacing_mm, affine)
        return _read_one(Path(images[0]), takes)
    if len(images) != 1 and len(images) != len(takes.channels):
        raise UsageError(f"a list of {len(images)} images; the model {takes} takes one image for each channel")
    kinds = takes.kinds if len(images) > 1 else (None,)
    return stacked(_image(image, kind, spacing_mm, affine) for image, kind in zip(images, kinds, strict=True))


def _in_order(images: Mapping[str, Image], takes: ModelInput) -> list[Image]:
    if set(images) != set(takes.channels):
        raise UsageError(
            f"images of the channels {', '.join(map(str, images)) or 'none'}; expected one image for each of "
            f"{', '.join(takes.channels)}, the channels of the model {takes.model}; name the images so"
        )
    return [images[channel] for channel in takes.channels]


def _read_one(path: Path, takes: ModelInput) -> Volume:
    sources = find_sources([path], takes, InputOptions())
    if len(sources) > 1:
        raise UsageError(f"{path}: holds {len(sources)} scans; name one, or write files for all of them with segment()")
    return read_source(sources[0], takes)


def _image(image: Image, kind: str | None, spacing_mm: Sequence[float] | None, affine: npt.ArrayLike | None) -> Volume:
    if not isinstance(image, str | Path | Volume):
        return with_contrast(volume_in_memory(image, spacing_mm, affine))
    refuse_geometry(spacing_mm, affine)
    if not isinstance(image, Volume):
        return read_volume(image, 1, SeriesChoice(None, kind))
    volume = image.like(image.data.to("cpu", torch.float32))
    if bad := int((~volume.data.isfinite()).sum()):
        raise InputError(volume.source, f"{bad} NaN or infinite voxels", "finite intensities", "replace them")
    return with_contrast(volume)


def has_geometry(image: Image) -> bool:
    """Whether an image has a voxel size of its own; arrays, and tensors in their place, have none."""
    return isinstance(image, str | Path | Volume | nib.spatialimages.SpatialImage)


def read_mask(mask: Image, spacing_mm: Sequence[float] | None = None, affine: npt.ArrayLike | None = None) -> Volume:
    """A label map as a volume, (1, I, J, K) of whole numbers.

    Raises:
        InputError: An unusable label map, or an array without a voxel size.
        UsageError: A voxel size for a label map that has its own.
    """
    if not isinstance(mask, str | Path | Volume):
        return volume_in_memory(mask, spacing_mm, affine, kind="labels")
    refuse_geometry(spacing_mm, affine)
    if not isinstance(mask, Volume):
        return read_labels(mask)
    if mask.data.is_floating_point() or len(mask.data) != 1:
        actual = f"{len(mask.data)} channels of {mask.data.dtype}"
        raise InputError(mask.source, actual, "one channel of whole numbers", "read the file with read_labels")
    return mask
