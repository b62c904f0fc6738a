"""Finds an organ on a coarse grid, so that the segmenter computes the organ's box alone."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from medseg_diffusion.tasks.mask import FeedForward
from medseg_diffusion.volumes.preprocessing import Box, Placement, Preprocessing
from medseg_diffusion.volumes.volume import Volume

from .passes import on_model_grid

LEAST_ML = 30.0
"""Smaller volumes of an organ are errors: a scan that shows less of it is segmented as a whole, and marked."""
NOT_FOUND = f"less than {LEAST_ML:.0f} ml of the organ found on the coarse grid, so the whole scan was segmented"
"""What is said of such a scan."""


class Finder:
    """A trained network that marks an organ in scans of low resolution.

    Args:
        network: the network of two classes, in evaluation mode.
        orientation: direction of the axes, such as "RAS".
        spacing_mm: voxel size of the coarse grid.
        margin_mm: margin of the box around the marked voxels.
    """

    def __init__(self, network: FeedForward, orientation: str | None, spacing_mm: float, margin_mm: float) -> None:
        self.network = network
        self.preprocessing = Preprocessing(orientation, (spacing_mm, spacing_mm, spacing_mm))
        self.margin_mm = margin_mm

    def box(self, volume: Volume, device: torch.device) -> Box | None:
        """The box of the organ in the oriented scan, as `Preprocessing.apply` takes it.

        None if less than `LEAST_ML` of the organ are found.
        """
        image, placement = on_model_grid(self.preprocessing, volume, device)
        self.network.to(device)
        with torch.no_grad():
            organ = self.network.logits(image.to(device)[None]).softmax(1)[0, 1] > 0.5
        return box_of(organ.cpu(), placement, self.margin_mm)


def box_of(organ: Tensor, placement: Placement, margin_mm: float) -> Box | None:
    """The box around the largest connected part of ``organ`` (*S), bool, with a margin.

    Args:
        organ: the marked voxels of the coarse grid.
        placement: how the coarse grid lies in the scan.
        margin_mm: the margin, in addition to the marked voxels' own extent.

    Returns:
        The box in voxels of the oriented scan, not beyond its border; None if the part is smaller than `LEAST_ML`.
    """
    from scipy import ndimage  # imported here: few models have a finder

    parts, _ = ndimage.label(organ.numpy())
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0  # what is not marked
    if sizes.max() * abs(np.linalg.det(placement.affine[:3, :3])) / 1000 < LEAST_ML:
        return None
    extent = ndimage.find_objects(parts)[sizes.argmax() - 1]
    margins = [margin_mm / side for side in placement.spacing]
    ends = [(side.start - 0.5 - m, side.stop - 0.5 + m) for side, m in zip(extent, margins, strict=True)]
    corners = np.array([[*corner, 1] for corner in np.stack(np.meshgrid(*ends), -1).reshape(-1, 3)])
    in_scan = corners @ (np.linalg.inv(placement.box_affine) @ placement.affine).T[:, :3]
    first, last = np.floor(in_scan.min(0) + 0.5).astype(int), np.ceil(in_scan.max(0) + 0.5).astype(int)
    return tuple(
        (max(0, int(low)), min(stop, int(high)))
        for (_, stop), low, high in zip(placement.box, first, last, strict=True)
    )
