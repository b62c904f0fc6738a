"""Predicted masks against reference masks: the whole of `medseg evaluate` as one function."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from medseg_diffusion.errors import InputError, UsageError
from medseg_diffusion.files import write_files
from medseg_diffusion.metrics.ambiguity import generalised_energy_distance, matched_iou
from medseg_diffusion.metrics.calibration import Reliability, region
from medseg_diffusion.metrics.detection import MIN_OVERLAP
from medseg_diffusion.metrics.overlap import ClassOverlap, label_overlap
from medseg_diffusion.metrics.surface import hd95
from medseg_diffusion.reports.html import CasePicture, evaluation_report
from medseg_diffusion.reports.plots import overlay
from medseg_diffusion.reports.summary import CaseResult, Evaluation, cases_csv, summarise, summary_json
from medseg_diffusion.volumes.io import read_labels, read_map, read_volume, upright
from medseg_diffusion.volumes.paths import SUFFIXES, scan_files, scan_name
from medseg_diffusion.volumes.volume import Volume

from .evaluate_maps import MAP_ENDINGS, evaluate_scores

__all__ = ["Evaluation", "evaluate"]

# A label map has a few hundred classes at the very most; a scan passed by mistake has thousands of values.
_MAX_CLASSES = 1000
# Written by `medseg segment` beside its masks: not predictions to be compared, and no surprise in their folder.
_COMPANIONS = ("_prob", "_uncertainty", "_members", "_pseudo", "_anomaly", "_anomaly_foreground")
# What a mask's name may end with: those of `medseg segment` and `medseg anomaly`.
_MASKS = ("_seg", "_anomaly_mask")


@dataclass(frozen=True)
class _Pair:
    name: str
    prediction: Path
    reference: Path
    merged: bool = False  # all labels above 0 are one

    def labels(self, path: Path) -> Volume:
        """A label map of this case."""
        found = read_labels(path)
        return found.like(found.data.clamp(max=1)) if self.merged else found


@dataclass(frozen=True)
class _Counts:
    """Overlap of the labels that were found in one case, or asked for, and the number of voxels."""

    overlap: Mapping[int, ClassOverlap]
    hd95_mm: Mapping[int, float]
    n_voxels: int

    def of(self, labels: Iterable[int]) -> dict[int, ClassOverlap]:
        """Overlap of each of `labels`; one that was not found is empty on both sides."""
        absent = ClassOverlap.from_counts(tp=0, n_pred=0, n_ref=0, n_voxels=self.n_voxels)
        return {label: self.overlap.get(label, absent) for label in labels}


def evaluate(
    prediction: Path,
    reference: Path,
    out: Path,
    *,
    labels: Mapping[int, str] | Sequence[int] | None = None,
    images: Path | None = None,
    raters: Sequence[Path] = (),
    scores: Path | None = None,
    foreground: Path | None = None,
    lesion_overlap: float = MIN_OVERLAP,
    merge_labels: bool = False,
    seed: int = 0,
    command: str | None = None,
) -> Evaluation:
    """Compare predicted with reference masks; write `summary.json`, `cases.csv` and `report.html`.

    Where `case_prob.nii.gz` lies beside a prediction, the report says how well its probabilities are calibrated.

    Two files are compared with each other. Files in folders are paired by name: `case_seg.nii.gz` (or
    `case_anomaly_mask.nii.gz`), else `case.nii.gz`, stands for `case` on either side. A single prediction in front of a
    folder of references is compared with its own reference only. Every file counts as one independent case.

    Args:
        prediction: Predicted label map, or a folder of them.
        reference: Reference label map, or a folder of them.
        out: Folder for the results; created. An earlier result in it is replaced.
        labels: Label value -> class name, or label values, to evaluate; None takes every label above 0 that any
            prediction or reference holds, so that false alarms of a class without reference count.
        images: The scans (a file or a folder, paired by name) as background of the pictures; without one the reference
            is shown on black.
        raters: Further references of the same cases (files or folders, paired by name), by other raters. The samples of
            a case, in `case_members.nii.gz` beside the prediction, else the prediction alone, are compared with all.
        scores: Score maps of one channel (a file or a folder, paired by name: `case_anomaly.nii.gz`, else
            `case_scores.nii.gz`, else `case.nii.gz`), high where a lesion is likely. The result then says how well they
            find the lesions, which are all evaluated labels of the reference together; where `case_anomaly.json` with a
            number "score" lies beside a map, also how well these tell scans with lesions from others. Voxels whose
            score is NaN do not count.
        foreground: Masks of the voxels whose scores count (a file or a folder, paired by name); None takes what
            `medseg anomaly` left beside its maps, `case_anomaly_foreground.nii.gz`, else all voxels.
        lesion_overlap: Share in (0, 1] of a lesion's voxels that must be predicted for it to be detected.
        merge_labels: All labels above 0 are one, of predictions, references and raters: for models that were trained so
            (data.merge_labels), whose masks hold 1 where references hold 255, or several classes.
        seed: Seed of the bootstrap.
        command: What the report's footer says was run; None describes this call.

    Returns:
        The numbers. `warnings` names predictions without a reference and labels that were left out.

    Raises:
        InputError: A path or file that cannot be used, a reference without a prediction, two files for one case, a
            prediction or image on another grid than its reference, or no label to evaluate; a score map or foreground
            mask that is missing, on another grid or not usable. Nothing is written then.
        UsageError: A foreground without scores, or a `lesion_overlap` out of range.
    """
    prediction, reference, out = Path(prediction), Path(reference), Path(out)
    if foreground is not None and scores is None:
        raise UsageError("a foreground mask restricts score maps; give --scores too, or no --foreground")
    if not 0 < lesion_overlap <= 1:
        raise UsageError(f"a lesion overlap of {lesion_overlap:g}; expected a share above 0 and not above 1")
    pairs, notes = _pairs(prediction, reference)
    pairs = [replace(pair, merged=merge_labels) for pair in pairs]
    backgrounds = _backgrounds(images, pairs)
    others = [_rater(Path(rater), pairs) for rater in raters]
    unmatched = [
        path for path, other in zip(raters, others, strict=True) if not {pair.name for pair in pairs} & set(other)
    ]
    notes += [f"No case of this rater is evaluated: {path}." for path in unmatched]
    maps = _of_each(Path(scores), pairs, MAP_ENDINGS, "score map") if scores is not None else None
    inside = _of_each(Path(foreground), pairs, ("_seg", ""), "foreground mask") if foreground is not None else None
    if inside is None and maps is not None:
        beside = {name: path.with_name(f"{name}_anomaly_foreground.nii.gz") for name, path in maps.items()}
        inside = beside if all(path.is_file() for path in beside.values()) else None
    wanted = _named(labels)
    counts = {pair.name: _compare(pair, wanted) for pair in pairs}
    present = {label for case in counts.values() for label, item in case.overlap.items() if item.n_pred or item.n_ref}
    # Scans without lesions in which nothing is predicted are a result too, where score maps are judged.
    names = wanted or {label: f"label {label}" for label in sorted(present or ({1} if maps is not None else set()))}
    if not names:
        raise InputError(
            reference, "no label above 0 in any reference or prediction", "at least one class", "name the labels to use"
        )
    predicted, expected = (
        {label for case in counts.values() for label, item in case.overlap.items() if getattr(item, side)}
        for side in ("n_pred", "n_ref")
    )
    if predicted and expected and not predicted & expected:
        notes.append(
            f"Predictions hold label {_listed(sorted(predicted))}, references {_listed(sorted(expected))}: none in "
            "common. Add --merge-labels if all labels above 0 mean the same."
        )
    if left_out := sorted(present - set(names)):
        notes.append(f"Labels not evaluated: {_listed(left_out)}.")
    if absent := sorted(set(names) - present):
        notes.append(f"Labels in no reference and no prediction: {_listed(absent)}.")
    cases = []
    for pair in pairs:
        reliability, note = _reliability(pair)
        notes += [note] if note else []
        of_others = [rater[pair.name] for rater in others if pair.name in rater]
        distance, matched = _against_raters(pair, of_others, list(names))
        count = counts[pair.name]
        cases.append(
            CaseResult(
                pair.name,
                str(pair.prediction),
                str(pair.reference),
                count.of(names),
                count.hd95_mm,
                reliability,
                distance,
                matched,
            )
        )
    detection = None
    if maps is not None:
        by_name = {pair.name: pair for pair in pairs}
        # The overlap of a single class is that of the lesions; several classes are lesions together.
        known = {case.name: overlap for case in cases for overlap in case.overlap.values()} if len(names) == 1 else {}
        detection, remarks = evaluate_scores(
            maps,
            inside,
            lambda name: _read_pair(by_name[name]),
            names,
            known,
            min_overlap=lesion_overlap,
            seed=seed,
        )
        notes += remarks
    result = summarise(cases, names, detection=detection, seed=seed, warnings=notes)
    report = evaluation_report(
        result,
        _pictures(result, {pair.name: pair for pair in pairs}, backgrounds),
        command=command
        if command is not None
        else _command(
            prediction,
            reference,
            out,
            list(wanted),
            images,
            raters,
            scores,
            foreground,
            lesion_overlap,
            merge_labels,
            seed,
        ),
    )
    write_files(out, {"summary.json": summary_json(result), "cases.csv": cases_csv(result), "report.html": report})
    return result


# ---- which file belongs to which ---------------------------------------------------------------------------------


def _pairs(prediction: Path, reference: Path) -> tuple[list[_Pair], list[str]]:
    """The pairs of files sorted by case name, and remarks on predictions that are in none."""
    predicted, expected = _by_case(prediction), _by_case(reference)
    if not prediction.is_dir() and not reference.is_dir():
        (name,) = expected
        return [_Pair(name, prediction, reference)], []
    if not prediction.is_dir():
        expected = {name: path for name, path in expected.items() if name in predicted}
        if not expected:
            raise InputError(
                reference,
                f"no reference for {', '.join(predicted)}",
                "a file of that name",
                "pass the reference itself",
            )
    if missing := [name for name in expected if name not in predicted]:
        raise InputError(
            prediction,
            f"no prediction for {_listed(missing)} ({len(missing)} of {len(expected)} references)",
            "one prediction for each reference",
            "segment these cases too, or take their references out",
        )
    extra = [name for name in predicted if name not in expected]
    notes = [f"Predictions without a reference, not evaluated: {_listed(extra)}."] if extra else []
    return [_Pair(name, predicted[name], path) for name, path in sorted(expected.items())], notes


def _by_case(path: Path) -> dict[str, Path]:
    """Case name -> label map, for a file or a folder.

    Where `case_seg` or `case_anomaly_mask` lies beside `case`, the latter is the scan.
    """
    if not path.exists():
        raise InputError(path, "no such file or folder", "a label map or a folder of them", "check the path")
    if not path.is_dir():
        return {_case_name(scan_name(path)): path}
    files = _files(path)
    masks = {name: file for name, file in files.items() if not name.endswith(_COMPANIONS)}
    cases = {
        _case_name(name): file
        for name, file in masks.items()
        if name.endswith(_MASKS) or not any(name + ending in masks for ending in _MASKS)
    }
    if not cases:
        raise InputError(path, "a folder without label maps", f"files that end with {', '.join(SUFFIXES)}", "check it")
    return cases


def _case_name(name: str) -> str:
    for ending in _MASKS:
        name = name.removesuffix(ending)
    return name


def _rater(path: Path, pairs: Sequence[_Pair]) -> dict[str, Path]:
    """Case name -> label map of a further rater; of a single case any file."""
    if path.is_file() and len(pairs) == 1:
        return {pairs[0].name: path}
    return _by_case(path)


def _files(folder: Path) -> dict[str, Path]:
    """Name without suffix -> file, for the visible images directly in a folder."""
    files: dict[str, Path] = {}
    for path in scan_files(folder):
        name = scan_name(path)
        if name in files:
            raise InputError(path, f"the same name as {files[name].name}", "one file per case", "take one of them out")
        files[name] = path
    return files


def _backgrounds(images: Path | None, pairs: Sequence[_Pair]) -> dict[str, Path]:
    """Case name -> scan, for the cases that have one; nnU-Net's first channel, `case_0000`, counts as the scan."""
    if images is None:
        return {}
    images = Path(images)
    if not images.exists():
        raise InputError(images, "no such file or folder", "a scan or a folder of scans", "check the path")
    if not images.is_dir():
        return {pairs[0].name: images} if len(pairs) == 1 else {scan_name(images): images}
    files = _files(images)
    matches = {pair.name: files.get(pair.name) or files.get(f"{pair.name}_0000") for pair in pairs}
    return {name: path for name, path in matches.items() if path is not None}


