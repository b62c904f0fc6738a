"""`medseg evaluate`: pair the masks, compare them, summarise the numbers and write the report."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from urllib.parse import quote
from warnings import catch_warnings, simplefilter

from medseg_diffusion.data.class_names import class_names
from medseg_diffusion.data.pairs import (
    MaskPair,
    find_backgrounds,
    find_common_pairs,
    find_for_each,
    find_foregrounds_beside,
    find_pairs,
    find_rater,
)
from medseg_diffusion.data.patients import read_patients
from medseg_diffusion.data.strata import read_strata
from medseg_diffusion.errors import InputError, UsageError, listed, remark, remarks
from medseg_diffusion.files import as_paths, require_folder, require_table, write_files
from medseg_diffusion.metrics.case_metrics import TOLERANCE_MM, MeasureOptions
from medseg_diffusion.metrics.comparison import Comparison, compare
from medseg_diffusion.metrics.detection import MIN_OVERLAP
from medseg_diffusion.metrics.detection_summary import Detection
from medseg_diffusion.metrics.evaluation_summary import EvaluatedCase, Evaluation, summarise
from medseg_diffusion.metrics.statistics import rough
from medseg_diffusion.reports.comparison_page import comparison_page
from medseg_diffusion.reports.evaluation_page import evaluation_page
from medseg_diffusion.reports.page import relative_link
from medseg_diffusion.reports.summary import FIRST_COLUMNS, cases_csv, comparison_json, summary_json
from medseg_diffusion.reports.viewer import Viewer, viewer
from medseg_diffusion.training.progress import OnProgress, count_of, silent
from medseg_diffusion.volumes.paths import is_image, scan_name

from .evaluate_cases import CaseTask, MeasuredCase, RatedCase, RatersTask, compare_with_raters, measure_case
from .evaluate_maps import FOREGROUND_ENDINGS, MAP_ENDINGS, evaluate_scores
from .evaluation_views import require_cases, viewed_cases
from .parallel import call_each

__all__ = ["Comparison", "EvaluateOptions", "Evaluation", "compare_predictions", "evaluate"]

OnCount = Callable[[str, int, int], None]
"""Called with what is done, the number of finished items, and the number of all."""


@dataclass(frozen=True)
class EvaluateOptions:
    """The options of `medseg evaluate`.

    Attributes:
        labels: Label value -> class name, or label values, to evaluate. None takes every label above 0 in any
            prediction or reference, so that false positives of a class without reference count. An empty name, or none,
            stands for that in the files beside the masks (`class_names`), else "label N".
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
        tolerance_mm: Tolerance of the normalised surface distance, above 0.
        tolerances_mm: Class name, or label value as text -> tolerance of its own.
        cldice: Compute clDice, too, for tubes such as vessels.
        merge_labels: Read all labels above 0 as label 1, in predictions, references and raters. Models that were
            trained with data.merge_labels write 1 where references may hold 255, or several classes.
        patients: CSV file with the columns case and patient, for cases that belong together, such as the slices of a
            scan. Means and intervals are over patients then, and every case needs a row.
        strata: CSV file and one of its columns, by which cases are grouped; joined by its column case, or by patient.
        view: Names of cases that the page's viewer shows beside the worst, flagged, median and best ones.
        seed: Seed of the bootstrap.
        jobs: Number of processes. None takes one for each CPU, up to 8, if the time of the first case tells that
            they pay. Other numbers than 1 need a script that is safe to import (`if __name__ == "__main__"`).
        command: The command line, for the report's footer; empty shows none.
    """

    labels: Mapping[int, str] | Sequence[int] | None = None
    images: Path | None = None
    raters: Sequence[Path] = ()
    scores: Path | None = None
    foreground: Path | None = None
    lesion_overlap: float = MIN_OVERLAP
    tolerance_mm: float = TOLERANCE_MM
    tolerances_mm: Mapping[str, float] = field(default_factory=dict)
    cldice: bool = False
    merge_labels: bool = False
    patients: Path | None = None
    strata: tuple[Path, str] | None = None
    view: Sequence[str] = ()
    seed: int = 0
    jobs: int | None = 1
    command: str = ""

    def __post_init__(self) -> None:
        as_paths(self, "images", "scores", "foreground", "patients")
        raters = [self.raters] if isinstance(self.raters, str | Path) else self.raters
        object.__setattr__(self, "raters", tuple(map(Path, raters)))
        if self.strata is not None:
            object.__setattr__(self, "strata", (Path(self.strata[0]), self.strata[1]))

    def require_valid(self) -> None:
        """Check the options against each other.

        Raises:
            UsageError: A foreground without scores, or a `lesion_overlap`, tolerance or number of jobs out of range.
        """
        if self.foreground is not None and self.scores is None:
            raise UsageError("a foreground mask restricts score maps; give --scores too, or no --foreground")
        if not 0 < self.lesion_overlap <= 1:
            raise UsageError(f"a lesion overlap of {self.lesion_overlap:g}; expected a share above 0 and not above 1")
        for tolerance in (self.tolerance_mm, *self.tolerances_mm.values()):
            if not 0 < tolerance < float("inf"):
                raise UsageError(f"a tolerance of {tolerance:g} mm; expected a number above 0")
        if self.jobs is not None and self.jobs < 1:
            raise UsageError(f"{self.jobs} jobs; expected 1 or more")


def evaluate(
    prediction: str | Path,
    reference: str | Path,
    output: str | Path,
    options: EvaluateOptions = EvaluateOptions(),
    on_progress: OnProgress = silent,
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
        on_progress: Called with a text and the share done, 0 to 1, after each case.

    Returns:
        The numbers. `warnings` names predictions without a reference, labels that were left out, and whatever else the
        reader should know about the files.

    Raises:
        InputError: A path or file that cannot be used, a reference without a prediction, two files for one case, a
            prediction or image on another grid than its reference, images of none of the cases, no label to evaluate,
            a case without a row in the tables of patients or strata; a score map or foreground mask that is missing, on
            another grid or not usable. Nothing is written then.
        UsageError: Options that contradict each other, are out of range, or name a class that does not exist; a rater
            who is named twice, or is the reference; a table of the user's that `cases.csv` would replace.
        MedsegError: A process that was killed.
    """
    options.require_valid()
    output, reference = Path(output), Path(reference)
    require_folder(output)
    _refuse_replacing([output], options)
    pairs, warnings = find_pairs(Path(prediction), reference, merged=options.merge_labels)
    with remarks() as said:
        inputs, unused = _find_inputs(pairs, options)
        (result,) = _evaluate_sets([inputs], reference, options, [*warnings, *unused], count_of(on_progress))
        shown = _viewer(result, inputs, options)
    result = replace(result, warnings=(*result.warnings, *_on_files(said)))
    write_files(output, _files(result, shown, inputs, output, options))
    return result


