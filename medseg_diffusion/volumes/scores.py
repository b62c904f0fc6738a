"""Score maps: one number per voxel, or NaN where a voxel has none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from medseg_diffusion.errors import InputError

from .io import _check_shape, format_of
from .paths import require_file, suffix_of
from .volume import FileImage, Volume, check_affine


def read_scores(path: Path | str) -> Volume:
    """Read a map of scores of one channel.

    Returns:
        (1, I, J, K) float32, slope and intercept applied; NaN where a voxel has no score.

    Raises:
        InputError: as `read_map`, but NaN is accepted; also for a map in which every voxel is NaN.
    """
    path = Path(path)
    require_file(path)
    suffix_of(path)  # refuses a DICOM series, which cannot be a map of scores
    opened: FileImage = format_of(path).open_image(path)
    _check_shape(path, opened.shape, channels=1)
    if opened.dtype.fields is not None or opened.dtype.kind not in "iubf":
        raise InputError(path, f"{opened.dtype} voxels", "one number per voxel", "write the scores as float32")
    check_affine(opened.affine, path)
    with np.errstate(over="ignore"):  # values beyond float32 become infinite and are refused below
        data = np.array(opened.load(), dtype=np.float32, order="C").reshape(1, *opened.shape[:3])
    if bad := int(np.isinf(data).sum()):
        found = f"{bad} infinite voxels ({bad / data.size:.2g} of all)"
        raise InputError(path, found, "finite scores, or NaN where a voxel has none", "write the map again")
    if np.isnan(data).all():
        raise InputError(path, "no score at all (every voxel is NaN)", "one score per voxel", "write the map again")
    return Volume(torch.from_numpy(data), opened.affine, path, opened.header)
