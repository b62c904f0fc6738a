"""One case of `medseg evaluate`: reads its masks and compares them. Processes of their own call these functions."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg_diffusion.data.class_names import class_names
from medseg_diffusion.data.pairs import MaskPair
from medseg_diffusion.errors import InputError, remarks
from medseg_diffusion.metrics.ambiguity import ReaderAgreement
from medseg_diffusion.metrics.calibration import Reliability, region
from medseg_diffusion.metrics.case_metrics import ClassResult, MeasureOptions, absent, labels_of, measure
from medseg_diffusion.volumes.io import read_map, stored_labels
from medseg_diffusion.volumes.volume import Volume

# A label map has a few hundred classes at most. A scan that was passed by mistake has thousands of values.
_MAX_CLASSES = 1000


@dataclass(frozen=True)
class CaseTask:
    """A case to be compared, and the labels that are compared even if they do not occur."""

    pair: MaskPair
    labels: tuple[int, ...]
    options: MeasureOptions


@dataclass(frozen=True)
class MeasuredCase:
    """The numbers of a case.

    Attributes:
        results: Label -> result, of the labels that occur or were requested.
        n_voxels: Voxels of the grid.
        spacing_mm: Voxel size along each axis.
        reliability: Calibration of the probabilities beside the prediction; None without any.
        remarks: What the user should know about the files.
        unused: Why the probabilities beside the prediction are not used; empty if they are, or if there are none.
    """

    results: Mapping[int, ClassResult]
    n_voxels: int
    spacing_mm: tuple[float, float, float]
    reliability: Reliability | None
    remarks: tuple[str, ...] = ()
    unused: str = ""

    def results_of(self, labels: Iterable[int], options: MeasureOptions) -> dict[int, ClassResult]:
        """The result of each of `labels`; a label that does not occur is empty in both masks."""
        return {label: self.results.get(label) or absent(self.n_voxels, options) for label in labels}


def measure_case(task: CaseTask) -> MeasuredCase:
    """Compare the masks of a case, and the probabilities beside the prediction with the reference.

    Raises:
        InputError: A file that cannot be used, two different grids, or a mask that is no label map.
    """
    with remarks() as said:
        pair = task.pair
        volumes = pair.read()
        prediction, reference = (volume.data[0].numpy() for volume in volumes)
        labels = set(task.labels)
        for path, array in ((pair.prediction, prediction), (pair.reference, reference)):
            values = labels_of(array)
            if len(values) > _MAX_CLASSES:
                count = f"{len(values)} different labels above 0"
                raise InputError(path, count, "a label map", "check that it is not a scan")
            labels.update(values)
        spacing = volumes[1].spacing
        results = measure(prediction, reference, sorted(labels), spacing, task.options, volumes[1].voxel_mm3)
        reliability, unused = _reliability(pair, volumes[1], task.labels)
    return MeasuredCase(results, prediction.size, spacing, reliability, tuple(said), unused)


def _reliability(pair: MaskPair, reference: Volume, compared: Collection[int]) -> tuple[Reliability | None, str]:
    """Calibration of the probabilities beside the prediction; if they cannot be used, None and the reason.

    If ``compared``, the requested labels, are those of the prediction, all others are what its first channel is of.
    """
    path = pair.companion("probabilities")
    if path is None:
        return None, ""
    probabilities = read_map(path)
    reference = reference.covering(probabilities)
    volume, truth = aligned_or_none(probabilities, reference), reference.data[0].numpy()
    p: NDArray[Any] = np.empty(0) if volume is None else volume.data.numpy()
    if len(p) < 2 or abs(float(p.sum(0).mean()) - 1) > 1e-2:
        return None, f"Not used for calibration: {path.name} holds no class probabilities on the grid of its reference."
    named, every = [] if pair.merged else _named(pair.prediction), list(range(1, len(p)))
    if named and len(named) == len(every) and (named != every or named == sorted(compared)):
        # Chosen classes, behind everything else.
        places = np.zeros(max(named[-1], int(truth.max())) + 1, np.int64)
        places[named] = every
        truth = places[truth]
    if truth.max() >= len(p):
        return None, f"Not used for calibration: {path.name} has no probability of label {truth.max()}."
    return Reliability.of(p, truth, region(truth)), ""


def aligned_or_none(volume: Volume, reference: Volume) -> Volume | None:
    """A map that nobody asked for, with the axes of the reference; None on another grid, as that of an earlier run."""
    try:
        return reference.aligned(volume)
    except InputError:
        return None


def _named(prediction: Path) -> list[int]:
    """The values that a mask's header, or else files beside it, name; ascending, none if these cannot be read."""
    try:
        return sorted(stored_labels(prediction) or class_names([prediction])[0])
    except InputError:  # not said before: the names of all classes were given
        return []


@dataclass(frozen=True)
class RatersTask:
    """A case whose samples are compared with all raters: further raters' files, and the labels."""

    pair: MaskPair
    raters: tuple[Path, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True)
class RatedCase:
    """The agreement of a case's samples with all raters, and what the user should know about the files."""

    agreement: ReaderAgreement
    remarks: tuple[str, ...]


def compare_with_raters(task: RatersTask) -> RatedCase:
    """The samples of a case compared with all raters, including the reference.

    Raises:
        InputError: A file that cannot be used, or is on another grid.
    """
    with remarks() as said:
        agreement = _agreement(task)
    return RatedCase(agreement, tuple(said))


def _agreement(task: RatersTask) -> ReaderAgreement:
    pair = task.pair
    members = pair.companion("members")
    samples = pair.read_labels(pair.prediction) if members is None else read_map(members)
    references = [pair.read_labels(path) for path in (pair.reference, *task.raters)]
    grid = references[0]
    for volume in (samples, *references[1:]):
        grid = grid.covering(volume)
    labels = sorted(task.labels)
    sample_maps, *rater_maps = (
        [_numbered(labelmap.clip(max=1) if pair.merged else labelmap, labels) for labelmap in volume.data.numpy()]
        for volume in map(grid.aligned, (samples, *references))
    )
    return ReaderAgreement.of(sample_maps, [labelmap for maps in rater_maps for labelmap in maps], len(labels) + 1)


def _numbered(labelmap: NDArray[Any], labels: Sequence[int]) -> NDArray[np.unsignedinteger[Any]]:
    """``labels`` as 1, 2, ... in the smallest type that holds them, all others as 0.

    The cost of comparisons grows with the number of classes, not with their values.
    """
    numbered = np.zeros(labelmap.shape, np.min_scalar_type(len(labels)))
    for number, label in enumerate(labels, 1):
        numbered[labelmap == label] = number
    return numbered