def _of_each(path: Path, pairs: Sequence[_Pair], endings: Sequence[str], what: str) -> dict[str, Path]:
    """Case name -> file, for every case: of a single case any file, else the first of `case` with one of `endings`."""
    if not path.exists():
        raise InputError(path, "no such file or folder", f"a {what} or a folder of them", "check the path")
    if not path.is_dir() and len(pairs) == 1:
        return {pairs[0].name: path}
    files = _files(path) if path.is_dir() else {scan_name(path): path}
    found = {
        pair.name: next((files[pair.name + end] for end in endings if pair.name + end in files), None) for pair in pairs
    }
    if missing := [name for name, file in found.items() if file is None]:
        raise InputError(
            path,
            f"no {what} for {_listed(missing)} ({len(missing)} of {len(pairs)} cases)",
            f"one {what} for each case: {', '.join(f'NAME{ending}' for ending in endings)}",
            "make these too, or take the cases out",
        )
    return {name: file for name, file in found.items() if file is not None}


# ---- one case ----------------------------------------------------------------------------------------------------


def _read_pair(pair: _Pair) -> tuple[Volume, Volume]:
    """Prediction and reference, on one grid."""
    prediction, reference = pair.labels(pair.prediction), pair.labels(pair.reference)
    reference.require_same_grid(prediction)
    return prediction, reference


