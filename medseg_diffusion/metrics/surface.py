"""Distances between the surfaces of two masks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage


def surface_distances(
    pred: NDArray[np.bool_], ref: NDArray[np.bool_], spacing: Sequence[float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Distances in mm from each surface voxel of ``pred`` to the surface of ``ref``, and from ``ref`` to ``pred``.

    A surface voxel belongs to the mask and has a face towards the outside of the mask; the edge of the image counts as
    outside. Neither mask may be empty.
    """
    # Axes of one voxel are dropped. Along them every voxel of a 2D image would be a surface voxel.
    wide = [axis for axis, size in enumerate(pred.shape) if size > 1] or [0]
    pred, ref = (mask.reshape([mask.shape[axis] for axis in wide]) for mask in (pred, ref))
    spacing = [spacing[axis] for axis in wide]
    box = tuple(
        slice(max(0, places.min() - 1), places.max() + 2) for places in np.nonzero(pred | ref)
    )  # distances between the surfaces never leave the bounding box of both masks
    first, second = (_surface(mask[box]) for mask in (pred, ref))
    to_first, to_second = (ndimage.distance_transform_edt(~surface, spacing) for surface in (first, second))
    return to_second[first], to_first[second]


def hd95(pred: NDArray[np.bool_], ref: NDArray[np.bool_], spacing: Sequence[float]) -> float:
    """95th percentile Hausdorff distance in mm: the larger of the two directed 95th percentiles.

    It is NaN if either mask is empty. Such cases are counted and left out of means.
    """
    if not (pred.any() and ref.any()):
        return math.nan
    return float(max(np.percentile(distances, 95) for distances in surface_distances(pred, ref, spacing)))


def _surface(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return mask & ~ndimage.binary_erosion(mask)
