"""The foreground of a scan: the head, the brain of a skull-stripped scan, or all of a crop from inside the body."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from skimage.filters import threshold_otsu
from torch import Tensor

from .volume import Volume, inverse_reorientation, orientation_transform, reorient

Mask = npt.NDArray[np.bool_]

_DARK = 0.2  # threshold of the body, as a fraction of the way from the mean of air to the mean of the body
# A background was set to one value (skull-stripping) if all three hold:
_BLANK = 0.1  # more than this share of the voxels has that value,
_SOLID = 0.95  # more than this share of the voxels inside the outline has another value (noise in air leaves holes),
_TISSUE = 0.5  # and more than this share of the outline's rim is brighter than air
_FEW = 100_000  # number of evenly spread voxels that are searched for that value
_AIRLESS = 0.5  # a crop from inside a body has more than this share of its side faces above air
_CLOSED = 3  # pixels: gaps in the outline up to twice as wide are closed
_SCALP = 0.05  # thickness of skin, fat and skull as a share of the head's width: 1 cm of 20 cm


def scan_foreground(volume: Volume, orientation: str | None = "RAS") -> Tensor:
    """`foreground` of a scan's first channel, bool (I, J, K) on the scan's grid.

    Slices are across the third axis of ``orientation`` (None: of the scan). The foreground depends on the scan alone,
    not on a model's preprocessing, so scores of different models are compared in the same voxels.
    """
    transform = orientation_transform(volume.affine, orientation or volume.axcodes)
    x, y, _ = (volume.spacing[axis] for axis in np.argsort(transform[:, 0]))
    mask = foreground(reorient(volume.data[:1], transform)[0], (x, y))
    return reorient(mask[None], inverse_reorientation(transform))[0]


def foreground(image: Tensor, pixel: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """Foreground mask, bool (I, J, K), of a scan (I, J, K) in any unit.

    Slices are across the third axis. Their pixels have the size ``pixel``. There are three cases:

    1. A background of one value surrounds something solid, as after skull-stripping. The rest is the foreground.
    2. Most voxels on the side faces are brighter than air. The scan is a crop from inside a body, and all of it is
       foreground.
    3. Otherwise the foreground is the head without its outer layer. The head is the largest connected part that is
       brighter than air by a fifth of the difference between Otsu's two classes, with its holes filled slice by slice.
       In each slice, a layer of a twentieth of the head's width is removed: skin, fat and skull, which are often
       brighter than lesions. pDDPM erodes its brain masks similarly (Behrendt et al. 2023, arXiv 2303.03758).
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
    # The background's value need not be the lowest: interpolation overshoots. A sample of the voxels is enough to find
    # a value that a tenth of all voxels share.
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
    # Padded first: otherwise the erosion would cut into a head that reaches the border.
    room = ((_CLOSED, _CLOSED), (_CLOSED, _CLOSED), (0, 0))
    closed = ndimage.binary_closing(np.pad(_largest(opened), room), plane, iterations=_CLOSED)
    return torch.from_numpy(_inner(_filled(closed[_CLOSED:-_CLOSED, _CLOSED:-_CLOSED]), pixel))


def _largest(mask: Mask) -> Mask:
    """The largest part of the mask that is connected by faces."""
    parts, count = ndimage.label(mask)
    if count < 2:
        return mask
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    largest: Mask = parts == sizes.argmax()
    return largest


def _inner(head: Mask, pixel: tuple[float, float]) -> Mask:
    """The head without its outer layer, slice by slice. The image's border does not count as an outline."""
    x, y = (side / min(pixel) for side in pixel)
    i, j, _ = np.nonzero(head)
    width = (np.ptp(i) * x + np.ptp(j) * y) / 2 + 1 if len(i) else 0.0
    apart = head.shape[0] * x + head.shape[1] * y  # distance of slices: larger than any distance within a slice
    depth = ndimage.distance_transform_edt(head, sampling=(x, y, apart))
    inner: Mask = depth > max(1.0, _SCALP * width)
    return inner


def _filled(mask: Mask) -> Mask:
    """The mask with the holes of every slice filled."""
    return np.stack([ndimage.binary_fill_holes(mask[..., k]) for k in range(mask.shape[2])], axis=-1)
