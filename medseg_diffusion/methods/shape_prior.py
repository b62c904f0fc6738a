"""The average shape of an organ, to discard predictions at implausible positions.

A network that sees windows may confuse a tongue with grey matter: the tissues look alike, and the window does not show
that the brain is above it. The average shape of the training anatomies is registered to the prediction to exclude such
errors. The registration does not need the scan, and the shape takes a few kilobytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

SLAB_MM = 80.0
"""The first guess of the position uses this height below the top, so that errors below the organ do not shift it."""
LARGEST_SCALE = 1.3
"""Largest and smallest (1 / 1.3) scale of a plausible organ relative to the average. Only size, position and rotation
are adapted: an affine transform would stretch the shape over errors beside the organ."""
LEAST_SIZE = 4
"""Voxels of the shape's grid along an axis, below which there is nothing to register (nor to smooth, says ITK)."""
LEAST_COVERED = 0.7
"""Smallest share of the registered shape that the prediction must fill. Below it, the registration has failed."""


@dataclass(frozen=True, eq=False)
class ShapePrior:
    """The average of registered anatomies.

    Attributes:
        share: (I, J, K), share of the anatomies that contain a position, in [0, 1]; RAS axes.
        spacing_mm: voxel size.
    """

    share: Tensor
    spacing_mm: float

    def near(self, prediction: Tensor, spacing_mm: Sequence[float], tolerance_mm: float) -> Tensor | None:
        """The positions that are at most ``tolerance_mm`` away from the shape, registered to the prediction.

        Args:
            prediction: (*S) bool, RAS axes. The organ may be cut off by the image's border.
            spacing_mm: its voxel size.
            tolerance_mm: tolerance for differences between individuals.

        Returns:
            bool (*S), or None if the shape does not fit: an image of less than `LEAST_SIZE`, an empty prediction, an
            implausible scale, or less than `LEAST_COVERED` of the shape filled.
        """
        # Imported here, because models without a shape prior need neither SimpleITK nor ndimage.
        from scipy import ndimage

        from .registration import centre_of, image_of, moved, optimise, shift

        size = [max(1, round(n * mm / self.spacing_mm)) for n, mm in zip(prediction.shape, spacing_mm, strict=True)]
        if min(size) < LEAST_SIZE:
            return None
        coarse_mm = [n * mm / m for n, mm, m in zip(prediction.shape, spacing_mm, size, strict=True)]
        share = F.interpolate(prediction.float()[None, None], size, mode="area")[0, 0].cpu().numpy()
        mask = share > 0.5
        if not mask.any():
            return None
        fixed, moving = image_of(share, coarse_mm), image_of(self.share.numpy(), [self.spacing_mm] * 3)
        guesses = [shift(centre_of(part, coarse_mm), target) for part, target in self._anchors(mask, coarse_mm)]
        registered = [(guess, optimise(fixed, moving, guess)) for guess in guesses]
        plausible = [pair for pair in registered if 1 / LARGEST_SCALE < pair[0].GetScale() < LARGEST_SCALE]
        if not plausible:
            return None
        best = min(plausible, key=lambda pair: pair[1])[0]
        inside = moved(moving, fixed, best) > 0.5
        if not inside.any() or mask[inside].mean() < LEAST_COVERED:
            return None
        distance = torch.from_numpy(ndimage.distance_transform_edt(~inside, sampling=coarse_mm)).float()
        return F.interpolate(distance[None, None], tuple(prediction.shape), mode="trilinear")[0, 0] <= tolerance_mm

    def _anchors(
        self, mask: npt.NDArray[np.bool_], spacing_mm: Sequence[float]
    ) -> list[tuple[npt.NDArray[np.bool_], npt.NDArray[np.float64]]]:
        """Initial alignments: a part of the mask, and the point of the shape that its centre is moved to."""
        from .registration import centre_of

        shape, shape_mm = self.share.numpy() > 0.5, [self.spacing_mm] * 3
        return [
            (_top(mask, spacing_mm[2]), centre_of(_top(shape, self.spacing_mm), shape_mm)),
            (mask, centre_of(shape, shape_mm)),
        ]


def average_shape(masks: Sequence[Tensor], spacing_mm: float, grid_mm: float = 3.0, rounds: int = 2) -> ShapePrior:
    """The average of masks, each registered to the average of the previous round.

    Cavities are filled. The average has the position and size of the first mask.

    Args:
        masks: (*S) bool each.
        spacing_mm: voxel size of the masks, the same along all axes.
        grid_mm: voxel size of the average.
        rounds: number of rounds of registration.
    """
    from scipy import ndimage

    from .registration import array_of, centre_of, image_of, moved, optimise, shift

    coarse = []
    for mask in masks:
        whole = np.pad(ndimage.binary_fill_holes(mask.numpy()).astype(np.float32), round(30 / spacing_mm))
        smooth = ndimage.gaussian_filter(whole, 0.5 * grid_mm / spacing_mm)
        coarse.append(ndimage.zoom(smooth, spacing_mm / grid_mm, order=1))
    grid = [grid_mm] * 3
    centres = [centre_of(mask > 0.5, grid) for mask in coarse]
    average, centre = image_of(coarse[0], grid), centres[0]
    for _ in range(rounds):
        registered = []
        for mask, mask_centre in zip(coarse, centres, strict=True):
            moving = image_of(mask, grid)
            guess = shift(centre, mask_centre)
            optimise(average, moving, guess)
            registered.append(moved(moving, average, guess))
        average = image_of(np.mean(registered, axis=0), grid)
    share = array_of(average)
    used = np.argwhere(share > 0.01)
    cut = tuple(slice(max(0, low - 1), high + 2) for low, high in zip(used.min(0), used.max(0), strict=True))
    return ShapePrior(torch.from_numpy(np.ascontiguousarray(share[cut])), grid_mm)


def _top(mask: npt.NDArray[np.bool_], spacing_mm: float) -> npt.NDArray[np.bool_]:
    """The uppermost `SLAB_MM` of a mask (I, J, K)."""
    top = int(np.flatnonzero(mask.any((0, 1))).max())
    cut = mask.copy()
    cut[:, :, : max(0, top + 1 - round(SLAB_MM / spacing_mm))] = False
    return cut
