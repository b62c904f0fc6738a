"""Label maps of heads."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np


def write_label_maps(folder: Path) -> Path:
    """Four heads: nested balls of white matter, cortex, CSF, bone and skin."""
    axes = np.meshgrid(*[np.arange(48) - 23.5] * 3, indexing="ij")
    radius = np.sqrt(sum(axis**2 for axis in axes))
    folder.mkdir()
    for i in range(4):
        labels = np.zeros((48,) * 3, np.int16)
        for limit, label in ((22 - i, 511), (19, 515), (17, 24), (15, 3), (10, 2)):
            labels[radius < limit] = label
        nib.save(nib.Nifti1Image(labels, np.eye(4)), folder / f"map_{i}.nii.gz")
    return folder
