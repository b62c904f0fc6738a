"""`medseg segment`: segment scans and write masks, maps, previews, statistics and a report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medseg_diffusion.data.mask_examples import require_slices
from medseg_diffusion.device import keep_freed_memory
from medseg_diffusion.diffusion.noise import derive_seed
from medseg_diffusion.errors import InputError, UsageError
from medseg_diffusion.files import as_paths, write_files, write_json
from medseg_diffusion.methods.ensemble import Fusion, Uncertainty
from medseg_diffusion.models.classes import chosen_classes, classes_of, tissues_of
from medseg_diffusion.models.load import DEFAULT_SEGMENTER, load_segmenter
from medseg_diffusion.models.segmentation import Map, Segmentation, SegmentationModel
from medseg_diffusion.models.store import load_card, model_input
from medseg_diffusion.reports.preview import preview_png
from medseg_diffusion.training.progress import OnProgress, silent
from medseg_diffusion.volumes.dicom_seg import Algorithm, Segment, SegmentationFile, require_series
from medseg_diffusion.volumes.io import maker_of, upright, write_labels, write_map
from medseg_diffusion.volumes.label_table import Label, LabelTable
from medseg_diffusion.volumes.outputs import (
    Format,
    Outputs,
    format_of_masks,
    refuse_collisions,
    segmentation_outputs,
)
from medseg_diffusion.volumes.paths import is_image
from medseg_diffusion.volumes.sources import InputOptions, Source, find_sources, read_source
from medseg_diffusion.volumes.volume import Volume

from .finished import columns_of, doubts_about, finished_segmentation, numbers_of
from .label_files import LabelFiles, as_segments
from .results_table import ResultsTable, table_path
from .run_report import RunReport
from .scans import (
    Scan,
    ScanResult,
    Work,
    each_scan,
    of_part,
    part_of,
    paths_of,
    refuse_foreign,
    say_lacking,
    telling,
)
from .segment_report import SegmentReport
from .segmentation_statistics import segmentation_statistics
from .viewed import refuse_report

_MAPS = ("probabilities", "uncertainty", "members")  # not pseudo-labels, which may be corrected by hand
IGNORED = 255
"""Value of pseudo-labels that are too uncertain to train on."""


@dataclass(frozen=True)
class SegmentOptions:
    """Options of `segment`; None takes the model's own default.

    Attributes:
        model: Model folder, run folder or installed name; None takes the built-in model.
        output: File (one scan) or folder; None writes next to each scan.
        ensemble: Number of sampled masks.
        steps: Steps of the sampler.
        sampler: "ddpm", "ddim", "dpm++", "euler" or "heun".
        fusion: How members become one mask: "mean", "majority" or "staple".
        seed: Seed of all randomness; every scan derives its seed from this and its name.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        save_probabilities: Write *_prob.nii.gz, channels last.
        save_uncertainty: Write *_uncertainty.nii.gz.
        uncertainty: Kind of that map: "entropy" (of the mean, 0 to 1), "mutual-information" (the members' disagreement,
            on the same scale) or "variance" (of the foreground's probability over members).
        save_members: Write *_members.nii.gz, the mask of every member, channels last.
        save_pseudo_labels: Write *_pseudo.nii.gz, labels to train on for scans without labels. It is the mask, with
            `IGNORED` where members disagree more than ``max_disagreement``.
        max_disagreement: Largest mutual information of the members, 0 to 1 (`Ensemble.uncertainty`).
        statistics: Write *_statistics.json.
        volumes: Write the volumes of all scans to one table beside the masks (`results_table.table_path`).
        preview: Write *_preview.png.
        report: Write one HTML page about all scans to this file.
        command: The command line, for the page; empty shows none.
        run_report: Write a report on the run to this file, as JSON (`workflows.run_report`).
        skip_existing: Skip scans whose mask exists. A remark counts those that lack other files that are asked for.
        shard: (i, n) with 1 <= i <= n: segment only part i of the scans, chosen by a hash of the path. Each part has
            its own table, page, report on the run and list of failures: report.1-of-4.html.
        failures: CSV file of the scans that fail (`each_scan`). A single scan writes none.
        output_format: Format of the mask: "nifti" (or the format of the file ``output``), or "dicom-seg", which refers
            to the images of a DICOM series. None takes that of the file ``output``, or "nifti".
        inputs: What is read: pattern, channels, DICOM series.
        fast: One step and one mask, as far as the model has both.
        keep_largest: Keep only the largest connected part of the foreground.
        max_memory: Most memory of the process in GB, by an estimate; None for no limit.
        compile: Compile the network; masks differ by rounding.
        labels: The classes that all outputs tell of: names and values (`models.classes.chosen_classes`); None for all.
            Values in the mask stay those of the model, and every voxel has the class that it has without a choice.
            Uncertainty, disagreement and quality are those of the whole segmentation.
        tissues: Tissues instead of the model's classes, if its card groups them.
    """

    model: str | None = None
    output: Path | None = None
    ensemble: int | None = None
    steps: int | None = None
    sampler: str | None = None
    fusion: Fusion = "mean"
    seed: int = 0
    device: str = "auto"
    save_probabilities: bool = False
    save_uncertainty: bool = False
    uncertainty: Uncertainty = "entropy"
    save_members: bool = False
    save_pseudo_labels: bool = False
    max_disagreement: float = 0.1
    statistics: bool = False
    volumes: bool = False
    preview: bool = False
    report: Path | None = None
    command: str = ""
    run_report: Path | None = None
    skip_existing: bool = False
    shard: tuple[int, int] | None = None
    failures: Path | None = None
    output_format: Format | None = None
    inputs: InputOptions = InputOptions()
    fast: bool = False
    keep_largest: bool | None = None
    max_memory: float | None = None
    compile: bool = False
    labels: str | Sequence[str | int] | None = None
    tissues: bool = False

    def __post_init__(self) -> None:
        as_paths(self, "output", "report", "run_report", "failures")


def segment(
    scans: str | Path | Sequence[str | Path],
    options: SegmentOptions = SegmentOptions(),
    on_case: Callable[[ScanResult], None] | None = None,
    on_progress: OnProgress = silent,
) -> list[ScanResult]:
    """Segment scans and write the results. A scan that fails does not stop the others.

    The mask is written last, so that a scan with a mask is finished.

    Args:
        scans: One or more files, lists and folders (`volumes.sources.find_sources`).
        options: The options.
        on_case: Called after every scan.
        on_progress: Called with the scan's name, after "3 of 8: " if there are several, and the share done, 0 to 1.

    Raises:
        UsageError: Contradictory options, two scans with the same output, a DICOM segmentation of a scan that is no
            DICOM, a class that the model does not have, a table of other classes in the folder of the masks, a file in
            the place of a mask that medseg did not write, or a page about image files and volumes.
        InputError: A path that does not exist, or a folder without scans.
        ModelError: No usable model.
    """
    if options.fast and (options.steps, options.ensemble) != (None, None):
        raise UsageError("--fast stands for --steps 1 --ensemble 1; leave --steps and --ensemble out")
    takes = model_input(options.model or DEFAULT_SEGMENTER)
    sources = {source.path: source for source in find_sources(paths_of(scans), takes, options.inputs)}
    files = {path: source.files for path, source in sources.items()}
    outputs = _outputs(sources, options)
    report, run_json = (of_part(file, options.shard) for file in (options.report, options.run_report))
    refuse_report(report, run_json, files)
    if report is not None:
        _refuse_two_units(report, list(sources))
    names = _classes(options)
    ours = part_of(outputs, options.shard)
    if options.skip_existing:
        say_lacking(ours, "segmentation", _extras(options))
    else:
        refuse_foreign(each["segmentation"] for each in ours.values())
    masks = {path: each["segmentation"] for path, each in outputs.items()}
    folder = None if len(sources) == 1 else options.output
    file = table_path("volumes", list(masks.values()), folder, options.shard) if options.volumes else None
    label_files = LabelFiles(names, list(masks.values()), folder)

    def load() -> SegmentationModel:
        model = _load(options)
        settings = _settings(model, options, names)
        run_report.uses(model.saved, model.device, settings)
        page.uses(model.saved, {**settings, "device": str(model.device)})
        return model

    def read(path: Path) -> Volume:
        return read_source(sources[path], takes, options.inputs.series)

    with (
        RunReport(run_json, "segment", options, files) as run_report,
        SegmentReport(report, names, read, options.command, len(ours)) as page,
        # First at the end: a page takes a while.
        ResultsTable(file, columns_of(names), numbers_of, {path: masks[path] for path in ours}) as table,
    ):
        work = Work(
            run_report.timed(read),
            load,
            lambda model, scan: partial(
                _write_results, model, scan, options, _segment_one(model, scan, options, label_files), label_files
            ),
            "segmentation",
            lambda path, files: finished_segmentation(path, files, names, table.earlier(path)),
        )
        return each_scan(
            ours,
            work,
            skip_existing=options.skip_existing,
            on_case=telling(run_report.add, table.add, page.add, on_case),
            on_progress=on_progress,
            failures=of_part(options.failures, options.shard) if len(sources) > 1 else None,
        )


def _outputs(sources: Mapping[Path, Source], options: SegmentOptions) -> dict[Path, Outputs]:
    """The files of every scan; UsageError for files that cannot be written."""
    mask_format = format_of_masks(options.output, options.output_format)
    outputs = {
        path: segmentation_outputs(source.named, source.output(options.output), len(sources), mask_format)
        for path, source in sources.items()
    }
    refuse_collisions(outputs, [file for source in sources.values() for file in source.files])
    if mask_format == "dicom-seg":
        require_series(list(sources))
    return outputs


def _refuse_two_units(report: Path, scans: Sequence[Path]) -> None:
    """UsageError for image files beside volumes: their sizes, in pixels and ml, cannot stand in one column."""
    kinds = {is_image(scan): scan.name for scan in scans}
    if len(kinds) > 1:
        raise UsageError(
            f"--report {report}: a page shows areas, of image files such as {kinds[True]}, or volumes, of scans such "
            f"as {kinds[False]}; segment them in two calls"
        )


def _classes(options: SegmentOptions) -> dict[int, str]:
    """Value -> name of the classes in the masks without background, by the model's card; empty for another card."""
    model = options.model or DEFAULT_SEGMENTER
    card = load_card(model)
    try:
        classes = classes_of(card)
    except (KeyError, ValueError, AttributeError):  # loading the model says what is wrong
        return {}
    if options.tissues:
        classes, _ = tissues_of(card, model)
    if options.labels is not None:
        return chosen_classes(classes, options.labels, model)
    return {value: name for value, name in sorted(classes.items()) if value}


def _load(options: SegmentOptions) -> SegmentationModel:
    keep_freed_memory()
    model = load_segmenter(
        options.model or DEFAULT_SEGMENTER,
        options.device,
        ensemble=options.ensemble,
        steps=options.steps,
        sampler=options.sampler,
        fusion=options.fusion,
        uncertainty=options.uncertainty,
        keep_largest=options.keep_largest,
        fast=options.fast,
        max_memory=options.max_memory,
        compile=options.compile,
        tissues=options.tissues,
    )
    if options.save_pseudo_labels and model.ensemble < 2:
        raise UsageError("pseudo-labels need members that can disagree; use --ensemble 2 or more")
    if options.save_pseudo_labels and max(model.labels) >= IGNORED:
        raise UsageError(f"pseudo-labels use {IGNORED} for voxels to ignore, but it is a class of this model")
    return model


@dataclass(frozen=True, eq=False)
class _Segmented:
    """A segmented scan, and the function that writes its mask."""

    segmentation: Segmentation
    write_mask: Callable[[Tensor], None]


def _segment_one(model: SegmentationModel, scan: Scan, options: SegmentOptions, label_files: LabelFiles) -> _Segmented:
    """Segment a scan, with the maps that are written: others would stay in memory while the next one is segmented."""
    require_fitting(scan.volume, model)
    scan.volume = scan.volume.described(model.saved.signature)
    # Refuses before the computation what cannot be written after it.
    write_mask = _mask_writer(model, scan, options, label_files)
    seed = derive_seed(options.seed, scan.name)
    segmentation = model.segment(scan.volume, seed, scan.on_progress, _maps(options), label_files.names)
    return _Segmented(segmentation, write_mask)


def _write_results(
    model: SegmentationModel, scan: Scan, options: SegmentOptions, segmented: _Segmented, label_files: LabelFiles
) -> ScanResult:
    """Write the files of a segmented scan, the mask last."""
    segmentation = segmented.segmentation
    scan.outputs["segmentation"].parent.mkdir(parents=True, exist_ok=True)
    written = _write_maps(model, scan, options, segmentation, label_files.table)
    if options.preview:
        picture = _picture(scan, segmentation, model)
        write_files(scan.outputs["preview"].parent, {scan.outputs["preview"].name: picture})
        written["preview"] = scan.outputs["preview"]
    if options.statistics:
        write_json(scan.outputs["statistics"], segmentation_statistics(scan, segmentation, model))
        written["statistics"] = scan.outputs["statistics"]
    written |= label_files.write(scan.outputs["label-table"])
    _remove_earlier_maps(scan.outputs, written)
    segmented.write_mask(segmentation.labels)
    doubts = doubts_about(
        segmentation.volumes_ml, segmentation.members_ml, segmentation.quality, segmentation.unlike_training
    )
    return ScanResult(
        scan.path,
        "done",
        {"segmentation": scan.outputs["segmentation"], **written},
        scan.seconds,
        segmentation.volumes_ml,
        segmentation.members_ml,
        segmentation.intervals_ml,
        segmentation.level,
        segmentation.quality,
        warnings=(*model.notes, *doubts.values()),
        flags=tuple(doubts),
        model=model.saved.name,
        model_sha256=model.saved.sha256,
    )


def _write_maps(
    model: SegmentationModel, scan: Scan, options: SegmentOptions, segmentation: Segmentation, table: LabelTable
) -> Outputs:
    """Write the requested maps beside the mask."""
    files, volume, written = scan.outputs, scan.volume, []
    if segmentation.probabilities is not None:
        write_map(segmentation.probabilities, volume, files["probabilities"])
        written.append("probabilities")
    if segmentation.uncertainty is not None:
        write_map(segmentation.uncertainty, volume, files["uncertainty"])
        written.append("uncertainty")
    if options.save_members:
        write_labels(model.aggregation.members_on_scan(segmentation), volume, files["members"], table)
        written.append("members")
    if segmentation.mutual_information is not None:
        doubtful = segmentation.mutual_information > options.max_disagreement
        pseudo = torch.where(doubtful, IGNORED, segmentation.labels.to(torch.uint8))
        write_labels(pseudo, volume, files["pseudo-labels"], {**table, IGNORED: Label("ignored", "#808080")})
        written.append("pseudo-labels")
    return {kind: files[kind] for kind in written}


def _remove_earlier_maps(files: Outputs, written: Outputs) -> None:
    """Remove medseg's maps of the mask that is replaced, unless they are new: they would pass for the new mask's."""
    if files["segmentation"].exists():
        for file in (files[kind] for kind in _MAPS if kind not in written):
            if maker_of(file):
                file.unlink()


def _mask_writer(
    model: SegmentationModel, scan: Scan, options: SegmentOptions, label_files: LabelFiles
) -> Callable[[Tensor], None]:
    """A function that writes the mask.

    Raises:
        InputError: A series to which a DICOM segmentation cannot refer.
    """
    path = scan.outputs["segmentation"]
    if path.suffix.lower() != ".dcm":
        return lambda mask: write_labels(mask, scan.volume, path, label_files.table)
    codes = model.config.data.codes
    segments = [
        Segment(name, **(codes[name].model_dump() if name in codes else {})) for name in label_files.names.values()
    ]
    settings = _settings(model, options, label_files.names)
    file = SegmentationFile(scan.volume, segments, Algorithm(model.saved.name, model.saved.sha256, settings))
    # DICOM numbers segments 1, 2, ...
    return lambda mask: file.write(torch.from_numpy(as_segments(mask.numpy(), label_files.names)), path)


def _settings(model: SegmentationModel, options: SegmentOptions, names: Mapping[int, str]) -> dict[str, str]:
    """The settings that change the mask, after the model's defaults."""
    return {
        **({"sampler": model.sampler_name, "steps": str(model.num_steps)} if model.samplers else {}),
        "ensemble": str(model.ensemble),
        "fusion": options.fusion,
        "seed": str(options.seed),
        **({"classes": "tissues"} if options.tissues else {}),
        **({"labels": ", ".join(names.values())} if options.labels is not None else {}),
    }


def _extras(options: SegmentOptions) -> dict[str, bool]:
    """Kind of file beside the mask -> whether the options ask for it."""
    return {
        "probabilities": options.save_probabilities,
        "uncertainty": options.save_uncertainty,
        "members": options.save_members,
        "pseudo-labels": options.save_pseudo_labels,
        "preview": options.preview,
        "statistics": options.statistics,
    }


def _maps(options: SegmentOptions) -> list[Map]:
    """The maps on the scan's grid that the options need."""
    needed: dict[Map, bool] = {
        "probabilities": options.save_probabilities,
        "uncertainty": options.save_uncertainty,
        "mutual-information": options.save_pseudo_labels,
    }
    return [name for name, asked in needed.items() if asked]


def _picture(scan: Scan, segmentation: Segmentation, model: SegmentationModel) -> bytes:
    """The preview, as PNG."""

    def shown(data: Tensor) -> Any:
        return upright(scan.volume.like(data[None]), scan.path).data[0].numpy()

    image = upright(scan.volume, scan.path)
    return preview_png(
        image.data[0].numpy(),
        shown(segmentation.labels),
        image.spacing,
        segmentation.classes,
        uncertainty=None if segmentation.uncertainty is None else shown(segmentation.uncertainty),
        oriented=not is_image(scan.path),
        made_by=model.saved.name,
    )


def require_fitting(volume: Volume, model: SegmentationModel) -> None:
    """Refuse an image for a 3D model, and another number of channels than the model's."""
    if model.dims == 3 and 1 in volume.shape:
        size = " x ".join(str(n) for n in volume.shape if n > 1)
        raise InputError(
            volume.source,
            f"a 2D image ({size})",
            f"a volume for the 3D model {model.saved.name}",
            "name a 2D model with -m",
        )
    if model.dims == 2:
        require_slices(volume, model.preprocessing.orientation)
    expected = model.channels
    if len(volume.data) != expected:
        if is_image(volume.source or ""):
            conversions = {1: "convert the image to greyscale", 3: "convert the image to colour"}
            remedy = conversions.get(expected, f"pass a volume of {expected} channels")
        else:
            remedy = (
                "pass one volume"
                if expected == 1
                else "name the file of each with --channel NAME=FILE, or stack them along a fourth axis"
            )
        raise InputError(
            volume.source,
            f"{len(volume.data)} channels" if len(volume.data) > 1 else "1 channel",
            f"{expected} ({', '.join(model.saved.card['channels'])}) for model {model.saved.name}",
            remedy,
        )
