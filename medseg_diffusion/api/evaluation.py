"""Metrics of two label maps in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from medseg_diffusion.errors import UsageError
from medseg_diffusion.metrics.case_metrics import TOLERANCE_MM, MeasureOptions, labels_of, measure
from medseg_diffusion.volumes.volume import Volume

from .scans import Image, has_geometry, read_mask


@dataclass(frozen=True)
class ClassMetrics:
    """One class of a prediction compared with its reference. Shares are in [0, 1]; NaN is a metric that does not exist.

    Attributes:
        name: Name of the class.
        dice: 2 TP / (2 TP + FP + FN), in voxels; NaN where both masks are empty.
        iou: TP / (TP + FP + FN), in voxels; NaN where both masks are empty.
        precision: Share of the predicted voxels that are in the reference.
        recall: Share of the reference's voxels that are predicted.
        hd95_mm: 95th percentile of the distances between the surfaces, the larger of the two directions.
        assd_mm: Mean distance between the surfaces.
        nsd: Share of both surfaces that lies within the tolerance of the other one.
        volume_ml: Volume of the prediction.
        reference_volume_ml: Volume of the reference.
        volume_error_ml: Volume of the prediction minus that of the reference.
        absolute_volume_error_ml: The volume error without its sign.
        volume_error_percent: The volume error in percent of the reference's volume.
        reference_lesions: Number of connected components of the reference.
        predicted_lesions: Number of connected components of the prediction.
        lesion_precision: Share of the predicted components that have a voxel of the reference.
        lesion_recall: Share of the lesions that are detected.
        lesion_f1: Harmonic mean of lesion precision and lesion recall.
        pq: Panoptic quality, SQ times RQ.
        sq: Segmentation quality: mean IoU of the matching components.
        rq: Recognition quality: F1 of the matching components.
    """

    name: str
    dice: float
    iou: float
    precision: float
    recall: float
    hd95_mm: float
    assd_mm: float
    nsd: float
    volume_ml: float
    reference_volume_ml: float
    volume_error_ml: float
    absolute_volume_error_ml: float
    volume_error_percent: float
    reference_lesions: float
    predicted_lesions: float
    lesion_precision: float
    lesion_recall: float
    lesion_f1: float
    pq: float
    sq: float
    rq: float


def evaluate_arrays(
    prediction: Image,
    reference: Image,
    spacing_mm: Sequence[float] | None = None,
    labels: Mapping[int, str] | Sequence[int] | None = None,
    *,
    tolerance_mm: float = TOLERANCE_MM,
) -> dict[int, ClassMetrics]:
    """Compare a label map with its reference, class by class, without writing anything.

    `evaluate` compares files, many of them, and writes a report with intervals and the worst cases.

    Args:
        prediction: Label map of whole numbers from 0 to 65535: an array (I, J, K) or (I, J), a file, an image of
            nibabel or a `Volume`.
        reference: The reference on the same grid.
        spacing_mm: Voxel size along each axis, of arrays; None for files, images and volumes, which have their own.
        labels: Label -> name of the class, or the labels to compare; None for all that occur. The background, 0, is
            left out.
        tolerance_mm: Tolerance of the normalised surface distance, above 0.

    Returns:
        Label -> metrics, of every label.

    Raises:
        InputError: An unusable label map, an array without a voxel size, or two grids.
        UsageError: A voxel size beside an image that has its own, a label below 0, or a tolerance out of range.
    """
    if not 0 < tolerance_mm < float("inf"):
        raise UsageError(f"a tolerance of {tolerance_mm:g} mm; expected a number above 0")
    predicted, true = _on_one_grid(prediction, reference, spacing_mm)
    ours, theirs = predicted.data[0].numpy(), true.data[0].numpy()
    names = _names(labels, sorted({*labels_of(ours), *labels_of(theirs)}))
    options = MeasureOptions(tolerance_mm=tolerance_mm)
    results = measure(ours, theirs, names, true.spacing, options, true.voxel_mm3)
    return {label: ClassMetrics(names[label], **result.metrics) for label, result in results.items()}


def _on_one_grid(prediction: Image, reference: Image, spacing_mm: Sequence[float] | None) -> tuple[Volume, Volume]:
    """Both label maps; an array beside an image is on the image's grid."""
    own = [read_mask(mask, spacing_mm) if has_geometry(mask) else None for mask in (prediction, reference)]
    affine = next((volume.affine for volume in own if volume is not None), None)
    predicted, true = (
        read_mask(mask, spacing_mm, affine) if volume is None else volume
        for mask, volume in zip((prediction, reference), own, strict=True)
    )
    true = true.covering(predicted)
    return true.aligned(predicted), true


def _names(labels: Mapping[int, str] | Sequence[int] | None, present: Sequence[int]) -> dict[int, str]:
    if isinstance(labels, Mapping):
        names = {int(label): name for label, name in labels.items()}
    else:
        names = {int(label): f"label {label}" for label in (present if labels is None else labels)}
    if wrong := [label for label in names if label < 0]:
        raise UsageError(f"label {wrong[0]}: labels are 0, the background, or above")
    return {label: name for label, name in names.items() if label}