def compare_predictions(
    predictions: Sequence[str | Path],
    reference: str | Path,
    output: str | Path,
    options: EvaluateOptions = EvaluateOptions(),
    on_progress: OnProgress = silent,
) -> Comparison:
    """Compare several sets of predictions with the same references, and with each other; only cases that all have.

    For each set, `NAME/summary.json`, `NAME/cases.csv` and `NAME/report.html` are written as by `evaluate`;
    `comparison.json` and `report.html` hold the paired differences. NAME is the last part of the path, with parts
    before it where several end alike.

    Args:
        predictions: Two or more label maps or folders of them, paired with the references by name.
        reference: Reference label map, or a folder of them.
        output: Folder for the results; created. An earlier result in it is replaced.
        options: The other options. Score maps belong to a single set.
        on_progress: Called with a text and the share done, 0 to 1, after each case of each set.

    Raises:
        InputError: As `evaluate`; or no case that all sets have. Nothing is written then.
        UsageError: As `evaluate`; fewer than two sets, the same one twice, or score maps.
        MedsegError: A process that was killed.
    """
    options.require_valid()
    if options.scores is not None:
        raise UsageError("score maps belong to one set of predictions; evaluate them one by one, or leave --scores out")
    output, reference = Path(output), Path(reference)
    require_folder(output)
    folders = _set_names([Path(path) for path in predictions])
    for name, path in folders.items():
        if path.resolve() == (output / name).resolve():
            raise UsageError(
                f"-o {output}: the results of {name} would be written among its masks; name another folder"
            )
    _refuse_replacing([output / name for name in folders], options)
    pairs, left_out = find_common_pairs(folders, reference, merged=options.merge_labels)
    with remarks() as said:
        inputs, warnings = _find_inputs(next(iter(pairs.values())), options)
        sets = [replace(inputs, pairs=own) for own in pairs.values()]
        if left_out:
            reasons = [f"{name} ({reason})" for name, reason in left_out.items()]
            warnings.insert(0, f"Only cases that all have are compared. Left out: {listed(reasons)}.")
        evaluations = _evaluate_sets(sets, reference, options, warnings, count_of(on_progress))
        viewers = [_viewer(*one, options) for one in zip(evaluations, sets, strict=True)]
    on_files = _on_files(said)
    evaluations = [replace(one, warnings=(*one.warnings, *on_files)) for one in evaluations]
    named = dict(zip(folders, evaluations, strict=True))
    paths = {name: str(path) for name, path in folders.items()}
    differences = compare(named)
    intervals = [one.difference for one in differences]
    for evaluation in evaluations:
        intervals += chain.from_iterable(
            evaluation.means[one.name].values() for one in evaluation.metrics if one.compared
        )
    said_of_all = (*warnings, *on_files, *rough(intervals, evaluations[0].unit))
    result = Comparison(named, paths, differences, left_out, said_of_all)
    # All are made before the first is written: a file that cannot be used leaves nothing behind.
    files = {
        output / name: _files(evaluation, shown, one, output / name, options)
        for (name, evaluation), shown, one in zip(named.items(), viewers, sets, strict=True)
    }
    pages = {name: f"{quote(name)}/report.html" for name in named}
    page = comparison_page(result, pages=pages, command=options.command)
    files[output] = {"comparison.json": comparison_json(result), "report.html": page}
    for folder, contents in files.items():
        write_files(folder, contents)
    return result


