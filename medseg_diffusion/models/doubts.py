"""What a trained model says of scans and masks that are unlike those of its training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from medseg_diffusion.errors import ModelError
from medseg_diffusion.methods.seen import SEEN, MeasuredMask, MeasuredScan, Seen, contrast, measured_scan, sentence
from medseg_diffusion.volumes.paths import is_image
from medseg_diffusion.volumes.volume import Volume

from .segmentation import Segmentation
from .store import SavedModel


def stored_seen(saved: SavedModel) -> Seen | None:
    """What the training scans of a model measured; None if its card does not tell.

    Raises:
        ModelError: An entry of another version.
    """
    entry = saved.card.get(SEEN)
    if entry is None:
        return None
    try:
        return Seen.from_entry(entry)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{saved.path}: its entry {SEEN!r} is of another version; train the model again") from error


def measured(volume: Volume, image: Tensor, orientation: str | None, dims: int) -> MeasuredScan:
    """Measure a scan, with its ``image`` (C, *S) after the model's preprocessing. An image file has no voxel size."""
    affine = None if is_image(volume.source or "") else volume.affine
    return measured_scan(image, volume.shape, affine, orientation, dims)


def with_doubts(
    segmentation: Segmentation,
    seen: Seen,
    volume: Volume,
    image: Tensor,
    names: Mapping[int, str],
    dims: int,
    orientation: str | None,
    further: Sequence[str] = (),
) -> Segmentation:
    """The segmentation, marked and without intervals if the scan or the mask is unlike those of the training.

    The mask of all classes is compared, also if only some were chosen.

    Args:
        segmentation: The segmentation.
        seen: What the training scans measured.
        volume: The scan.
        image: The scan on the model's grid, (C, *S), preprocessed.
        names: Value -> name of the classes, without background.
        dims: 2 for a model of slices, 3 for one of volumes.
        orientation: The axes of the model's grid, such as "RAS"; None for those of the scan.
        further: Other doubts, which are said first.
    """
    # Of all classes: a choice among them changes neither the doubts nor what they withhold.
    placement, volumes = segmentation.placement, segmentation.all_volumes_ml
    box_ml = math.prod(stop - start for start, stop in placement.box) * volume.voxel_mm3 / 1000
    mask = MeasuredMask(
        {} if is_image(volume.source or "") else volumes,
        {name: volume_ml / box_ml for name, volume_ml in volumes.items()},
        contrast(segmentation.members[0].cpu(), image[0].cpu(), names) if seen.contrast else {},
    )
    of_scan = seen.doubts_of_scan(measured(volume, image, orientation, dims))
    doubts = [*further, *of_scan, *seen.doubts_of_mask(mask)]
    if not doubts:
        return segmentation
    withheld = "no interval is given" if segmentation.intervals_ml else ""
    return replace(
        segmentation, quality="check", intervals_ml={}, level=None, unlike_training=sentence(doubts, withheld)
    )
