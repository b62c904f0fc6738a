"""What an organ looks like on average, to discard what lies where it cannot be.

A network that sees windows may take a tongue for grey matter: the tissue is alike and the window does not show that the
brain lies above. The average shape of the training anatomies, registered to the prediction itself, knows. Registration
needs no scan, and the shape is a few kilobytes.
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
"""Height below the top over which the first guess of the position is made: what hangs below must not shift it."""
LARGEST_SCALE = 1.3
"""Of a plausible organ against the average one. Nothing else than size, place and tilt is adapted: an affine map would
stretch the shape over whatever hangs on the organ."""
LEAST_COVERED = 0.7
"""Share of the registered shape that the prediction must fill; with less, the two are not of the same thing."""


@dataclass(frozen=True, eq=False)
class ShapePrior:
    """The share of anatomies to which a position belongs, each moved, turned and scaled to fit the others.

    Attributes:
        share: (I, J, K) in [0, 1]; axes to the right, front and top of the person.
        spacing_mm: size of its voxels.
    """

    share: Tensor
    spacing_mm: float

    def near(self, found: Tensor, spacing_mm: Sequence[float], tolerance_mm: float) -> Tensor | None:
        """Where the shape, registered to ``found``, is at most ``tolerance_mm`` away: bool (*S).

        None if the two do not fit: nothing found, or the shape mostly empty of it.

        Args:
            found: (*S) bool, axes as for ``share``. It may be cut off by the border: the shape may lie outside.
            spacing_mm: size of its voxels.
            tolerance_mm: of individual shapes.
        """
        # Imported where used: models without a shape prior need neither SimpleITK nor ndimage.
        from scipy import ndimage

        from .registration import centre_of, image_of, moved, optimise, shift

        size = [max(1, round(n * mm / self.spacing_mm)) for n, mm in zip(found.shape, spacing_mm, strict=True)]
        coarse_mm = [n * mm / m for n, mm, m in zip(found.shape, spacing_mm, size, strict=True)]
        share = F.interpolate(found.float()[None, None], size, mode="area")[0, 0].cpu().numpy()
        mask = share > 0.5
        if not mask.any():
            return None
        fixed, moving = image_of(share, coarse_mm), image_of(self.share.numpy(), [self.spacing_mm] * 3)
        guesses = [shift(centre_of(part, coarse_mm), target) for part, target in self._anchors(mask, coarse_mm)]
        placed = [(guess, optimise(fixed, moving, guess)) for guess in guesses]
        plausible = [pair for pair in placed if 1 / LARGEST_SCALE < pair[0].GetScale() < LARGEST_SCALE]
        if not plausible:
            return None
        best = min(plausible, key=lambda pair: pair[1])[0]
        inside = moved(moving, fixed, best) > 0.5
        if not inside.any() or mask[inside].mean() < LEAST_COVERED:
            return None
        away = torch.from_numpy(ndimage.distance_transform_edt(~inside, sampling=coarse_mm)).float()
        return F.interpolate(away[None, None], tuple(found.shape), mode="trilinear")[0, 0] <= tolerance_mm

    def _anchors(
        self, mask: npt.NDArray[np.bool_], spacing_mm: Sequence[float]
    ) -> list[tuple[npt.NDArray[np.bool_], npt.NDArray[np.float64]]]:
        """Parts of the mask, each with the point of the shape onto which its centre is put first."""
        from .registration import centre_of

        shape, own = self.share.numpy() > 0.5, [self.spacing_mm] * 3
        return [
            (_top(mask, spacing_mm[2]), centre_of(_top(shape, self.spacing_mm), own)),
            (mask, centre_of(shape, own)),
        ]


def average_shape(masks: Sequence[Tensor], spacing_mm: float, grid_mm: float = 3.0, rounds: int = 2) -> ShapePrior:
    """The average of masks (*S) bool on voxels of ``spacing_mm``, each moved, turned and scaled to the average so far.

    Cavities are filled. The first mask gives position and size.
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
        fitted = []
        for mask, own in zip(coarse, centres, strict=True):
            moving = image_of(mask, grid)
            guess = shift(centre, own)
            optimise(average, moving, guess)
            fitted.append(moved(moving, average, guess))
        average = image_of(np.mean(fitted, axis=0), grid)
    share = array_of(average)
    used = np.argwhere(share > 0.01)
    cut = tuple(slice(max(0, low - 1), high + 2) for low, high in zip(used.min(0), used.max(0), strict=True))
    return ShapePrior(torch.from_numpy(np.ascontiguousarray(share[cut])), grid_mm)


def _top(mask: npt.NDArray[np.bool_], spacing_mm: float) -> npt.NDArray[np.bool_]:
    top = int(np.flatnonzero(mask.any((0, 1))).max())
    cut = mask.copy()
    cut[:, :, : max(0, top + 1 - round(SLAB_MM / spacing_mm))] = False
    return cut
