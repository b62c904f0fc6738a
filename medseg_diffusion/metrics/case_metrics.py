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
"""Usual tolerance of the normalised surface distance."""


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
        tolerance_mm: Tolerance of the normalised surface distance of classes without one of their own.
        tolerances_mm: Label -> tolerance of its own.
        lesion_overlap: Share of a lesion's voxels that must be predicted for it to be detected.
        cldice: Compute clDice, too.
    """

    tolerance_mm: float = TOLERANCE_MM
    tolerances_mm: Mapping[int, float] = field(default_factory=dict)
    lesion_overlap: float = MIN_OVERLAP
    cldice: bool = False

    def tolerance_of(self, label: int) -> float:
        """Tolerance of the normalised surface distance of a class, in mm."""
        return self.tolerances_mm.get(label, self.tolerance_mm)


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
    voxel_mm3: float | None = None,
) -> dict[int, ClassResult]:
    """Compare two label maps (*S), 2D or 3D, class by class.

    Args:
        prediction: Predicted labels, 0 or above.
        reference: Reference labels on the same grid.
        labels: The classes.
        spacing: Voxel size in mm along each axis.
        options: The other options.
        voxel_mm3: Volume of a voxel; None for the product of ``spacing``, which is too much for a sheared voxel.

    Returns:
        Label -> result, for every label. A metric of an empty mask is what its rule in `registry` says.

    Raises:
        ValueError: Label maps of different shapes.
    """
    if prediction.shape != reference.shape:
        raise ValueError(f"prediction {prediction.shape} and reference {reference.shape} are not of one grid")
    # Imported where used: reports load the types of this module alone.
    from scipy import ndimage

    from .surface import without_single_axes

    voxel_ml = (math.prod(spacing) if voxel_mm3 is None else voxel_mm3) / 1000
    prediction, reference, spacing = without_single_axes(prediction, reference, spacing)
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
        results[label] = _measure_class(
            _Cropped(masks[0], masks[1], spacing, voxel_ml, prediction.size), options, options.tolerance_of(label)
        )
    return results


def absent(n_voxels: int, options: MeasureOptions = MeasureOptions()) -> ClassResult:
    """The result of a class that occurs in neither mask of a case of ``n_voxels`` voxels."""
    empty = np.zeros((0, 0, 0), bool)
    return _measure_class(_Cropped(empty, empty, (1.0, 1.0, 1.0), 0.001, n_voxels), options, options.tolerance_mm)


@dataclass(frozen=True, eq=False)
class _Cropped:
    """The masks of a class in the box around both, without axes of one voxel; and what belongs to the whole grid."""

    prediction: NDArray[np.bool_]
    reference: NDArray[np.bool_]
    spacing: Sequence[float]
    voxel_ml: float
    n_voxels: int


def _measure_class(masks: _Cropped, options: MeasureOptions, tolerance_mm: float) -> ClassResult:
    prediction, reference, spacing = masks.prediction, masks.reference, masks.spacing
    overlap = ClassOverlap.from_counts(
        tp=int(np.count_nonzero(prediction & reference)),
        n_pred=int(np.count_nonzero(prediction)),
        n_ref=int(np.count_nonzero(reference)),
        n_voxels=masks.n_voxels,
    )
    lesions = Lesions.of(prediction, reference, spacing, options.lesion_overlap)
    values = {**_volumes(overlap, masks.voxel_ml), **_lesion_values(lesions)}
    empty = {"prediction": overlap.n_pred == 0, "reference": overlap.n_ref == 0}
    if not any(empty.values()):
        from .surface import surface_distances

        surfaces = surface_distances(prediction, reference, spacing)
        values |= {
            "dice": overlap.dice,
            "iou": overlap.iou,
            "precision": overlap.tp / overlap.n_pred,
            "recall": overlap.tp / overlap.n_ref,
            "hd95_mm": surfaces.hd95,
            "assd_mm": surfaces.assd,
            "nsd": surfaces.nsd(tolerance_mm),
        }
        if options.cldice:
            values["cldice"] = centreline_dice(prediction, reference)
    metrics = {}
    for metric in measured(cldice=options.cldice):
        value = metric.value_if_empty(**empty)
        metrics[metric.name] = values[metric.name] if value == COMPUTED else float(value)
    return ClassResult(overlap, metrics)


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
        "reference_lesions": float(lesions.n),
        "predicted_lesions": float(lesions.n_predicted),
        "lesion_precision": lesions.precision,
        "lesion_recall": lesions.sensitivity,
        "lesion_f1": lesions.f1,
        "pq": lesions.panoptic_quality,
        "sq": lesions.segmentation_quality,
        "rq": lesions.recognition_quality,
    }


def centreline_dice(prediction: NDArray[np.bool_], reference: NDArray[np.bool_]) -> float:
    """ClDice of two masks (*S), 2D or 3D, neither of them empty (Shit et al., CVPR 2021)."""
    lines = [centreline(mask) for mask in (prediction, reference)]
    inside = [line[mask].sum() for line, mask in zip(lines, (reference, prediction), strict=True)]
    precision, recall = (int(part) / int(line.sum()) for part, line in zip(inside, lines, strict=True))
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def centreline(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The skeleton of a mask (*S) by thinning (scikit-image; Lee et al. 1994 in 3D).

    Thinning in 3D deletes some components as a whole, such as tubes of exactly two voxels width. They are their own
    centreline here, so that every component has one. So is a mask of one axis.
    """
    from scipy import ndimage
    from skimage.morphology import skeletonize

    if mask.ndim == 1:
        return mask
    line: NDArray[np.bool_] = skeletonize(mask)
    components, count = ndimage.label(mask, np.ones((3,) * mask.ndim, bool))
    has_line = np.bincount(components[line], minlength=count + 1) > 0
    has_line[0] = True
    return line | ~has_line[components]
