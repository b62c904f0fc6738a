"""Voxels and oblique geometries, as NIfTI files."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np

SHAPE = (4, 5, 6)


def oblique(angles=(0.2, -0.1, 0.4), spacing=(0.9, 1.1, 2.5)) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = nib.eulerangles.euler2mat(*angles) * spacing
    affine[:3, 3] = -50.5, 20.25, 3
    return affine


SHEARED = oblique() @ np.array([[1, 0.2, 0, 0], [0, 1, 0, 0], [0, 0.1, 1, 0], [0, 0, 0, 1]])


def values(shape=SHAPE, dtype=np.float32) -> np.ndarray:
    return (np.random.default_rng(0).random(shape) * 200).astype(dtype)


def save(path: Path, array=None, affine=None, codes=(1, 1), units=2, qform=None) -> Path:
    image = nib.Nifti1Image(values() if array is None else array, oblique() if affine is None else affine)
    image.set_qform(image.affine if qform is None else qform, codes[0])
    image.set_sform(image.affine, codes[1])
    image.header["xyzt_units"] = units
    nib.save(image, path)
    return path