def _compare(pair: _Pair, wanted: Mapping[int, str]) -> _Counts:
    volumes = _read_pair(pair)
    prediction, reference = (volume.data[0].numpy() for volume in volumes)
    spacing = volumes[1].spacing
    found = set(wanted)
    for path, array in ((pair.prediction, prediction), (pair.reference, reference)):
        values = np.unique(array)
        if len(values) > _MAX_CLASSES:
            raise InputError(path, f"{len(values)} different labels", "a label map", "check that it is not a scan")
        found.update(int(value) for value in values if value > 0)
    surfaces = {value: hd95(prediction == value, reference == value, spacing) for value in found}
    return _Counts(label_overlap(prediction, reference, found), surfaces, prediction.size)


def _reliability(pair: _Pair) -> tuple[Reliability | None, str]:
    """Of the probabilities beside the prediction, if there are any; else why what is there was not used."""
    path = _companion(pair, "_prob")
    if path is None:
        return None, ""
    probabilities, reference = read_map(path), pair.labels(pair.reference)
    p, truth = probabilities.data.numpy(), reference.data[0].numpy()
    if probabilities.shape != reference.shape or len(p) < 2 or abs(float(p.sum(0).mean()) - 1) > 1e-2:
        return None, f"Not used for calibration: {path.name} holds no class probabilities on the grid of its reference."
    if truth.max() >= len(p):
        return None, f"Not used for calibration: {path.name} has no probability of label {truth.max()}."
    return Reliability.of(p, truth, region(truth)), ""


