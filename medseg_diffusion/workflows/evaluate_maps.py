"""Score maps compared with reference masks, for `medseg evaluate --scores`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medseg_diffusion.errors import InputError
from medseg_diffusion.metrics.detection import Curve, Lesions, ScoredVoxels
from medseg_diffusion.metrics.detection_summary import CaseDetection, Detection, summarise_detection
from medseg_diffusion.metrics.overlap import ClassOverlap, label_overlap
from medseg_diffusion.volumes.io import read_labels
from medseg_diffusion.volumes.outputs import ANOMALY, SEGMENTATION
from medseg_diffusion.volumes.paths import scan_name
from medseg_diffusion.volumes.scores import read_scores
from medseg_diffusion.volumes.volume import Volume

MAP_ENDINGS = (scan_name(ANOMALY["map"]), "_scores", "")
"""Endings of the names of score maps; the first that exists is used."""
FOREGROUND_ENDINGS = (scan_name(SEGMENTATION["segmentation"]), "")
"""The same for foreground masks given by the user."""


def evaluate_scores(
    maps: Mapping[str, Path],
    foregrounds: Mapping[str, Path] | None,
    masks: Callable[[str], tuple[Volume, Volume]],
    labels: Collection[int],
    overlaps: Mapping[str, ClassOverlap],
    *,
    min_overlap: float,
    patients: Mapping[str, str] | None = None,
    seed: int = 0,
) -> tuple[Detection, list[str]]:
    """Compare the score map of every case with its masks.

    The numbers over the voxels of all cases are exact. For them the scores of all voxels that count stay in memory and
    are sorted again as a whole: 100 million voxels take 1 GB, or 2.5 GB if half of them are lesions (measured).

    Args:
        maps: case name -> score map.
        foregrounds: case name -> mask of the voxels that count; None counts all voxels with a score.
        masks: returns prediction and reference of a case.
        labels: labels of lesions, in prediction and reference.
        overlaps: case name -> overlap of the masks, for cases where it is already computed.
        min_overlap: share of a lesion's voxels that must be predicted for it to be detected.
        patients: case name -> patient; None takes every case as a patient of its own.
        seed: seed of the bootstrap.

    Returns:
        The numbers, and facts that the reader should know, one sentence each.

    Raises:
        InputError: a map or mask that cannot be read, is on another grid or leaves no voxel that counts.
    """
    measured, has_nan = {}, False
    for name, path in maps.items():
        prediction, reference = masks(name)
        scores = read_scores(path)
        reference = reference.covering(scores)
        prediction = reference.aligned(prediction)
        values = reference.aligned(scores).data[0].numpy()
        counted = ~np.isnan(values)
        has_nan |= not counted.all()
        if foregrounds is not None:
            counted &= _foreground(foregrounds[name], reference)
            if not counted.any():
                raise InputError(
                    foregrounds[name], f"no voxel with a score in {path}", "the voxels that count", "check both"
                )
        predicted, lesion = (np.isin(volume.data[0].numpy(), list(labels)) for volume in (prediction, reference))
        measured[name] = _measure(
            predicted,
            lesion,
            values,
            counted,
            overlaps[name] if name in overlaps else label_overlap(predicted, lesion, [1])[1],
            Lesions.of(predicted, lesion, reference.spacing, min_overlap),
            voxel_ml=reference.voxel_mm3 / 1000,
            scan_score=_scan_score(path),
        )
    region = "all of the score maps" if foregrounds is None else "those inside the foreground masks"
    detection = summarise_detection(
        measured,
        region=region + (" except where the score is NaN" if has_nan else ""),
        min_overlap=min_overlap,
        patients=patients,
        seed=seed,
    )
    remarks = ["Score maps are compared with all evaluated labels together."] if len(labels) > 1 else []
    return detection, remarks + _remarks(detection)


def _foreground(path: Path, reference: Volume) -> NDArray[np.bool_]:
    mask = reference.aligned(read_labels(path))
    inside: NDArray[np.bool_] = mask.data[0].numpy() > 0
    return inside


def _measure(
    prediction: NDArray[np.bool_],
    reference: NDArray[np.bool_],
    scores: NDArray[np.float32],
    counted: NDArray[np.bool_],
    overlap: ClassOverlap,
    lesions: Lesions,
    *,
    voxel_ml: float,
    scan_score: float,
) -> tuple[CaseDetection, ScoredVoxels]:
    voxels = ScoredVoxels.of(scores, reference, counted)
    curve = Curve.of(voxels)
    best_dice, best_threshold = curve.best_dice()
    n_counted = curve.n_positive + curve.n_negative
    case = CaseDetection(
        n_counted=n_counted,
        n_left_out=scores.size - n_counted,
        n_positive=curve.n_positive,
        voxel_ml=voxel_ml,
        auroc=curve.auroc,
        auprc=curve.average_precision,
        best_dice=best_dice,
        best_threshold=best_threshold,
        overlap=overlap,
        tp=int(np.count_nonzero(prediction & reference & counted)),
        fp=int(np.count_nonzero(prediction & ~reference & counted)),
        lesions=lesions,
        scan_score=scan_score,
    )
    return case, voxels


def _scan_score(path: Path) -> float:
    """The score of the whole scan in `NAME_anomaly.json` beside a map; NaN if there is no such file or no score."""
    name = scan_name(path)
    stem = next(name.removesuffix(ending) for ending in MAP_ENDINGS if name.endswith(ending))
    file = path.with_name(stem + ANOMALY["scores"])
    if not file.is_file():
        return math.nan
    expected, remedy = 'a JSON object whose "score" is a number', "write it again, or remove it"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(file, f"no readable JSON ({type(error).__name__})", expected, remedy) from error
    if not isinstance(content, dict) or "score" not in content:
        return math.nan
    score = content["score"]
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        raise InputError(file, f"the score {score!r}", expected, remedy)
    return float(score)


def _remarks(detection: Detection) -> list[str]:
    remarks = []
    if not detection.n_with_lesions:
        remarks.append("No reference holds a lesion: AUROC, AUPRC, best Dice and lesion detection do not exist.")
    if outside := [case for case in detection.cases.values() if case.n_positive < case.overlap.n_ref]:
        count = sum(case.overlap.n_ref - case.n_positive for case in outside)
        remarks.append(
            f"Lesion voxels that do not count for AUROC and AUPRC, and that no threshold can detect: {count} in "
            f"{len(outside)} {'case' if len(outside) == 1 else 'cases'}."
        )
    n_scan_scores = sum(detection.n_scan_scores)
    if 0 < n_scan_scores < len(detection.cases):
        remarks.append(f"Only {n_scan_scores} of {len(detection.cases)} cases have a score of the whole scan.")
    return remarks