def _refuse_replacing(outputs: Sequence[Path], options: EvaluateOptions) -> None:
    """UsageError if `cases.csv` would replace a table that is given, or another one of that name."""
    given = [path for path in (options.patients, options.strata[0] if options.strata else None) if path is not None]
    for path in (output / "cases.csv" for output in outputs):
        if path.resolve() in [one.resolve() for one in given]:
            raise UsageError(f"{path}: the results would replace this table, which is read; give -o another folder")
        require_table(path, FIRST_COLUMNS)


def _viewer(result: Evaluation, inputs: _Inputs, options: EvaluateOptions) -> Viewer | None:
    """The page's viewer; None without a case to show."""
    shown = viewed_cases(result, inputs.pairs, inputs.images, inputs.maps, options.view)
    return viewer(shown) if shown else None


def _files(
    result: Evaluation, shown: Viewer | None, inputs: _Inputs, output: Path, options: EvaluateOptions
) -> dict[str, str]:
    """The files of one set of predictions in the folder ``output``: name -> content. ``shown`` is the viewer."""
    report = evaluation_page(
        result,
        shown,
        links={pair.name: relative_link(pair.prediction, output) for pair in inputs.pairs},
        command=options.command,
    )
    return {"summary.json": summary_json(result), "cases.csv": cases_csv(result), "report.html": report}


