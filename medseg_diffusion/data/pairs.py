"""Pairs the files of an evaluation by case: predictions with references, and the further files of each case.

Two files are one pair, whatever their names. Files in folders are paired by name: `case_seg.nii.gz` (or
`case_anomaly_mask.nii.gz`), else `case.nii.gz`, is the mask of `case`. DICOM segmentations are masks like any other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from medseg_diffusion.errors import InputError, listed, remark
from medseg_diffusion.volumes.inputs import dicom_segmentations, scan_files
from medseg_diffusion.volumes.io import maker_of, read_labels
from medseg_diffusion.volumes.outputs import ANOMALY, MASKS, RESULTS, SEGMENTATION
from medseg_diffusion.volumes.paths import SUFFIXES, is_series, scan_name
from medseg_diffusion.volumes.volume import Volume


@dataclass(frozen=True)
class MaskPair:
    """The predicted and the reference mask of one case.

    Attributes:
        name: The case's name, without folder, suffix and the ending of a mask.
        prediction: The predicted label map.
        reference: The reference label map.
        merged: All labels above 0 are read as label 1.
    """

    name: str
    prediction: Path
    reference: Path
    merged: bool = False

    def read(self) -> tuple[Volume, Volume]:
        """Prediction and reference, with the axes of the reference.

        DICOM segmentations may hold a part of their scan's grid. Two of them are compared where either has voxels.

        Raises:
            InputError: A file that cannot be used, or two different grids.
        """
        prediction, reference = self.read_labels(self.prediction), self.read_labels(self.reference)
        reference = reference.covering(prediction)
        return reference.aligned(prediction), reference

    def read_labels(self, path: Path) -> Volume:
        """Any label map of this case, merged if the pair's masks are.

        Raises:
            InputError: A file that cannot be used.
        """
        volume = read_labels(path)
        return volume.like(volume.data.clamp(max=1)) if self.merged else volume

    def companion(self, output: str) -> Path | None:
        """The ``output`` (a key of `SEGMENTATION`) that `medseg segment` wrote beside the prediction, else None.

        A file of another model than the prediction's is that of an earlier call: a remark says that it is not used.
        """
        ending = scan_name(SEGMENTATION[output])
        for suffix in SUFFIXES:
            path = self.prediction.with_name(_case_name(scan_name(self.prediction)) + ending + suffix)
            if path.is_file():
                if maker_of(path) == maker_of(self.prediction):
                    return path
                remark(f"{path}: not of the model that made the mask beside it, so it is not used")
        return None


def find_pairs(prediction: Path, reference: Path, *, merged: bool = False) -> tuple[list[MaskPair], list[str]]:
    """Pair predictions with references.

    Args:
        prediction: A label map or a folder of them. A single one takes its own reference from a folder.
        reference: A label map or a folder of them.
        merged: All labels above 0 are read as label 1.

    Returns:
        The pairs, sorted by case name, and a sentence on predictions without a reference, if there are any.

    Raises:
        InputError: A path that does not exist, a folder without masks, two files for one case, or a reference without a
            prediction.
    """
    predictions, references = find_masks(prediction), find_masks(reference)
    if not prediction.is_dir() and not reference.is_dir():
        (name,) = references
        return [MaskPair(name, prediction, reference, merged)], []
    if not prediction.is_dir():
        references = {name: path for name, path in references.items() if name in predictions}
        if not references:
            raise InputError(
                reference,
                f"no reference for {', '.join(predictions)}",
                "a file of that name",
                "pass the reference itself",
            )
    if missing := [name for name in references if name not in predictions]:
        raise InputError(
            prediction,
            f"no prediction for {listed(missing)} ({len(missing)} of {len(references)} references)",
            "one prediction for each reference",
            "segment these cases too, or take their references out",
        )
    extra = [name for name in predictions if name not in references]
    remarks = [f"Predictions without a reference, not evaluated: {listed(extra)}."] if extra else []
    return [MaskPair(name, predictions[name], path, merged) for name, path in sorted(references.items())], remarks


def find_common_pairs(
    predictions: Mapping[str, Path], reference: Path, *, merged: bool = False
) -> tuple[dict[str, list[MaskPair]], dict[str, str]]:
    """Pair several sets of predictions with the same references. Only cases that all have are paired.

    Args:
        predictions: Name of a set -> a label map or a folder of them.
        reference: A label map or a folder of them. If all are single files, they are one case, whatever their names.
        merged: All labels above 0 are read as label 1.

    Returns:
        Name of a set -> its pairs, sorted by case name, of the same cases for each set; and case name -> why it is left
        out.

    Raises:
        InputError: As `find_masks`, or no case that all have.
    """
    references = find_masks(reference)
    if not any(path.is_dir() for path in (reference, *predictions.values())):
        (name,) = references
        masks = {one: {name: path} for one, path in predictions.items() if find_masks(path)}
    else:
        masks = {one: find_masks(path) for one, path in predictions.items()}
    left_out = {}
    for name in sorted(set(references).union(*masks.values())):
        lacking = [one for one, files in masks.items() if name not in files]
        if name not in references:
            left_out[name] = "no reference"
        elif lacking:
            left_out[name] = f"no prediction in {', '.join(lacking)}"
    common = sorted(set(references) - set(left_out))
    if not common:
        raise InputError(
            reference,
            f"no case that {', '.join(map(str, predictions.values()))} all have a prediction for",
            "at least one case in common",
            "give predictions the names of their references",
        )
    pairs = {
        one: [MaskPair(name, files[name], references[name], merged) for name in common] for one, files in masks.items()
    }
    return pairs, left_out


def find_masks(path: Path) -> dict[str, Path]:
    """Case name -> label map, for a file or a folder.

    If `case_seg` or `case_anomaly_mask` lies beside `case`, then `case` is the scan.

    Raises:
        InputError: A path that does not exist, a folder without masks, or two files for one case.
    """
    if not path.exists():
        raise InputError(path, "no such file or folder", "a label map or a folder of them", "check the path")
    if not path.is_dir():
        return {_case_name(scan_name(path)): path}
    files = _files([*scan_files(path), *dicom_segmentations(path)])
    candidates = {name: file for name, file in files.items() if name.endswith(MASKS) or not name.endswith(RESULTS)}
    masks: dict[str, Path] = {}
    for name, file in candidates.items():
        if not name.endswith(MASKS) and any(name + ending in candidates for ending in MASKS):
            continue
        case = _case_name(name)
        if case in masks:
            raise InputError(
                path,
                f"two masks of the case {case}, {masks[case].name} and {file.name}",
                "one mask for each case",
                "move the masks of one kind into a folder of their own",
            )
        masks[case] = file
    if not masks:
        raise InputError(
            path,
            "a folder without label maps",
            f"files that end with {', '.join(SUFFIXES)}, or DICOM segmentations",
            "check it",
        )
    return masks


def find_rater(path: Path, pairs: Sequence[MaskPair]) -> dict[str, Path]:
    """Case name -> label map of a further rater. A single case takes a file of any name.

    Raises:
        InputError: As `find_masks`.
    """
    if path.is_file() and len(pairs) == 1:
        return {pairs[0].name: path}
    return find_masks(path)


def find_backgrounds(path: Path, pairs: Sequence[MaskPair]) -> dict[str, Path]:
    """Case name -> scan, for the cases that have one. nnU-Net's first channel, `case_0000`, also counts as the scan.

    Args:
        path: A scan or a folder of scans. A single case takes a scan of any name, and the folder of a DICOM series.
        pairs: The cases.

    Raises:
        InputError: A path that does not exist, two files of one name, or no scan of any case.
    """
    if not path.exists():
        raise InputError(path, "no such file or folder", "a scan or a folder of scans", "check the path")
    if len(pairs) == 1 and (not path.is_dir() or is_series(path)):
        return {pairs[0].name: path}
    files = _files(scan_files(path)) if path.is_dir() else {scan_name(path): path}
    found = {pair.name: files.get(pair.name) or files.get(f"{pair.name}_0000") for pair in pairs}
    scans = {name: file for name, file in found.items() if file is not None}
    if not scans:
        name = pairs[0].name
        raise InputError(
            path, "no scan of any case", f"scans named as the cases, {name} or {name}_0000", "check the folder"
        )
    return scans


def find_for_each(path: Path, pairs: Sequence[MaskPair], endings: Sequence[str], kind: str) -> dict[str, Path]:
    """Case name -> file, for every case.

    Args:
        path: A file or a folder. A single case takes a file of any name.
        pairs: The cases.
        endings: Endings of the names; the file of a case is the first `NAME` + ending that exists.
        kind: What the files are, for messages.

    Raises:
        InputError: A path that does not exist, two files of one name, or a case without a file.
    """
    if not path.exists():
        raise InputError(path, "no such file or folder", f"a {kind} or a folder of them", "check the path")
    if not path.is_dir() and len(pairs) == 1:
        return {pairs[0].name: path}
    files = _files(scan_files(path)) if path.is_dir() else {scan_name(path): path}
    matches = {
        pair.name: next((files[pair.name + end] for end in endings if pair.name + end in files), None) for pair in pairs
    }
    if missing := [name for name, file in matches.items() if file is None]:
        raise InputError(
            path,
            f"no {kind} for {listed(missing)} ({len(missing)} of {len(pairs)} cases)",
            f"one {kind} for each case: {', '.join(f'NAME{ending}' for ending in endings)}",
            "make these too, or take the cases out",
        )
    return {name: file for name, file in matches.items() if file is not None}


def find_foregrounds_beside(maps: Mapping[str, Path]) -> dict[str, Path] | None:
    """Case name -> foreground mask that `medseg anomaly` wrote beside the score map; None unless every case has one."""
    ending = ANOMALY["map"]
    foregrounds = {
        name: path.with_name(path.name.removesuffix(ending) + ANOMALY["foreground"]) for name, path in maps.items()
    }
    return foregrounds if all(path.is_file() for path in foregrounds.values()) else None


def _case_name(name: str) -> str:
    for ending in MASKS:
        name = name.removesuffix(ending)
    return name


def _files(paths: Iterable[Path]) -> dict[str, Path]:
    """Name without suffix -> file."""
    files: dict[str, Path] = {}
    for path in paths:
        name = scan_name(path)
        if name in files:
            raise InputError(path, f"the same name as {files[name].name}", "one file per case", "take one of them out")
        files[name] = path
    return files