def _against_raters(pair: _Pair, others: Sequence[Path], labels: Sequence[int]) -> tuple[float, float]:
    """Energy distance and matched IoU of the samples from all raters, the reference among them; NaN if it is alone."""
    if not others:
        return math.nan, math.nan
    reference = pair.labels(pair.reference)
    raters = [reference]
    for path in others:
        raters.append(pair.labels(path))
        reference.require_same_grid(raters[-1])
    members = _companion(pair, "_members")
    samples = pair.labels(pair.prediction) if members is None else read_map(members)
    reference.require_same_grid(samples)
    arrays = [volume.data.numpy().astype(np.int64) for volume in (samples, *raters)]
    if pair.merged:
        arrays = [array.clip(max=1) for array in arrays]
    maps = [list(np.where(np.isin(array, labels), array, 0)) for array in arrays]
    first, *second = maps
    known = [one for rater in second for one in rater]
    classes = int(max(one.max() for one in (*first, *known))) + 1
    return generalised_energy_distance(first, known, classes), matched_iou(first, known, classes)


def _companion(pair: _Pair, ending: str) -> Path | None:
    """What `medseg segment` wrote beside a mask, if it is there."""
    for suffix in SUFFIXES:
        path = pair.prediction.with_name(_case_name(scan_name(pair.prediction)) + ending + suffix)
        if path.is_file():
            return path
    return None


