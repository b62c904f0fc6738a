"""Where the classes of a label map lie in the patient, how large they are, and how bright the scan is in them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Region:
    """One class of a label map. What an empty class does not have is None.

    Attributes:
        voxels: number of voxels.
        extent_mm: size of the region along R-L, A-P and S-I: the edges of the smallest box along the patient's axes
            that holds the centres of all its voxels, plus one voxel's own size along that axis.
        centroid_mm: mean position of its voxels, RAS.
        intensities: for every channel of the scan, mean and standard deviation (divided by n) of its voxels.
        touches_border: whether a voxel of it lies in the first or last layer of the scan, so that a part may be
            missing. A single layer (a 2D image) is no border.
    """

    voxels: int
    extent_mm: tuple[float, float, float] | None
    centroid_mm: tuple[float, float, float] | None
    intensities: tuple[tuple[float, float] | None, ...]
    touches_border: bool


def regions(
    labels: npt.NDArray[np.integer], image: npt.NDArray[np.floating], affine: FloatArray, count: int
) -> list[Region]:
    """Measure the classes 1 to ``count`` of a label map.

    Args:
        labels: (I, J, K) class values, 0 for the background.
        image: (C, I, J, K) the scan, any scale.
        affine: (4, 4) voxel -> RAS mm.
        count: number of classes.
    """
    from scipy.ndimage import find_objects

    boxes = find_objects(labels, max_label=count)
    return [_region(labels, image, affine, value, box) for value, box in enumerate(boxes, start=1)]


def _region(
    labels: npt.NDArray[np.integer],
    image: npt.NDArray[np.floating],
    affine: FloatArray,
    value: int,
    box: tuple[slice, slice, slice] | None,
) -> Region:
    if box is None:
        return Region(0, None, None, (None,) * len(image), False)
    inside = labels[box] == value
    layers = [inside.sum(axis=others) for others in ((1, 2), (0, 2), (0, 1))]
    voxels = int(layers[0].sum())
    start = np.array([one.start for one in box])
    mean = start + [float(counts @ np.arange(len(counts))) / voxels for counts in layers]
    values = [channel[box][inside].astype(np.float64) for channel in image]
    border = any(size > 1 and (one.start == 0 or one.stop == size) for one, size in zip(box, labels.shape, strict=True))
    low, high = _bounds(inside, affine)
    return Region(
        voxels,
        _three(high - low + np.abs(affine[:3, :3]).sum(1)),
        _three(affine[:3, :3] @ mean + affine[:3, 3]),
        tuple((float(one.mean()), float(one.std())) for one in values),
        border,
    )


def _bounds(inside: npt.NDArray[np.bool_], affine: FloatArray) -> tuple[FloatArray, FloatArray]:
    """(3,) smallest and largest R, A and S of the marked voxels' centres, from the first marked one of the box."""
    # Along a line of voxels a coordinate is monotonous: only the first and the last marked one of each line matter.
    marked = inside.any(axis=2)
    i, j = np.nonzero(marked)
    lines = inside[marked]
    first, last = lines.argmax(1), lines.shape[1] - 1 - lines[:, ::-1].argmax(1)
    ends = np.stack([np.concatenate(both) for both in ((i, i), (j, j), (first, last))], axis=1) @ affine[:3, :3].T
    return ends.min(0), ends.max(0)


def _three(values: FloatArray) -> tuple[float, float, float]:
    x, y, z = values.tolist()
    return x, y, z
