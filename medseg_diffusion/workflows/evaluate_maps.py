"""Score maps against reference masks: what `medseg evaluate --scores` adds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medseg_diffusion.errors import InputError
from medseg_diffusion.metrics.detection import Curve, Lesions, ScoredVoxels
from medseg_diffusion.metrics.overlap import ClassOverlap, label_overlap
from medseg_diffusion.metrics.detection_summary import CaseDetection, Detection, summarise_detection
from medseg_diffusion.volumes.io import is_image, read_labels, scan_name
from medseg_diffusion.volumes.scores import read_scores
from medseg_diffusion.volumes.volume import Volume

MAP_ENDINGS = ("_anomaly", "_scores", "")
"""Endings of the names of score maps; the first that is there is taken."""


def evaluate_scores(
    maps: Mapping[str, Path],
    foregrounds: Mapping[str, Path] | None,
    masks: Callable[[str], tuple[Volume, Volume]],
    labels: Collection[int],
    overlaps: Mapping[str, ClassOverlap],
    *,
    min_overlap: float,
    seed: int = 0,
) -> tuple[Detection, list[str]]:
    """Measure every score map, one after another.

    Numbers over all voxels are exact, too: the scores of the voxels that count stay in memory, and are sorted once more
    all together. 100 million take 1 GB, or 2.5 GB where half of them are lesion (measured).

    Args:
        maps: case name -> score map.
        foregrounds: case name -> mask of the voxels that count; None: all with a score.
        masks: gives prediction and reference of a case.
        labels: what counts as lesion, in both.
        overlaps: case name -> overlap of the masks, for the cases where it is known already.
        min_overlap: share of a lesion's voxels that must be predicted for it to be detected.
        seed: seed of the bootstrap.

    Returns:
        The numbers, and what the reader should know, one sentence each.

    Raises:
        InputError: a map or mask that cannot be read, is on another grid or leaves no voxel that counts.
    """
    measured, undefined, sizeless = {}, False, False
    for name, path in maps.items():
        prediction, reference = masks(name)
        scores = read_scores(path)
        reference.require_same_grid(scores)
        values = scores.data[0].numpy()
        counted = ~np.isnan(values)
        undefined |= not counted.all()
        if foregrounds is not None:
            counted &= _foreground(foregrounds[name], reference)
            if not counted.any():
                raise InputError(
                    foregrounds[name], f"no voxel with a score in {path}", "the voxels that count", "check both"
                )
        sizeless |= is_image(reference.source or "")
        predicted, lesion = (np.isin(volume.data[0].numpy(), list(labels)) for volume in (prediction, reference))
        measured[name] = _measure(
            predicted,
            lesion,
            values,
            counted,
            overlaps[name] if name in overlaps else label_overlap(predicted, lesion, [1])[1],
            Lesions.of(predicted, lesion, reference.spacing, min_overlap),
            voxel_ml=math.prod(reference.spacing) / 1000,
            scan_score=_scan_score(path),
        )
    inside = "all of the score maps" if foregrounds is None else "those inside the foreground masks"
    detection = summarise_detection(
        measured,
        region=inside + (" but where the score is NaN" if undefined else ""),
        min_overlap=min_overlap,
        seed=seed,
    )
    remarks = ["Score maps are compared with all evaluated labels together."] if len(labels) > 1 else []
    return detection, remarks + _remarks(detection, sizeless)


def _foreground(path: Path, reference: Volume) -> NDArray[np.bool_]:
    mask = read_labels(path)
    reference.require_same_grid(mask)
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
    """The score of the whole scan from `NAME_anomaly.json` beside a map, if it is there; else NaN."""
    name = scan_name(path)
    stem = next(name.removesuffix(ending) for ending in MAP_ENDINGS if name.endswith(ending))
    file = path.with_name(f"{stem}_anomaly.json")
    if not file.is_file():
        return math.nan
    expected, remedy = 'a JSON object whose "score" is a number', "write it again, or take it away"
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


def _remarks(detection: Detection, sizeless: bool) -> list[str]:
    cases = detection.cases.values()
    remarks = []
    if not any(case.has_lesion for case in cases):
        remarks.append("No reference holds a lesion: AUROC, AUPRC, best Dice and lesion detection do not exist.")
    if outside := [case for case in cases if case.n_positive < case.overlap.n_ref]:
        count = sum(case.overlap.n_ref - case.n_positive for case in outside)
        remarks.append(
            f"Lesion voxels that do not count for AUROC and AUPRC, and that no threshold finds: {count} in "
            f"{len(outside)} {'case' if len(outside) == 1 else 'cases'}."
        )
    known = sum(detection.n_scan_scores)
    if 0 < known < len(detection.cases):
        remarks.append(f"Scores of whole scans are known for {known} of {len(detection.cases)} cases only.")
    if sizeless:
        remarks.append("Images without a voxel size: sizes in ml take each pixel for 1 mm x 1 mm x 1 mm.")
    return remarks
