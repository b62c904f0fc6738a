"""`medseg evaluate`: pair the masks, compare them, summarise the numbers and write the report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from warnings import catch_warnings, simplefilter

import numpy as np

from medseg_diffusion.data.pairs import (
    MaskPair,
    find_backgrounds,
    find_for_each,
    find_foregrounds_beside,
    find_pairs,
    find_rater,
    listed,
)
from medseg_diffusion.data.patients import read_patients
from medseg_diffusion.errors import InputError, UsageError
from medseg_diffusion.files import require_folder, write_files
from medseg_diffusion.metrics.ambiguity import ReaderAgreement
from medseg_diffusion.metrics.calibration import Reliability, region
from medseg_diffusion.metrics.case_metrics import ClassResult, MeasureOptions, absent, labels_of, measure
from medseg_diffusion.metrics.detection import MIN_OVERLAP
from medseg_diffusion.metrics.detection_summary import Detection
from medseg_diffusion.metrics.evaluation_summary import EvaluatedCase, Evaluation, summarise
from medseg_diffusion.reports.evaluation_page import evaluation_page
from medseg_diffusion.reports.page import relative_link
from medseg_diffusion.reports.summary import cases_csv, summary_json
from medseg_diffusion.reports.viewer import viewer
from medseg_diffusion.volumes.io import read_map

from .evaluate_maps import FOREGROUND_ENDINGS, MAP_ENDINGS, evaluate_scores
from .evaluation_views import viewed_cases

__all__ = ["EvaluateOptions", "Evaluation", "evaluate"]

# A label map has a few hundred classes at most. A scan that was passed by mistake has thousands of values.
_MAX_CLASSES = 1000


@dataclass(frozen=True)
class EvaluateOptions:
    """The options of `medseg evaluate`.

    Attributes:
        labels: Label value -> class name, or label values, to evaluate. None takes every label above 0 in any
            prediction or reference, so that false positives of a class without reference count.
        images: The scans (a file or a folder, paired by name), for the background of the pictures. A case without one
            shows its reference on black.
        raters: Further references of the same cases by other raters (files or folders, paired by name). The samples of
            a case, in `case_members.nii.gz` beside the prediction, are compared with all raters; without samples it is
            the prediction.
        scores: Score maps of one channel, high where a lesion is likely (a file or a folder, paired by name:
            `case_anomaly.nii.gz`, else `case_scores.nii.gz`, else `case.nii.gz`). The result then says how well they
            detect lesions, which are all evaluated labels of the reference together. If `case_anomaly.json` with a
            number "score" lies beside a map, it also says how well these numbers separate scans with lesions from
            scans without. Voxels whose score is NaN do not count.
        foreground: Masks of the voxels whose scores count (a file or a folder, paired by name). None takes
            `case_anomaly_foreground.nii.gz` beside the maps, as `medseg anomaly` writes it, else all voxels.
        lesion_overlap: Share in (0, 1] of a lesion's voxels that must be predicted for it to be detected.
        merge_labels: Read all labels above 0 as label 1, in predictions, references and raters. Models that were
            trained with data.merge_labels write 1 where references may hold 255, or several classes.
        patients: CSV file with the columns case and patient, for cases that belong together, such as the slices of a
            scan. Means and intervals are over patients then, and every case needs a row.
        view: Names of cases that the page's viewer shows beside the worst, flagged, median and best ones.
        seed: Seed of the bootstrap.
        command: The command line, for the report's footer; empty shows none.
    """

    labels: Mapping[int, str] | Sequence[int] | None = None
    images: Path | None = None
    raters: Sequence[Path] = ()
    scores: Path | None = None
    foreground: Path | None = None
    lesion_overlap: float = MIN_OVERLAP
    merge_labels: bool = False
    patients: Path | None = None
    view: Sequence[str] = ()
    seed: int = 0
    command: str = ""

    def require_valid(self) -> None:
        """Check the options against each other.

        Raises:
            UsageError: A foreground without scores, or a `lesion_overlap` out of range.
        """
        if self.foreground is not None and self.scores is None:
            raise UsageError("a foreground mask restricts score maps; give --scores too, or no --foreground")
        if not 0 < self.lesion_overlap <= 1:
            raise UsageError(f"a lesion overlap of {self.lesion_overlap:g}; expected a share above 0 and not above 1")


def evaluate(
    prediction: Path, reference: Path, output: Path, options: EvaluateOptions = EvaluateOptions()
) -> Evaluation:
    """Compare predicted with reference masks; write `summary.json`, `cases.csv` and `report.html`.

    Two files are compared with each other. Files in folders are paired by name: `case_seg.nii.gz` (or
    `case_anomaly_mask.nii.gz`), else `case.nii.gz`, is the mask of `case` in either folder. A single prediction is
    compared with its own reference in a folder of references. Every file counts as one independent case, unless
    ``options.patients`` says which belong together.

    If `case_prob.nii.gz` lies beside a prediction, the report includes the calibration of its probabilities.

    Args:
        prediction: Predicted label map, or a folder of them.
        reference: Reference label map, or a folder of them.
        output: Folder for the results; created. An earlier result in it is replaced.
        options: The other options.

    Returns:
        The numbers. `warnings` names predictions without a reference and labels that were left out.

    Raises:
        InputError: A path or file that cannot be used, a reference without a prediction, two files for one case, a
            prediction or image on another grid than its reference, no label to evaluate, or a case without a patient
            in the file of patients; a score map or foreground
            mask that is missing, on another grid or not usable. Nothing is written then.
        UsageError: A foreground without scores, or a `lesion_overlap` out of range.
    """
    options.require_valid()
    require_folder(output)
    inputs, warnings = _find_inputs(Path(prediction), Path(reference), options)
    requested = _label_names(options.labels)
    how = MeasureOptions(lesion_overlap=options.lesion_overlap)
    measured = {pair.name: _measure(pair, requested, how) for pair in inputs.pairs}
    names, remarks = _evaluated_labels(requested, measured.values(), Path(reference), scored=inputs.maps is not None)
    warnings += remarks
    cases = []
    for pair in inputs.pairs:
        reliability, remark = _reliability(pair)
        warnings += [remark] if remark else []
        raters = [rater[pair.name] for rater in inputs.raters if pair.name in rater]
        cases.append(
            EvaluatedCase(
                name=pair.name,
                prediction_file=str(pair.prediction),
                reference_file=str(pair.reference),
                results=measured[pair.name].results_of(names, how),
                spacing_mm=measured[pair.name].spacing_mm,
                reliability=reliability,
                agreement=_compare_with_raters(pair, raters, list(names)) if raters else None,
            )
        )
    detection, remarks = _detect(inputs, cases, names, options)
    warnings += remarks
    result = summarise(
        cases,
        names,
        lesion_overlap=options.lesion_overlap,
        detection=detection,
        patients=inputs.patients,
        seed=options.seed,
        warnings=warnings,
    )
    shown = viewed_cases(result, inputs.pairs, inputs.images, inputs.maps, options.view)
    report = evaluation_page(
        result,
        viewer(shown) if shown else None,
        links={pair.name: relative_link(pair.prediction, output) for pair in inputs.pairs},
        command=options.command,
    )
    files = {"summary.json": summary_json(result), "cases.csv": cases_csv(result), "report.html": report}
    write_files(Path(output), files)
    return result


# ---- inputs ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Inputs:
    """The files of an evaluation, by case name where they are mappings."""

    pairs: Sequence[MaskPair]
    images: Mapping[str, Path]
    raters: Sequence[Mapping[str, Path]]
    maps: Mapping[str, Path] | None
    foregrounds: Mapping[str, Path] | None
    patients: Mapping[str, str] | None


def _find_inputs(prediction: Path, reference: Path, options: EvaluateOptions) -> tuple[_Inputs, list[str]]:
    """The files, and remarks on those that are not used."""
    pairs, remarks = find_pairs(prediction, reference, merged=options.merge_labels)
    images = find_backgrounds(Path(options.images), pairs) if options.images is not None else {}
    raters = [find_rater(Path(path), pairs) for path in options.raters]
    names = {pair.name for pair in pairs}
    remarks += [
        f"No case of this rater is evaluated: {path}."
        for path, rater in zip(options.raters, raters, strict=True)
        if not names & set(rater)
    ]
    maps = foregrounds = None
    if options.scores is not None:
        maps = find_for_each(Path(options.scores), pairs, MAP_ENDINGS, "score map")
        if options.foreground is None:
            foregrounds = find_foregrounds_beside(maps)
        else:
            foregrounds = find_for_each(Path(options.foreground), pairs, FOREGROUND_ENDINGS, "foreground mask")
    patients = None
    if options.patients is not None:
        with catch_warnings(record=True) as caught:
            simplefilter("always")
            patients = read_patients(Path(options.patients), names)
        remarks += [f"{warning.message}." for warning in caught]
    return _Inputs(pairs, images, raters, maps, foregrounds, patients), remarks


# ---- labels ------------------------------------------------------------------------------------------------------


def _label_names(labels: Mapping[int, str] | Sequence[int] | None) -> dict[int, str]:
    """Label value -> class name of the requested labels in ascending order; empty if none are requested."""
    if labels is None:
        return {}
    names = labels if isinstance(labels, Mapping) else {label: f"label {label}" for label in labels}
    return {int(label): names[label] for label in sorted(names)}


def _evaluated_labels(
    requested: Mapping[int, str], cases: Iterable[_Measured], reference: Path, *, scored: bool
) -> tuple[dict[int, str], list[str]]:
    """Label value -> class name of what is evaluated, and remarks on labels that are left out or absent."""
    results = [item for case in cases for item in case.results.items()]
    predicted = {label for label, result in results if result.overlap.n_pred}
    expected = {label for label, result in results if result.overlap.n_ref}
    present = predicted | expected
    names = dict(requested)
    if not names:
        # With score maps, scans without lesions in which nothing is predicted are a result, too.
        names = {label: f"label {label}" for label in sorted(present or ({1} if scored else set()))}
    if not names:
        raise InputError(
            reference, "no label above 0 in any reference or prediction", "at least one class", "name the labels to use"
        )
    remarks = []
    if predicted and expected and not predicted & expected:
        remarks.append(
            f"Predictions hold label {listed(sorted(predicted))}, references {listed(sorted(expected))}: none in "
            "common. Add --merge-labels if all labels above 0 mean the same."
        )
    if left_out := sorted(present - set(names)):
        remarks.append(f"Labels not evaluated: {listed(left_out)}.")
    if absent := sorted(set(names) - present):
        remarks.append(f"Labels in no reference and no prediction: {listed(absent)}.")
    return names, remarks


# ---- one case ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Measured:
    """The labels of a case that occur or were requested, and what is needed for those of other cases."""

    results: Mapping[int, ClassResult]
    n_voxels: int
    spacing_mm: tuple[float, float, float]

    def results_of(self, labels: Iterable[int], options: MeasureOptions) -> dict[int, ClassResult]:
        """The result of each of `labels`; a label that does not occur is empty in both masks."""
        return {label: self.results.get(label) or absent(self.n_voxels, options) for label in labels}


def _measure(pair: MaskPair, requested: Iterable[int], options: MeasureOptions) -> _Measured:
    volumes = pair.read()
    prediction, reference = (volume.data[0].numpy() for volume in volumes)
    labels = set(requested)
    for path, array in ((pair.prediction, prediction), (pair.reference, reference)):
        values = labels_of(array)
        if len(values) > _MAX_CLASSES:
            raise InputError(
                path, f"{len(values)} different labels above 0", "a label map", "check that it is not a scan"
            )
        labels.update(values)
    spacing = volumes[1].spacing
    return _Measured(measure(prediction, reference, sorted(labels), spacing, options), prediction.size, spacing)


def _reliability(pair: MaskPair) -> tuple[Reliability | None, str]:
    """Calibration of the probabilities beside the prediction; if they cannot be used, None and the reason."""
    path = pair.companion("probabilities")
    if path is None:
        return None, ""
    probabilities, reference = read_map(path), pair.read_labels(pair.reference)
    p, truth = probabilities.data.numpy(), reference.data[0].numpy()
    if probabilities.shape != reference.shape or len(p) < 2 or abs(float(p.sum(0).mean()) - 1) > 1e-2:
        return None, f"Not used for calibration: {path.name} holds no class probabilities on the grid of its reference."
    if truth.max() >= len(p):
        return None, f"Not used for calibration: {path.name} has no probability of label {truth.max()}."
    return Reliability.of(p, truth, region(truth)), ""


def _compare_with_raters(pair: MaskPair, raters: Sequence[Path], labels: Sequence[int]) -> ReaderAgreement:
    """The samples of a case compared with all raters, including the reference."""
    reference = pair.read_labels(pair.reference)
    references = [reference]
    for path in raters:
        references.append(pair.read_labels(path))
        reference.require_same_grid(references[-1])
    members = pair.companion("members")
    samples = pair.read_labels(pair.prediction) if members is None else read_map(members)
    reference.require_same_grid(samples)
    arrays = [volume.data.numpy().astype(np.int64) for volume in (samples, *references)]
    if pair.merged:
        arrays = [array.clip(max=1) for array in arrays]
    # Labels become 1, 2, ...: the cost grows with the number of classes, not with their values.
    values = np.asarray(sorted(labels))
    classes = [np.where(np.isin(array, values), np.searchsorted(values, array) + 1, 0) for array in arrays]
    sample_maps, *rater_maps = (list(maps) for maps in classes)
    return ReaderAgreement.of(sample_maps, [labelmap for maps in rater_maps for labelmap in maps], len(values) + 1)


# ---- all cases ---------------------------------------------------------------------------------------------------


def _detect(
    inputs: _Inputs, cases: Sequence[EvaluatedCase], labels: Mapping[int, str], options: EvaluateOptions
) -> tuple[Detection | None, list[str]]:
    """Detection of lesions by the score maps, and remarks on it; None without score maps."""
    if inputs.maps is None:
        return None, []
    pairs = {pair.name: pair for pair in inputs.pairs}
    # The overlap of a single class is that of the lesions. Several classes are lesions together.
    overlaps = {case.name: overlap for case in cases for overlap in case.overlap.values()} if len(labels) == 1 else {}
    return evaluate_scores(
        inputs.maps,
        inputs.foregrounds,
        lambda name: pairs[name].read(),
        labels,
        overlaps,
        min_overlap=options.lesion_overlap,
        patients=inputs.patients,
        seed=options.seed,
    )
