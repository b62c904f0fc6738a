"""Overlap of two label maps: counts, Dice and intersection over union (IoU) per class, from one confusion matrix.

Evaluation tools treat empty masks differently, which changes means. The rule here:

* prediction and reference both empty: Dice and IoU are NaN. The class is absent and rightly not predicted. Such a case
  says nothing about overlap; it is left out of the means and counted as missing.
* only one of them empty: 0. A false positive in a case without the structure is a failure and must lower the mean.

nnU-Net's ``summary.json`` follows the same rule (Isensee et al., "nnU-Net", Nature Methods 2021,
``evaluation/evaluate_predictions.py``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

EMPTY_POLICY: Mapping[str, float] = MappingProxyType(
    {"both_empty": math.nan, "prediction_empty": 0.0, "reference_empty": 0.0}
)
"""The value of Dice and IoU for each kind of empty mask; NaN is left out of the means, and counted."""

EMPTY_RULE = (
    "A class that is absent from both the prediction and the reference of a case has no Dice or IoU there: the case is "
    "left out of that class's mean and counted as missing. A class present in only one of the two scores 0."
)
"""`EMPTY_POLICY` in words, for reports."""

# Voxels compared at a time. It limits the index arrays to tens of megabytes, whatever the size of the scan.
_CHUNK = 1 << 22


@dataclass(frozen=True)
class ClassOverlap:
    """Agreement of one class in one case.

    Attributes:
        tp: Voxels that have the class in both arrays.
        fp: Voxels that have it in the prediction only.
        fn: Voxels that have it in the reference only.
        tn: Voxels that have it in neither.
        n_pred: Voxels of the class in the prediction, tp + fp.
        n_ref: Voxels of the class in the reference, tp + fn.
        dice: 2 tp / (2 tp + fp + fn) in [0, 1], or what `EMPTY_POLICY` says.
        iou: tp / (tp + fp + fn) in [0, 1], or what `EMPTY_POLICY` says.
    """

    tp: int
    fp: int
    fn: int
    tn: int
    n_pred: int
    n_ref: int
    dice: float
    iou: float

    @classmethod
    def from_counts(cls, *, tp: int, n_pred: int, n_ref: int, n_voxels: int) -> ClassOverlap:
        """Derive all fields from the counts of voxels in both masks, in the prediction, in the reference and in all."""
        fp, fn = n_pred - tp, n_ref - tp
        if n_pred == 0 or n_ref == 0:
            which = "both_empty" if n_pred == n_ref else "prediction_empty" if n_pred == 0 else "reference_empty"
            dice = iou = EMPTY_POLICY[which]
        else:
            dice, iou = 2 * tp / (n_pred + n_ref), tp / (tp + fp + fn)
        return cls(tp, fp, fn, n_voxels - tp - fp - fn, n_pred, n_ref, dice, iou)


def label_overlap(pred: NDArray[Any], ref: NDArray[Any], labels: Iterable[int]) -> dict[int, ClassOverlap]:
    """Compare two label maps class by class.

    Args:
        pred: Predicted labels, integer or boolean array of any shape `(*S,)` (2D or 3D).
        ref: Reference labels, same shape.
        labels: The classes to report. Values in the arrays that are not listed count as "another class".

    Returns:
        One `ClassOverlap` for each distinct entry of `labels`, in ascending order.

    Raises:
        ValueError: The shapes differ or an array does not hold integers.
    """
    if pred.shape != ref.shape:
        raise ValueError(f"pred has shape {pred.shape} and ref has shape {ref.shape}; they must be the same grid")
    for name, array in (("pred", pred), ("ref", ref)):
        if array.dtype.kind not in "iub":
            raise ValueError(f"{name} has dtype {array.dtype}; labels must be integers or booleans")
    classes = np.unique(np.asarray(list(labels), dtype=np.int64))
    confusion = _confusion(pred, ref, classes)
    from_pred, from_ref = confusion.sum(axis=1), confusion.sum(axis=0)
    return {
        int(label): ClassOverlap.from_counts(
            tp=int(confusion[i, i]), n_pred=int(from_pred[i]), n_ref=int(from_ref[i]), n_voxels=pred.size
        )
        for i, label in enumerate(classes)
    }


def _confusion(pred: NDArray[Any], ref: NDArray[Any], classes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Count label pairs: entry [p, r] for prediction p and reference r; the last row and column are "any other"."""
    n = len(classes) + 1
    pred, ref = pred.reshape(-1), ref.reshape(-1)
    counts = np.zeros(n * n, dtype=np.int64)
    for start in range(0, pred.size, _CHUNK):
        part = slice(start, start + _CHUNK)
        counts += np.bincount(_index(pred[part], classes) * n + _index(ref[part], classes), minlength=n * n)
    return counts.reshape(n, n)


def _index(values: NDArray[Any], classes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Position of each value in the sorted `classes`, or `len(classes)` where it is not among them."""
    if len(classes) == 0:
        return np.zeros(values.shape, dtype=np.int64)
    values = values.astype(np.int64)
    position = np.minimum(np.searchsorted(classes, values), len(classes) - 1)
    return np.where(classes[position] == values, position, len(classes)).astype(np.int64)
