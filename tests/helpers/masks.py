"""Small masks as files, and the evaluation of two cases."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

from medseg_diffusion.metrics.case_metrics import measure
from medseg_diffusion.metrics.evaluation_summary import EvaluatedCase, Evaluation, summarise

AFFINE = np.diag([1.0, 1.0, 2.0, 1.0])


def save(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    """Write a NIfTI file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def box(stop: int, label: int = 1) -> np.ndarray:
    """A box of 4 x 4 x (stop - 2) voxels that begins at (2, 2, 2)."""
    array = np.zeros((10, 9, 8), np.uint8)
    array[2:6, 2:6, 2:stop] = label
    return array


def but_few(warnings: Sequence[str]) -> list[str]:
    """The warnings but that of intervals over few cases, which must be there."""
    others = [text for text in warnings if not text.startswith("Intervals over as few as ")]
    assert len(others) == len(warnings) - 1
    return others


def evaluation(name: str = "case_a") -> Evaluation:
    """Two cases, three classes: class 1 everywhere, class 2 in the first case only, class 3 in none."""
    pairs = {name: ([1, 1, 2, 0], [1, 0, 2, 0]), "case_b": ([1, 0, 0, 0], [1, 0, 0, 0])}
    cases = [
        EvaluatedCase(
            key, f"{key}_seg.nii.gz", f"{key}.nii.gz", measure(np.array([p]), np.array([r]), [1, 2, 3], (1.0, 1.0))
        )
        for key, (p, r) in pairs.items()
    ]
    return summarise(cases, {1: "one", 2: name, 3: "three"}, warnings=[f"about {name}"])
