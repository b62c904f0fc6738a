"""Which cases of an evaluation the page shows, and their scans, masks and maps for its viewer."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch

from medseg_diffusion.data.pairs import MaskPair
from medseg_diffusion.errors import UsageError
from medseg_diffusion.metrics.evaluation_summary import Evaluation
from medseg_diffusion.reports.evaluation_page import case_flags
from medseg_diffusion.reports.viewer import LayerKind, ViewedCase, viewed_case
from medseg_diffusion.volumes.io import read_map, read_volume
from medseg_diffusion.volumes.scores import read_scores
from medseg_diffusion.volumes.volume import Volume

from .evaluate_cases import aligned_or_none
from .viewed import ViewerCapacity

MAX_FLAGGED = 6
"""Flagged cases in the viewer beside the worst, the median and the best one."""


def require_cases(named: Sequence[str], cases: Collection[str]) -> None:
    """Check names of cases.

    Raises:
        UsageError: A name that no case has.
    """
    for name in named:
        if name not in cases:
            raise UsageError(f"--view {name}: no case of this name; there is, for instance, {min(cases)}")


def chosen_cases(evaluation: Evaluation, named: Sequence[str] = ()) -> dict[str, str]:
    """Case -> why the page shows it: those that were named, the worst, flagged, median and best.

    Args:
        evaluation: The numbers.
        named: Names of cases that are shown in any case; see `require_cases`.
    """
    ranked = [case for case in evaluation.worst_first() if not math.isnan(case.mean_dice)]
    flagged = [case.name for case in evaluation.worst_first() if case_flags(case, evaluation)]
    chosen = dict.fromkeys(named, "named")
    if len(ranked) == 1:
        chosen.setdefault(ranked[0].name, "the case")
    elif ranked:
        chosen.setdefault(ranked[0].name, "worst case")
        for name in flagged[:MAX_FLAGGED]:
            chosen.setdefault(name, "flagged")
        if len(ranked) > 2:
            chosen.setdefault(ranked[(len(ranked) - 1) // 2].name, "median case")
        chosen.setdefault(ranked[-1].name, "best case")
    return chosen


def viewed_cases(
    evaluation: Evaluation,
    pairs: Sequence[MaskPair],
    images: Mapping[str, Path],
    maps: Mapping[str, Path] | None,
    named: Sequence[str] = (),
) -> list[ViewedCase]:
    """The chosen cases with their scans, where there are some, references, predictions and maps.

    They are all in memory: after the named ones there are only as many as fit (`ViewerCapacity`).

    Args:
        evaluation: The numbers.
        pairs: The masks of all cases.
        images: Case -> its scan.
        maps: Case -> its score map.
        named: Names of cases that are shown in any case.
    """
    by_name = {pair.name: pair for pair in pairs}
    cases, room = list[ViewedCase](), ViewerCapacity()
    for name, reason in chosen_cases(evaluation, named).items():
        volumes = _volumes(by_name[name], images.get(name), (maps or {}).get(name), evaluation.labels)
        if not room.for_more(volumes.values()) and name not in named:
            break
        cases.append(viewed_case(name, reason, volumes, evaluation.labels))
    return cases


def _volumes(
    pair: MaskPair, image: Path | None, score_map: Path | None, labels: Mapping[int, str]
) -> dict[LayerKind, Volume]:
    """What is shown of a case, on the grid of its reference."""
    prediction, reference = pair.read()
    volumes: dict[LayerKind, Volume] = {}
    if image is not None:
        scan = read_volume(image, channels=None)
        reference = reference.covering(scan)
        prediction = reference.aligned(prediction)
        volumes["scan"] = reference.aligned(scan)
    volumes |= {"reference": _only(reference, labels), "prediction": _only(prediction, labels)}
    uncertainty = pair.companion("uncertainty")
    if uncertainty is not None and (volume := aligned_or_none(read_map(uncertainty), reference)) is not None:
        volumes["uncertainty"] = volume
    if score_map is not None:
        volumes["anomaly"] = reference.aligned(read_scores(score_map))
    return volumes


def _only(volume: Volume, labels: Mapping[int, str]) -> Volume:
    """The label map with every label that is not evaluated set to 0."""
    return volume.like(torch.where(torch.isin(volume.data, torch.tensor(list(labels))), volume.data, 0))