def _pictures(result: Evaluation, pairs: Mapping[str, _Pair], backgrounds: Mapping[str, Path]) -> list[CasePicture]:
    """Best, median and worst case; fewer if there are fewer."""
    ranked = [case for case in result.worst_first() if not np.isnan(case.mean_dice)]
    if len(ranked) < 2:
        chosen = [("Case", case) for case in ranked]
    else:
        middle = [("Median case", ranked[(len(ranked) - 1) // 2])] if len(ranked) > 2 else []
        chosen = [("Best case", ranked[-1]), *middle, ("Worst case", ranked[0])]
    pictures = []
    for title, case in chosen:
        prediction, reference = _read_pair(pairs[case.name])
        image = None
        where = pairs[case.name].reference
        if case.name in backgrounds:
            scan = read_volume(backgrounds[case.name], channels=None)
            reference.require_same_grid(scan)
            image = upright(scan, where).data[0].numpy()
        reference, prediction = upright(reference, where), upright(prediction, where)
        png = overlay(_only(reference, result.labels), _only(prediction, result.labels), reference.spacing, image)
        pictures.append(CasePicture(title, case.name, case.mean_dice, png))
    return pictures


def _only(volume: Volume, labels: Mapping[int, str]) -> npt.NDArray[np.int32]:
    """The label map (I, J, K) with every label that is not evaluated set to 0."""
    array = volume.data[0].numpy()
    return np.where(np.isin(array, list(labels)), array, 0)


# ---- words -------------------------------------------------------------------------------------------------------


def _named(labels: Mapping[int, str] | Sequence[int] | None) -> dict[int, str]:
    """Label value -> class name in ascending order; empty if none are asked for."""
    if labels is None:
        return {}
    names = labels if isinstance(labels, Mapping) else {label: f"label {label}" for label in labels}
    return {int(label): names[label] for label in sorted(names)}


def _listed(items: Sequence[object], limit: int = 20) -> str:
    """The items separated by commas; of a long list the beginning and how many more there are."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(map(str, items[:limit])) + more


def _command(
    prediction: Path,
    reference: Path,
    out: Path,
    labels: Sequence[int],
    images: Path | None,
    raters: Sequence[Path],
    scores: Path | None,
    foreground: Path | None,
    lesion_overlap: float,
    merge_labels: bool,
    seed: int,
) -> str:
    words = ["medseg", "evaluate", str(prediction), str(reference), "-o", str(out)]
    for label in labels:
        words += ["--label", str(label)]
    words += ["--images", str(images)] if images is not None else []
    for rater in raters:
        words += ["--rater", str(rater)]
    words += ["--scores", str(scores)] if scores is not None else []
    words += ["--foreground", str(foreground)] if foreground is not None else []
    words += ["--lesion-overlap", f"{lesion_overlap:g}"] if scores is not None and lesion_overlap != MIN_OVERLAP else []
    words += ["--merge-labels"] if merge_labels else []
    words += ["--seed", str(seed)] if seed else []
    return shlex.join(words)