def _on_files(said: Iterable[str]) -> list[str]:
    """One sentence for each fact about files, with the names of all: a folder of masks may share the same fault."""
    names: dict[str, list[str]] = {}
    for text in said:
        name, _, fact = text.partition(": ")
        names.setdefault(fact, []).append(name)
    return [f"{listed(files)}: {fact}." for fact, files in names.items()]


def _set_names(paths: Sequence[Path]) -> dict[str, Path]:
    """A name for each set of predictions: the end of its path, as short as it is unique; then the path."""
    if len(paths) < 2:
        raise UsageError("a comparison needs two sets of predictions or more")
    # Without "..", which as a name would leave the folder of the results.
    full = [Path(os.path.abspath(path)) for path in paths]
    parts = [[*path.parts[1:-1], path.name if path.is_dir() else scan_name(path)] for path in full]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["_".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return dict(zip(names, paths, strict=True))
    raise UsageError(f"the same predictions twice among {', '.join(map(str, paths))}")


# ---- all cases ---------------------------------------------------------------------------------------------------


def _evaluate_sets(
    sets: Sequence[_Inputs],
    reference: Path,
    options: EvaluateOptions,
    warnings: list[str],
    on_progress: OnCount,
) -> list[Evaluation]:
    """The evaluation of each set of predictions. Further warnings on all of them are appended to ``warnings``."""
    pairs = [pair for one in sets for pair in one.pairs]
    masks = [pair.reference for pair in sets[0].pairs] + [pair.prediction for pair in pairs]
    # Merged labels are another class than those of the files; and names that were all given need no file.
    given = isinstance(options.labels, Mapping) and bool(options.labels) and all(options.labels.values())
    known, remarks = ({}, []) if options.merge_labels or given else class_names(masks)
    warnings += remarks
    requested = _label_names(options.labels, known)
    how = _measure_options(options, requested or known)
    measured = call_each(
        measure_case,
        [CaseTask(pair, tuple(requested), how) for pair in pairs],
        options.jobs,
        lambda done: on_progress("cases", done, len(pairs)),
    )
    labels, remarks = _evaluated_labels(requested, known, measured, reference, scored=sets[0].maps is not None)
    warnings += remarks
    if unused := sorted(set(how.tolerances_mm) - set(labels)):
        warnings.append(f"Tolerances of labels that are not evaluated: {listed(unused)}.")
    rated = _rated_cases(sets, tuple(labels), options.jobs, on_progress)
    for case in (*measured, *rated):
        for text in case.remarks if case is not None else ():
            remark(text)
    evaluations, remaining = [], iter(zip(measured, rated, strict=True))
    for inputs in sets:
        own = [(pair, *next(remaining)) for pair in inputs.pairs]
        cases = [
            EvaluatedCase(
                name=pair.name,
                prediction_file=str(pair.prediction),
                reference_file=str(pair.reference),
                results=result.results_of(labels, how),
                spacing_mm=result.spacing_mm,
                reliability=result.reliability,
                agreement=None if raters is None else raters.agreement,
            )
            for pair, result, raters in own
        ]
        detection, remarks = _detect(inputs, cases, labels, options)
        evaluations.append(
            summarise(
                cases,
                labels,
                how=how,
                detection=detection,
                patients=inputs.patients,
                strata=inputs.strata,
                seed=options.seed,
                warnings=[*warnings, *(result.unused for _, result, _ in own if result.unused), *remarks],
            )
        )
    return evaluations


def _rated_cases(
    sets: Sequence[_Inputs], labels: tuple[int, ...], jobs: int | None, on_progress: OnCount
) -> list[RatedCase | None]:
    """For each case of each set, its samples compared with the raters; None without further raters."""
    tasks = [
        RatersTask(pair, tuple(rater[pair.name] for rater in inputs.raters if pair.name in rater), labels)
        for inputs in sets
        for pair in inputs.pairs
    ]
    rated = [task for task in tasks if task.raters]
    results = iter(call_each(compare_with_raters, rated, jobs, lambda done: on_progress("raters", done, len(rated))))
    return [next(results) if task.raters else None for task in tasks]


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
    strata: tuple[str, str, Mapping[str, str]] | None


def _find_inputs(pairs: Sequence[MaskPair], options: EvaluateOptions) -> tuple[_Inputs, list[str]]:
    """The further files of the cases, and remarks on those that are not used."""
    images = find_backgrounds(Path(options.images), pairs) if options.images is not None else {}
    raters = [find_rater(Path(path), pairs) for path in options.raters]
    _require_distinct(pairs, list(zip(options.raters, raters, strict=True)))
    names = {pair.name for pair in pairs}
    require_cases(options.view, names)
    remarks = [
        f"No case of this rater is evaluated: {path}."
        for path, rater in zip(options.raters, raters, strict=True)
        if not names & set(rater)
    ]
    if any(is_image(pair.reference) for pair in pairs):
        remarks.append(
            "Image files have no voxel size: a pixel counts as 1 x 1 x 1 mm. Distances are in pixels, and volumes are "
            "areas in thousands of pixels."
        )
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
    strata = None
    if options.strata is not None:
        file, column = options.strata
        strata = str(file), column, read_strata(Path(file), column, names, patients)
    return _Inputs(pairs, images, raters, maps, foregrounds, patients, strata), remarks


def _require_distinct(pairs: Sequence[MaskPair], raters: Sequence[tuple[Path, Mapping[str, Path]]]) -> None:
    """UsageError for a rater whose mask is the file of the reference or of another rater: it would count twice."""
    for pair in pairs:
        known = {pair.reference.resolve(): "the reference"}
        for path, masks in raters:
            if pair.name not in masks:
                continue
            mask = masks[pair.name].resolve()
            if mask in known:
                raise UsageError(
                    f"--rater {path}: its mask of {pair.name} is that of {known[mask]}; name each rater once"
                )
            known[mask] = f"--rater {path}"


# ---- labels ------------------------------------------------------------------------------------------------------


def _label_names(labels: Mapping[int, str] | Sequence[int] | None, known: Mapping[int, str]) -> dict[int, str]:
    """Label value -> class name of the requested labels in ascending order; empty if none are requested."""
    names = dict(labels) if isinstance(labels, Mapping) else dict.fromkeys(labels or (), "")
    return {int(label): names[label] or known.get(label, f"label {label}") for label in sorted(names)}


def _measure_options(options: EvaluateOptions, names: Mapping[int, str]) -> MeasureOptions:
    """The options of the metrics, with a label for each class that has a tolerance of its own."""
    tolerances: dict[int, float] = {}
    for key, tolerance in options.tolerances_mm.items():
        labels = [label for label, name in names.items() if name == key]
        if not labels and not key.isdecimal():
            raise UsageError(
                f"a tolerance of {key!r}, but no class has this name; the names known are "
                f"{listed(list(names.values())) or 'none'}; give the label's number instead"
            )
        tolerances |= dict.fromkeys(labels or [int(key)], tolerance)
    return MeasureOptions(options.tolerance_mm, tolerances, options.lesion_overlap, options.cldice)


def _evaluated_labels(
    requested: Mapping[int, str],
    known: Mapping[int, str],
    cases: Sequence[MeasuredCase],
    reference: Path,
    *,
    scored: bool,
) -> tuple[dict[int, str], list[str]]:
    """Label value -> class name of what is evaluated, and remarks on labels that are left out or absent."""
    results = [item for case in cases for item in case.results.items()]
    predicted = {label for label, result in results if result.overlap.n_pred}
    expected = {label for label, result in results if result.overlap.n_ref}
    present = predicted | expected
    # With score maps, scans without lesions in which nothing is predicted are a result, too.
    default = present or ({1} if scored else set())
    names = dict(requested) or {label: known.get(label, f"label {label}") for label in sorted(default)}
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
