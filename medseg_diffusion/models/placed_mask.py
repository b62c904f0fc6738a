"""Label maps on the grid of a generator that is conditioned by masks, and its images on the grids of the label maps."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from medseg_diffusion import build
from medseg_diffusion.data.healthy import require_usable
from medseg_diffusion.data.labelled_images import oriented_for
from medseg_diffusion.data.mask_examples import CaseFormat, checked_labels, require_slices
from medseg_diffusion.errors import InputError
from medseg_diffusion.volumes.fitting import from_generator_grid, labels_to_generator_grid
from medseg_diffusion.volumes.preprocessing import Placement, apply_labels
from medseg_diffusion.volumes.volume import Volume

from .generator import Generator


@dataclass(frozen=True, eq=False)
class PlacedMask:
    """A label map of which images can be drawn.

    Attributes:
        volume: The label map (1, I, J, K) on its own grid, merged if the model's training merged labels.
        labels: The same on the model's grid: the slices (K, H, W) of a model of slices, or one volume (1, *S).
        placement: How the model's grid lies in the label map.
    """

    volume: Volume
    labels: Tensor
    placement: Placement

    def restored(self, images: Tensor) -> Tensor:
        """Images on the label map's own grid.

        Args:
            images: (n, *S, C) uint8, one for each of ``labels``.

        Returns:
            (C, I, J, K) float32 levels 0 to 255.
        """
        levels, shape = images.movedim(-1, 1).float(), self.placement.shape
        if levels.ndim == 4:
            data = from_generator_grid(levels, shape[:2]).movedim(0, -1)
        else:
            data = from_generator_grid(levels, shape)[0]
        return self.placement.restore(data).clamp(0, 255)


def place_mask(volume: Volume, generator: Generator) -> PlacedMask:
    """Bring a label map to the grid of a generator, as its training brought the masks of images.

    A model of slices takes the slices of a volume one by one.

    Args:
        volume: (1, I, J, K) whole numbers.
        generator: A generator that is conditioned by masks.

    Raises:
        InputError: Labels that the model does not have, a label map that is larger than the model's volumes or much
            smaller, a single slice for a model of volumes, or slices that the model does not see as such.
    """
    config = generator.config
    size = config.data.shape
    labels = checked_labels(volume, volume.source, CaseFormat(1, len(generator.mask_classes), config.data.merge_labels))
    if len(size) == 2:
        require_slices(labels, config.preprocessing.orientation)
    elif 1 in labels.shape:
        found = f"a 2D mask ({' x '.join(str(n) for n in labels.shape if n > 1)})"
        raise InputError(volume.source, found, "volumes for a model of volumes", "use a model of slices")
    # The scaling of intensities, which a mask has not, changes no grid.
    preprocessing = replace(build.image_preprocessing(config.preprocessing, size), intensity="percentile")
    _, placement = oriented_for(preprocessing, volume.source).apply(labels.like(labels.data.float()))
    require_usable(labels, placement.shape, size, None)
    model = apply_labels(labels, placement)[0]
    slices = model.movedim(-1, 0) if len(size) == 2 else model[None]
    return PlacedMask(labels, labels_to_generator_grid(slices, size).to(torch.int64), placement)
