"""All metrics of the classes of one case. Every class is cropped to the box around both of its masks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .detection import MIN_OVERLAP, Lesions, ratio
from .overlap import ClassOverlap
from .registry import COMPUTED, measured

TOLERANCE_MM = 1.0
"""Tolerance of the normalised surface distance of a class without one of its own."""


@dataclass(frozen=True)
class ClassResult:
    """One class in one case.

    Attributes:
        overlap: Counts of voxels.
        metrics: Name of a metric of `registry.METRICS` -> value; NaN where it does not exist.
    """

    overlap: ClassOverlap
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class MeasureOptions:
    """How the classes of a case are compared.

    Attributes:
        tolerances_mm: Label -> tolerance of the normalised surface distance; `TOLERANCE_MM` where it is missing.
        lesion_overlap: Share of a lesion's voxels that must be predicted for it to be detected.
        cldice: Compute clDice, too.
    """

    tolerances_mm: Mapping[int, float] = field(default_factory=dict)
    lesion_overlap: float = MIN_OVERLAP
    cldice: bool = False


def labels_of(labels: NDArray[np.integer]) -> list[int]:
    """The values above 0 of a label map of values from 0 on, ascending."""
    from scipy import ndimage

    return [value for value, box in enumerate(ndimage.find_objects(labels), start=1) if box is not None]


def measure(
    prediction: NDArray[np.integer],
    reference: NDArray[np.integer],
    labels: Iterable[int],
    spacing: Sequence[float],
    options: MeasureOptions = MeasureOptions(),
) -> dict[int, ClassResult]:
    """Compare two label maps (*S), 2D or 3D, class by class.

    Args:
        prediction: Predicted labels, 0 or above.
        reference: Reference labels on the same grid.
        labels: The classes.
        spacing: Voxel size in mm along each axis.
        options: The other options.

    Returns:
        Label -> result, for every label. A metric of an empty mask is what its rule in `registry` says.

    Raises:
        ValueError: Label maps of different shapes.
    """
    if prediction.shape != reference.shape:
        raise ValueError(f"prediction {prediction.shape} and reference {reference.shape} are not of one grid")
    # Imported where used: reports load the types of this module alone.
    from scipy import ndimage

    boxes = [ndimage.find_objects(array) for array in (prediction, reference)]
    results = {}
    for label in labels:
        own = [places[label - 1] for places in boxes if label <= len(places) and places[label - 1] is not None]
        box = tuple(
            slice(min(part.start for part in parts), max(part.stop for part in parts))
            for parts in zip(*own, strict=True)
        )
        # Without a voxel of the class, the box is that of nothing.
        masks = [array[box] == label if own else np.zeros((0,) * array.ndim, bool) for array in (prediction, reference)]
        results[label] = _measure_class(masks[0], masks[1], prediction.size, spacing, label, options)
    return results


def _measure_class(
    prediction: NDArray[np.bool_],
    reference: NDArray[np.bool_],
    n_voxels: int,
    spacing: Sequence[float],
    label: int,
    options: MeasureOptions,
) -> ClassResult:
    """The result of one class from its cropped masks; ``n_voxels`` is the size of the whole grid."""
    overlap = ClassOverlap.from_counts(
        tp=int(np.count_nonzero(prediction & reference)),
        n_pred=int(np.count_nonzero(prediction)),
        n_ref=int(np.count_nonzero(reference)),
        n_voxels=n_voxels,
    )
    lesions = Lesions.of(prediction, reference, spacing, options.lesion_overlap)
    values = {**_volumes(overlap, math.prod(spacing) / 1000), **_lesion_values(lesions)}
    empty = {"prediction": overlap.n_pred == 0, "reference": overlap.n_ref == 0}
    if not any(empty.values()):
        from .surface import surface_distances

        surfaces = surface_distances(prediction, reference, spacing)
        tolerance = options.tolerances_mm.get(label, TOLERANCE_MM)
        values |= {
            "dice": overlap.dice,
            "iou": overlap.iou,
            "precision": overlap.tp / overlap.n_pred,
            "recall": overlap.tp / overlap.n_ref,
            "hd95_mm": surfaces.hd95,
            "assd_mm": surfaces.assd,
            "nsd": surfaces.nsd(tolerance),
        }
        if options.cldice:
            values["cldice"] = centreline_dice(prediction, reference)
    metrics = {}
    for metric in measured(cldice=options.cldice):
        value = metric.value_if_empty(**empty)
        metrics[metric.name] = values[metric.name] if value == COMPUTED else float(value)
    return ClassResult(overlap, metrics)


def absent(n_voxels: int, options: MeasureOptions = MeasureOptions()) -> ClassResult:
    """The result of a class that occurs in neither mask of a case of ``n_voxels`` voxels."""
    empty = np.zeros((0, 0, 0), bool)
    return _measure_class(empty, empty, n_voxels, (1.0, 1.0, 1.0), 0, options)


def _volumes(overlap: ClassOverlap, voxel_ml: float) -> dict[str, float]:
    error = (overlap.n_pred - overlap.n_ref) * voxel_ml
    return {
        "volume_ml": overlap.n_pred * voxel_ml,
        "reference_volume_ml": overlap.n_ref * voxel_ml,
        "volume_error_ml": error,
        "absolute_volume_error_ml": abs(error),
        "volume_error_percent": 100 * ratio(overlap.n_pred - overlap.n_ref, overlap.n_ref),
    }


def _lesion_values(lesions: Lesions) -> dict[str, float]:
    return {
        "n_lesions": float(lesions.n),
        "n_predicted_lesions": float(lesions.n_predicted),
        "lesion_precision": lesions.precision,
        "lesion_recall": lesions.sensitivity,
        "lesion_f1": lesions.f1,
        "pq": lesions.panoptic_quality,
        "sq": lesions.segmentation_quality,
        "rq": lesions.recognition_quality,
    }


def centreline_dice(prediction: NDArray[np.bool_], reference: NDArray[np.bool_]) -> float:
    """ClDice of two masks (*S), neither of them empty (Shit et al., CVPR 2021).

    The centrelines are skeletons by thinning (Lee et al. 1994 in 3D).
    """
    from skimage.morphology import skeletonize

    wide = [axis for axis, size in enumerate(prediction.shape) if size > 1] or [0]
    masks = [mask.reshape([mask.shape[axis] for axis in wide]) for mask in (prediction, reference)]
    lines = [skeletonize(mask) if mask.ndim > 1 else mask for mask in masks]
    inside = [line[mask].sum() for line, mask in ((lines[0], masks[1]), (lines[1], masks[0]))]
    precision, recall = (ratio(int(part), int(line.sum())) for part, line in zip(inside, lines, strict=True))
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0
