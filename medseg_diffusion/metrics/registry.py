"""The metrics of one class in one case: names, units, definitions, and what they are where a mask is empty.

Files, tables and pages loop over `METRICS`. `case_metrics` computes them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

COMPUTED: Literal["computed"] = "computed"
"""Stands for the value of a metric that is computed for an empty mask as for any other."""

EmptyValue = float | Literal["computed"]


@dataclass(frozen=True)
class Metric:
    """One number for each class of each case.

    Attributes:
        name: Column of `cases.csv`, and key in Python.
        key: Key in `summary.json`. Dice and IoU have those of nnU-Net.
        title: Heading in tables for people, without the unit.
        unit: "mm", "ml", "%", or empty for a share in [0, 1] or a count.
        digits: Decimals in tables for people.
        better: Which values are good. A volume of its own is neither.
        definition: What it is, in one sentence.
        both_empty: Value where prediction and reference are empty; NaN is left out of means, and counted.
        prediction_empty: Value where only the prediction is empty.
        reference_empty: Value where only the reference is empty.
        compared: Whether sets of predictions are compared by it. The other metrics repeat these, and every further one
            would weaken the tests of all, because the correction is over all comparisons.
    """

    name: str
    key: str
    title: str
    unit: str
    digits: int
    better: Literal["higher", "lower", "near 0", "neither"]
    definition: str
    both_empty: EmptyValue
    prediction_empty: EmptyValue
    reference_empty: EmptyValue
    compared: bool = False

    @property
    def heading(self) -> str:
        """Title with the unit: "HD95 mm"."""
        return f"{self.title} {self.unit}".rstrip()

    @property
    def policy(self) -> dict[str, EmptyValue]:
        """The rule for empty masks, for programs."""
        return {
            "both_empty": self.both_empty,
            "prediction_empty": self.prediction_empty,
            "reference_empty": self.reference_empty,
        }

    def value_if_empty(self, *, prediction: bool, reference: bool) -> EmptyValue:
        """The value by the rule, where ``prediction`` or ``reference`` or both are empty; else `COMPUTED`."""
        if prediction and reference:
            return self.both_empty
        return self.prediction_empty if prediction else self.reference_empty if reference else COMPUTED


_NONE = math.nan

METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "dice", "Dice", "Dice", "", 3, "higher", "2 TP / (2 TP + FP + FN), in voxels.",
            _NONE, 0.0, 0.0, compared=True,
        ),
        Metric("iou", "IoU", "IoU", "", 3, "higher", "TP / (TP + FP + FN), in voxels.", _NONE, 0.0, 0.0),
        Metric(
            "precision", "precision", "Precision", "", 3, "higher",
            "Share of the predicted voxels that are in the reference.", _NONE, _NONE, 0.0,
        ),
        Metric(
            "recall", "recall", "Recall", "", 3, "higher",
            "Share of the reference's voxels that are predicted.", _NONE, 0.0, _NONE,
        ),
        Metric(
            "hd95_mm", "HD95_mm", "HD95", "mm", 2, "lower",
            "95th percentile of the distances from the surface of one mask to that of the other; the larger of the two "
            "directions.", _NONE, _NONE, _NONE, compared=True,
        ),
        Metric(
            "assd_mm", "ASSD_mm", "ASSD", "mm", 2, "lower",
            "Mean of the distances from all surface voxels of both masks to the surface of the other mask.",
            _NONE, _NONE, _NONE,
        ),
        Metric(
            "nsd", "NSD", "NSD", "", 3, "higher",
            "Normalised surface distance: share of the surface voxels of both masks that lie within the tolerance of "
            "the other surface.", _NONE, 0.0, 0.0, compared=True,
        ),
        Metric(
            "volume_ml", "volume_ml", "Volume", "ml", 2, "neither", "Volume of the prediction.",
            COMPUTED, COMPUTED, COMPUTED,
        ),
        Metric(
            "reference_volume_ml", "reference_volume_ml", "Reference volume", "ml", 2, "neither",
            "Volume of the reference.", COMPUTED, COMPUTED, COMPUTED,
        ),
        Metric(
            "volume_error_ml", "volume_error_ml", "Volume error", "ml", 2, "near 0",
            "Volume of the prediction minus that of the reference; its mean is the bias.",
            COMPUTED, COMPUTED, COMPUTED,
        ),
        Metric(
            "absolute_volume_error_ml", "absolute_volume_error_ml", "Absolute volume error", "ml", 2, "lower",
            "The volume error without its sign.", COMPUTED, COMPUTED, COMPUTED, compared=True,
        ),
        Metric(
            "volume_error_percent", "volume_error_percent", "Volume error", "%", 1, "near 0",
            "The volume error in percent of the reference's volume.", _NONE, -100.0, _NONE,
        ),
        Metric(
            "reference_lesions", "reference_lesions", "Reference lesions", "", 1, "neither",
            "Connected components of the reference; voxels that touch at a corner are connected.", 0.0, COMPUTED, 0.0,
        ),
        Metric(
            "predicted_lesions", "predicted_lesions", "Predicted lesions", "", 1, "neither",
            "Connected components of the prediction.", 0.0, 0.0, COMPUTED,
        ),
        Metric(
            "lesion_precision", "lesion_precision", "Lesion precision", "", 3, "higher",
            "Share of the predicted components that have a voxel of the reference.", _NONE, _NONE, 0.0,
        ),
        Metric(
            "lesion_recall", "lesion_recall", "Lesion recall", "", 3, "higher",
            "Share of the lesions that are detected: enough of their voxels are predicted.", _NONE, 0.0, _NONE,
        ),
        Metric(
            "lesion_f1", "lesion_F1", "Lesion F1", "", 3, "higher",
            "Harmonic mean of lesion precision and lesion recall.", _NONE, 0.0, 0.0, compared=True,
        ),
        Metric(
            "pq", "PQ", "PQ", "", 3, "higher",
            "Panoptic quality, SQ times RQ. A component of the prediction and one of the reference match if their IoU "
            "is above 0.5 (Kirillov et al., CVPR 2019).", _NONE, 0.0, 0.0,
        ),
        Metric(
            "sq", "SQ", "SQ", "", 3, "higher",
            "Segmentation quality: mean IoU of the matching components; it does not exist without a match.",
            _NONE, _NONE, _NONE,
        ),
        Metric(
            "rq", "RQ", "RQ", "", 3, "higher",
            "Recognition quality: F1 of the matching components.", _NONE, 0.0, 0.0,
        ),
        Metric(
            "cldice", "clDice", "clDice", "", 3, "higher",
            "Harmonic mean of the share of the predicted centreline inside the reference and the share of the "
            "reference's centreline inside the prediction (Shit et al., CVPR 2021).", _NONE, 0.0, 0.0,
        ),
    )
}  # fmt: skip
"""Name -> metric, in the order of columns. clDice is computed only where asked for."""

OPTIONAL = ("cldice",)
"""Metrics that are computed only where asked for."""


def measured(*, cldice: bool) -> tuple[Metric, ...]:
    """The metrics of an evaluation, in the order of columns."""
    return tuple(metric for metric in METRICS.values() if cldice or metric.name not in OPTIONAL)
