"""The files that the commands write for a scan: their endings, their paths, and the check that none collide."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Literal, get_args

from medseg_diffusion.errors import UsageError
from medseg_diffusion.files import require_folder

from .paths import SUFFIXES, UNREAD_SUFFIXES, VOLUME_SUFFIXES, is_image, is_series, refuse_scan_name, scan_name

Outputs = dict[str, Path]
"""Kind of output -> its file."""
Format = Literal["nifti", "dicom-seg"]
"""File format of a mask: "nifti" stands for all formats of volumes and, for image files, PNG."""

SEGMENTATION = {
    "segmentation": "_seg.nii.gz",
    "probabilities": "_prob.nii.gz",
    "uncertainty": "_uncertainty.nii.gz",
    "members": "_members.nii.gz",
    "pseudo-labels": "_pseudo.nii.gz",
    "preview": "_preview.png",
    "statistics": "_statistics.json",
    "label-table": "_dseg.tsv",
}
"""File endings of `medseg segment`. The segmentation of an image file is `MASK_OF_IMAGE` instead."""
ANOMALY = {
    "mask": "_anomaly_mask.nii.gz",
    "map": "_anomaly.nii.gz",
    "foreground": "_anomaly_foreground.nii.gz",
    "scores": "_anomaly.json",
    "counterpart": "_anomaly_counterpart.nii.gz",
    "preview": "_anomaly_preview.png",
}
"""File endings of `medseg anomaly`."""
SAMPLES = {"options": "samples.json", "grid": "grid.png", "reference": "reference.png"}
"""Files of `medseg sample` beside its samples: how they were made, the first of them, and real images beside them."""
MASK_OF_IMAGE = "_seg.png"
"""File ending of the segmentation of an image without geometry."""
DICOM_SEGMENTATION = "_seg.dcm"
"""File ending of the segmentation in the format "dicom-seg"."""
MASKS = tuple(scan_name(ending) for ending in (SEGMENTATION["segmentation"], ANOMALY["mask"]))
"""Endings of the names of masks, without suffix."""
_OTHER_FORMATS = (*UNREAD_SUFFIXES, ".dcm", ".gz", ".bz2", ".zip")
"""Formats that a file given with -o may be meant to have, but does not get."""
_ENDINGS = (*SEGMENTATION.values(), *ANOMALY.values())
RESULTS = tuple(scan_name(ending) for ending in _ENDINGS if ending.endswith(VOLUME_SUFFIXES))
"""Endings of the names of all volumes that the commands write for a scan, without suffix."""


def format_of_masks(output: Path | None, wanted: Format | None) -> Format:
    """The format of the masks: the one that is wanted, or that of the file ``output``, or NIfTI.

    Raises:
        UsageError: an unknown format, or a file of one format where another one is wanted.
    """
    if wanted not in (None, *get_args(Format)):
        raise UsageError(f"output_format {wanted!r} is unknown; use {', '.join(get_args(Format))}")
    suffix = "" if output is None else output.name.lower()
    if suffix.endswith(".dcm"):
        if wanted == "nifti":
            raise UsageError(f"-o {output}: --format nifti does not write .dcm; leave one of the two out")
        return "dicom-seg"
    if wanted == "dicom-seg" and suffix.endswith(SUFFIXES):
        raise UsageError(f"-o {output}: --format dicom-seg writes .dcm; give a file of this name, or a folder")
    return wanted or "nifti"


def is_output_file(output: Path) -> bool:
    """Whether -o names the file of a mask or map, not a folder."""
    return output.name.lower().endswith((*SUFFIXES, ".dcm"))


def segmentation_outputs(scan: Path, output: Path | None, count: int, mask_format: Format = "nifti") -> Outputs:
    """The output files of a segmented scan.

    Args:
        scan: the scan.
        output: file of the mask, a folder, or None for the scan's own folder. The other outputs lie beside the mask.
        count: number of scans in the call.
        mask_format: format of the mask (`format_of_masks`).

    Raises:
        UsageError: a file for several scans, or a file format that cannot hold the mask.
    """
    if mask_format == "dicom-seg":
        return _with_dicom_mask(scan, output, count)
    if not _is_file(output, scan, count, "mask"):
        ending = MASK_OF_IMAGE if is_image(scan) else SEGMENTATION["segmentation"]
        return {**_beside(scan, output, SEGMENTATION), "segmentation": _named(scan, output, ending)}
    assert output is not None
    base = output.parent / scan_name(output).removesuffix(scan_name(SEGMENTATION["segmentation"]))
    # In BIDS, sub-1_dseg.tsv is of sub-1_dseg.nii.gz.
    table = base.with_name(base.name.removesuffix("_dseg") + SEGMENTATION["label-table"])
    return {**_ended(base, SEGMENTATION), "segmentation": output, "label-table": table}


def _with_dicom_mask(scan: Path, output: Path | None, count: int) -> Outputs:
    if output is None or not output.name.lower().endswith(".dcm"):
        return {**_beside(scan, output, SEGMENTATION), "segmentation": _named(scan, output, DICOM_SEGMENTATION)}
    if count > 1:
        raise UsageError(f"-o {output} is a file, but there are {count} scans; give a folder")
    base = output.with_name(output.name[: -len(".dcm")].removesuffix("_seg"))
    return {**_ended(base, SEGMENTATION), "segmentation": output}


def anomaly_outputs(scan: Path, output: Path | None, count: int) -> Outputs:
    """The output files of a scored scan; ``output`` is the file of the map, a folder, or None for the scan's folder.

    Raises:
        UsageError: a file for several scans, or a file format that cannot hold the map.
    """
    if not _is_file(output, scan, count, "score map"):
        return _beside(scan, output, ANOMALY)
    assert output is not None
    base = output.parent / scan_name(output).removesuffix(scan_name(ANOMALY["map"]))
    return {**_ended(base, ANOMALY), "map": output}


def labelled_outputs(scan: Path, folder: Path) -> Outputs:
    """The files of a scan in a labelled folder: images/NAME.nii.gz and labels/NAME.nii.gz."""
    return {kind: folder / kind / f"{scan_name(scan)}.nii.gz" for kind in ("labels", "images")}


def refuse_collisions(outputs: Mapping[Path, Outputs], inputs: Collection[Path] = ()) -> None:
    """UsageError if a result cannot be written, or would overwrite a scan or another result, or join a DICOM series.

    Args:
        outputs: the files of each scan.
        inputs: further files that are read, such as those of channels.
    """
    read = {place for path in (*outputs, *inputs) for place in _places(path)}
    owners: dict[Path, Path] = {}
    # Folders are resolved once: 100,000 scans have 800,000 results.
    parents = {path.parent for files in outputs.values() for path in files.values()}
    folders = {folder: folder.resolve() for folder in parents}
    for folder in folders:
        require_folder(folder)
        if is_series(folder):
            raise UsageError(f"{folder}: holds a DICOM series, which results must not join; give -o another folder")
    for scan, files in outputs.items():
        targets = [folders[path.parent] / path.name for path in files.values()]
        if lost := [target for target in targets if target in read]:
            which = "the scan" if _places(scan) & set(lost) else f"the scan {lost[0]}"
            raise UsageError(f"{scan}: the result would overwrite {which}; give -o another name")
        # An image and a volume of the same name have masks with different suffixes, but the same map files.
        for target in targets:
            if target in owners:
                raise UsageError(
                    f"{owners[target]} and {scan} would both be written to {target}; segment them apart, "
                    "or name their folder with --pattern, which keeps subfolders"
                )
            owners[target] = scan


def _places(path: Path) -> set[Path]:
    """Where a file lies, and where its link lies if it is one: neither may be overwritten."""
    return {path.resolve(), path.parent.resolve() / path.name}


def require_report(report: Path, scans: Collection[Path]) -> None:
    """UsageError if a report on a run cannot be written, would overwrite a scan or join a DICOM series, or is named
    like a scan.
    """
    require_folder(report.parent)
    if report.is_dir():
        raise UsageError(f"{report}: is a folder; give the report the name of a file")
    if _places(report) & {place for scan in scans for place in _places(scan)}:
        raise UsageError(f"{report}: the report would overwrite the scan; give it another name")
    if is_series(report.parent):
        raise UsageError(f"{report.parent}: holds a DICOM series, which results must not join; choose another folder")
    refuse_scan_name(report)


def _is_file(output: Path | None, scan: Path, count: int, result: Literal["mask", "score map"]) -> bool:
    """Whether ``output`` names a file; UsageError for a format that is not written, or several scans."""
    name = "" if output is None else output.name.lower()
    suffix = next((one for one in (*SUFFIXES, *_OTHER_FORMATS) if name.endswith(one)), None)
    if suffix is None:
        return False
    as_picture = result == "mask" and is_image(scan)
    if suffix not in VOLUME_SUFFIXES and not (as_picture and suffix == ".png"):
        formats = ".png or .nii.gz" if as_picture else ".nii.gz"
        raise UsageError(f"-o {output}: the {result} of {scan.name} is not written as {suffix}; use {formats}")
    if count > 1:
        raise UsageError(f"-o {output} is a file, but there are {count} scans; give a folder")
    return True


def _named(scan: Path, folder: Path | None, ending: str) -> Path:
    # The folder "." is beside nothing by its name.
    beside = scan.resolve().parent if scan.name in ("", "..") else scan.parent
    return (beside if folder is None else folder) / f"{scan_name(scan)}{ending}"


def _beside(scan: Path, folder: Path | None, endings: Mapping[str, str]) -> Outputs:
    return _ended(_named(scan, folder, ""), endings)


def _ended(base: Path, endings: Mapping[str, str]) -> Outputs:
    return {kind: base.with_name(f"{base.name}{ending}") for kind, ending in endings.items()}
