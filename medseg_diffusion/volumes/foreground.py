"""Where a scan shows something: the head, the brain of a skull-stripped scan, or all of a crop from inside a body."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from skimage.filters import threshold_otsu
from torch import Tensor

from .volume import Volume, inverse_reorientation, orientation_transform, reorient

Mask = npt.NDArray[np.bool_]

_DARK = 0.2  # what is so much of the way from the mean of air to that of the body is body
_BLANK = 0.1  # share of voxels that have one and the same value where a background was cut out
_FEW = 100_000  # voxels, evenly spread, among which that value is looked for
_SOLID = 0.95  # share of the outline's inside that has another one then; noise in air is full of holes
_TISSUE = 0.5  # share of the outline's rim that is no air then
_AIRLESS = 0.5  # share of the sides' voxels that are above air in a crop from inside a body
_CLOSED = 3  # pixels: gaps in the outline up to twice as wide are bridged
_SCALP = 0.05  # of the head's width: skin, fat and skull, a centimetre of twenty


def scan_foreground(volume: Volume, orientation: str | None = "RAS") -> Tensor:
    """`foreground` of a scan's first channel, bool (I, J, K) on its own grid.

    Slices are across the third axis of ``orientation`` (None: of the scan). It depends on the scan alone, not on what a
    model makes of it: scores of different models count in the same voxels.
    """
    transform = orientation_transform(volume.affine, orientation or volume.axcodes)
    x, y, _ = (volume.spacing[axis] for axis in np.argsort(transform[:, 0]))
    found = foreground(reorient(volume.data[:1], transform)[0], (x, y))
    return reorient(found[None], inverse_reorientation(transform))[0]


def foreground(image: Tensor, pixel: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """Bool (I, J, K) of a scan (I, J, K) in any unit; slices are across the third axis, of pixels of size ``pixel``.

    Three cases are told apart. A background of one value around something solid was cut out: what is left is the
    foreground. Where most of the sides is no air, the scan is a crop, and all of it counts. Else the head is what
    stands out from air: brighter than air by a fifth of what Otsu's two classes differ, the largest part, filled slice
    by slice, less what lies within a twentieth of the head's width of its outline in the slices: skin, fat and skull,
    which are often brighter than lesions. pDDPM erodes its brain masks similarly (Behrendt et al. 2023,
    arXiv 2303.03758).
    """
    plane = ndimage.generate_binary_structure(2, 1)[..., None]
    values = image.detach().cpu().double().numpy()
    lowest, top = (float(value) for value in np.percentile(values, [0.5, 99.5]))
    if top <= lowest:
        return torch.zeros(image.shape, dtype=torch.bool)
    scaled = np.clip((values - lowest) / (top - lowest), 0, 1)
    split = threshold_otsu(scaled.ravel())
    air, body = scaled[scaled <= split].mean(), scaled[scaled > split].mean()
    bright: Mask = scaled > air + _DARK * (body - air)
    # The value of a background that was cut out need not be the lowest: interpolation overshoots. What a tenth of the
    # voxels have is what most of every few share.
    levels, counts = np.unique(values.ravel()[:: max(1, values.size // _FEW)], return_counts=True)
    other: Mask = values != levels[counts.argmax()]
    if np.count_nonzero(~other) > _BLANK * values.size:
        outline = _filled(_largest(other))
        rim = outline & ~ndimage.binary_erosion(outline, plane)
        if other[outline].mean() > _SOLID and bright[rim].mean() > _TISSUE:
            return torch.from_numpy(outline)
    sides = np.concatenate([bright[0].ravel(), bright[-1].ravel(), bright[:, 0].ravel(), bright[:, -1].ravel()])
    if sides.mean() > _AIRLESS:
        return torch.ones(image.shape, dtype=torch.bool)
    opened = ndimage.binary_dilation(ndimage.binary_erosion(bright, plane, border_value=1), plane)
    # With room around it: a head that reaches the border would lose what the erosion takes from there.
    room = ((_CLOSED, _CLOSED), (_CLOSED, _CLOSED), (0, 0))
    closed = ndimage.binary_closing(np.pad(_largest(opened), room), plane, iterations=_CLOSED)
    return torch.from_numpy(_inner(_filled(closed[_CLOSED:-_CLOSED, _CLOSED:-_CLOSED]), pixel))


def _largest(mask: Mask) -> Mask:
    """The largest part connected by faces."""
    parts, count = ndimage.label(mask)
    if count < 2:
        return mask
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    found: Mask = parts == sizes.argmax()
    return found


def _inner(head: Mask, pixel: tuple[float, float]) -> Mask:
    """What lies deeper than the scalp in each slice; the image's border is no outline."""
    x, y = (side / min(pixel) for side in pixel)
    i, j, _ = np.nonzero(head)
    width = (np.ptp(i) * x + np.ptp(j) * y) / 2 + 1 if len(i) else 0.0
    apart = head.shape[0] * x + head.shape[1] * y  # between slices: further than anything within one
    depth = ndimage.distance_transform_edt(head, sampling=(x, y, apart))
    found: Mask = depth > max(1.0, _SCALP * width)
    return found


def _filled(mask: Mask) -> Mask:
    """The mask with the holes of every slice filled."""
    return np.stack([ndimage.binary_fill_holes(mask[..., k]) for k in range(mask.shape[2])], axis=-1)
