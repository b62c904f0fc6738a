"""Distances between the surfaces of two masks: Hausdorff distance, mean distance, normalised surface distance.

A surface voxel belongs to the mask and has a face towards the outside of the mask; the edge of the image counts as
outside. Distances are between centres of voxels, and every surface voxel counts once. MONAI and Metrics Reloaded define
the three metrics in this way. The package surface-distance weights its surface elements by their area instead, which
changes the numbers most where voxels are far from cubes (docs/reference/files.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

# Voxel sizes in files are rounded to float32: a distance of one voxel of 1 mm may be 1.0000001 mm.
_ROUNDING = 1e-5


@dataclass(frozen=True, eq=False)
class SurfaceDistances:
    """Distances in mm between the surfaces of two masks that are not empty.

    Attributes:
        from_prediction: (n,) from each surface voxel of the prediction to the surface of the reference.
        from_reference: (m,) from each surface voxel of the reference to the surface of the prediction.
    """

    from_prediction: NDArray[np.float64]
    from_reference: NDArray[np.float64]

    @property
    def hd95(self) -> float:
        """95th percentile Hausdorff distance: the larger of the two directed 95th percentiles."""
        return float(max(np.percentile(distances, 95) for distances in (self.from_prediction, self.from_reference)))

    @property
    def assd(self) -> float:
        """Average symmetric surface distance: the mean over the surface voxels of both masks."""
        total = self.from_prediction.sum() + self.from_reference.sum()
        return float(total / (self.from_prediction.size + self.from_reference.size))

    def nsd(self, tolerance_mm: float) -> float:
        """Normalised surface distance: share of the surface voxels of both masks within the tolerance of the other.

        Nikolov et al., "Clinically applicable segmentation of head and neck anatomy", JMIR 2021.
        """
        limit = tolerance_mm * (1 + _ROUNDING)
        within = sum(int((one <= limit).sum()) for one in (self.from_prediction, self.from_reference))
        return within / (self.from_prediction.size + self.from_reference.size)


def surface_distances(pred: NDArray[np.bool_], ref: NDArray[np.bool_], spacing: Sequence[float]) -> SurfaceDistances:
    """Distances between the surfaces of two masks (*S), 2D or 3D, neither of them empty.

    The nearest surface voxel is found by a k-d tree over surface voxels. This is exact, and much faster than distance
    transforms, which compute the distance of every voxel.

    Args:
        pred: the predicted mask.
        ref: the reference mask.
        spacing: voxel size in mm along each axis.
    """
    first, second = _surface(pred), _surface(ref)
    places = [np.argwhere(surface) * np.asarray(spacing, dtype=np.float64) for surface in (first, second)]
    # Where the surfaces coincide, the distance is 0.
    shared = first & second
    alone = [~shared[surface] for surface in (first, second)]
    distances = [np.zeros(len(rows)) for rows in places]
    for own, other in ((0, 1), (1, 0)):
        if alone[own].any():
            tree = cKDTree(places[other], balanced_tree=False, compact_nodes=False)
            distances[own][alone[own]] = tree.query(places[own][alone[own]])[0]
    return SurfaceDistances(*distances)


def hd95(pred: NDArray[np.bool_], ref: NDArray[np.bool_], spacing: Sequence[float]) -> float:
    """95th percentile Hausdorff distance in mm of two masks on their whole grid; NaN if either mask is empty."""
    if not (pred.any() and ref.any()):
        return math.nan
    pred, ref, spacing = without_single_axes(pred, ref, spacing)
    return surface_distances(pred, ref, spacing).hd95


def without_single_axes(
    first: NDArray[Any], second: NDArray[Any], spacing: Sequence[float]
) -> tuple[NDArray[Any], NDArray[Any], list[float]]:
    """Two arrays of one grid and their voxel size without the axes of one voxel; at least one axis stays.

    Along such an axis every voxel of a 2D image would be a surface voxel. Only the whole grid tells which axes these
    are: a lesion in a single slice of a scan has a surface towards both neighbouring slices.
    """
    wide = [axis for axis, size in enumerate(first.shape) if size > 1] or [0]
    shape = [first.shape[axis] for axis in wide]
    return first.reshape(shape), second.reshape(shape), [spacing[axis] for axis in wide]


def _surface(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The surface voxels of a mask."""
    inside = mask.copy()
    for axis in range(mask.ndim):
        inner, voxels = np.moveaxis(inside, axis, 0), np.moveaxis(mask, axis, 0)
        inner[1:] &= voxels[:-1]
        inner[:-1] &= voxels[1:]
        inner[0] = inner[-1] = False
    return mask & ~inside
