"""`medseg segment`: segment scans and write masks, maps, previews, statistics and a report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from medseg_diffusion.data.mask_examples import require_slices
from medseg_diffusion.device import keep_freed_memory
from medseg_diffusion.diffusion.noise import derive_seed
from medseg_diffusion.errors import InputError, UsageError
from medseg_diffusion.files import write_files
from medseg_diffusion.methods.ensemble import Fusion, Uncertainty
from medseg_diffusion.models.load import DEFAULT_SEGMENTER, load_segmenter
from medseg_diffusion.models.segmentation import Map, Segmentation, SegmentationModel
from medseg_diffusion.models.store import is_deterministic
from medseg_diffusion.reports.html import SegmentedCase, segment_report
from medseg_diffusion.reports.preview import preview_png
from medseg_diffusion.volumes.io import read_volume, upright, write_labels, write_map
from medseg_diffusion.volumes.outputs import Outputs, refuse_collisions, segmentation_outputs
from medseg_diffusion.volumes.paths import is_image
from medseg_diffusion.volumes.volume import Volume

from .scans import Scan, ScanResult, Work, all_scans, each_scan

IGNORED = 255
"""Value of pseudo-labels that are too uncertain to train on."""


@dataclass(frozen=True)
class SegmentOptions:
    """Options of `segment`; None takes the model's own default.

    Attributes:
        model: Model folder, run folder or installed name; None takes the built-in model.
        output: File (one scan) or folder; None writes next to each scan.
        ensemble: Number of sampled masks.
        steps: Denoiser calls per sample.
        sampler: "ddpm", "ddim" or "dpm++".
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
        preview: Write *_preview.png.
        report: Write one HTML page about all scans to this file.
        skip_existing: Skip scans whose mask exists.
        shard: (i, n) with 1 <= i <= n: segment only part i of the scans, chosen by a hash of the name.
        output_format: "nifti".
        max_memory: Most memory of the process in GB, by an estimate; None for no limit.
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
    preview: bool = False
    report: Path | None = None
    skip_existing: bool = False
    shard: tuple[int, int] | None = None
    output_format: Literal["nifti"] = "nifti"
    max_memory: float | None = None


def segment(
    scans: Sequence[Path],
    options: SegmentOptions = SegmentOptions(),
    on_case: Callable[[ScanResult], None] | None = None,
    on_progress: Callable[[str, float], None] | None = None,
) -> list[ScanResult]:
    """Segment scans and write the results. A scan that fails does not stop the others.

    The mask is written last, so that a scan with a mask is finished.

    Args:
        scans: Files, or folders of them.
        options: The options.
        on_case: Called after every scan.
        on_progress: Called with (scan name, share done).

    Raises:
        UsageError: Contradictory options, or two scans with the same output.
        InputError: A path that does not exist, or a folder without scans.
        ModelError: No usable model.
    """
    paths = all_scans(scans)
    outputs = {path: segmentation_outputs(path, options.output, len(paths)) for path in paths}
    refuse_collisions(outputs)
    if options.shard is not None:
        part, count = options.shard
        outputs = {path: files for path, files in outputs.items() if _shard_of(path, count) == part}
    cards: list[SegmentedCase] = []

    def run(model: SegmentationModel, scan: Scan) -> ScanResult:
        result, card = _segment_one(model, scan, options)
        cards.append(card)
        return result

    work = Work(lambda path: read_volume(path, channels=None), lambda: _load(options), run, "segmentation")
    results = each_scan(outputs, work, skip_existing=options.skip_existing, on_case=on_case, on_progress=on_progress)
    if options.report is not None and cards:
        write_files(options.report.parent, {options.report.name: segment_report(cards)})
    return results


def _load(options: SegmentOptions) -> SegmentationModel:
    keep_freed_memory()
    model = load_segmenter(
        options.model or DEFAULT_SEGMENTER,
        options.device,
        options.ensemble,
        options.steps,
        options.sampler,
        options.fusion,
        options.uncertainty,
        options.max_memory,
    )
    if options.save_pseudo_labels and model.ensemble < 2:
        raise UsageError("pseudo-labels need members that can disagree; use --ensemble 2 or more")
    if options.save_pseudo_labels and max(model.labels) >= IGNORED:
        raise UsageError(f"pseudo-labels use {IGNORED} for voxels to ignore, but it is a class of this model")
    return model


def _segment_one(model: SegmentationModel, scan: Scan, options: SegmentOptions) -> tuple[ScanResult, SegmentedCase]:
    """Segment a scan and write its files, the mask last."""
    _check_fits(scan.volume, model)
    seed = derive_seed(options.seed, scan.name)
    segmentation = model.segment(scan.volume, seed, scan.on_progress, _maps(options))
    scan.outputs["segmentation"].parent.mkdir(parents=True, exist_ok=True)
    written = _write_maps(model, scan, options, segmentation)
    picture = b""
    if options.preview or options.report is not None:
        picture = _picture(scan, segmentation, model, options)
    if options.preview:
        written |= _write(scan, "preview", picture)
    if options.statistics:
        written |= _write(scan, "statistics", _statistics(scan, segmentation, model))
    write_labels(segmentation.labels, scan.volume, scan.outputs["segmentation"])
    warnings = list(model.notes)
    if not bool((segmentation.labels > 0).any()):
        warnings.append("nothing was found: the mask is empty; check the scan and whether the model is for it")
    elif segmentation.quality == "check":
        warnings.append("the sampled masks agree less than is usual for this model; check the result")
    result = ScanResult(
        scan.path,
        "done",
        {"segmentation": scan.outputs["segmentation"], **written},
        scan.seconds,
        segmentation.volumes_ml,
        segmentation.members_ml,
        segmentation.intervals_ml,
        segmentation.level,
        segmentation.quality,
        warnings=tuple(warnings),
    )
    return result, _report_card(result, model, options, picture)


def _write_maps(model: SegmentationModel, scan: Scan, options: SegmentOptions, segmentation: Segmentation) -> Outputs:
    """Write the requested maps beside the mask."""
    files, volume, written = scan.outputs, scan.volume, []
    if segmentation.probabilities is not None:
        write_map(segmentation.probabilities, volume, files["probabilities"])
        written.append("probabilities")
    if segmentation.uncertainty is not None:
        write_map(segmentation.uncertainty, volume, files["uncertainty"])
        written.append("uncertainty")
    if options.save_members:
        write_labels(model.aggregation.members_on_scan(segmentation), volume, files["members"])
        written.append("members")
    if segmentation.mutual_information is not None:
        doubtful = segmentation.mutual_information > options.max_disagreement
        pseudo = torch.where(doubtful, IGNORED, segmentation.labels.to(torch.uint8))
        write_labels(pseudo, volume, files["pseudo-labels"])
        written.append("pseudo-labels")
    return {kind: files[kind] for kind in written}


def _write(scan: Scan, kind: str, content: str | bytes) -> Outputs:
    path = scan.outputs[kind]
    write_files(path.parent, {path.name: content})
    return {kind: path}


def _maps(options: SegmentOptions) -> list[Map]:
    """The maps on the scan's grid that the options need."""
    wanted: dict[Map, bool] = {
        "probabilities": options.save_probabilities,
        "uncertainty": options.save_uncertainty,
        "mutual-information": options.save_pseudo_labels,
    }
    return [name for name, asked in wanted.items() if asked]


def _picture(scan: Scan, segmentation: Segmentation, model: SegmentationModel, options: SegmentOptions) -> bytes:
    """The preview, as PNG."""

    def shown(data: Tensor) -> Any:
        return upright(scan.volume.like(data[None]), scan.path).data[0].numpy()

    image = upright(scan.volume, scan.path)
    return preview_png(
        image.data[0].numpy(),
        shown(segmentation.labels),
        image.spacing,
        model.aggregation.foreground,
        uncertainty=None if segmentation.uncertainty is None else shown(segmentation.uncertainty),
    )


def _report_card(
    result: ScanResult, model: SegmentationModel, options: SegmentOptions, picture: bytes
) -> SegmentedCase:
    """The content of the report about a scan."""
    return SegmentedCase(
        name=result.scan.name,
        preview=picture,
        volumes_ml=result.volumes_ml,
        members_ml=result.members_ml,
        intervals_ml=result.intervals_ml,
        level=result.level,
        seconds=result.seconds,
        model=model.saved.name,
        options={
            **({"sampler": model.sampler_name, "steps": str(model.num_steps)} if model.samplers else {}),
            "ensemble": str(model.ensemble),
            "fusion": options.fusion,
            "seed": str(options.seed),
            "device": str(model.device),
        },
        files=[str(path) for path in result.outputs.values()],
        warnings=list(result.warnings),
    )


def _statistics(scan: Scan, segmentation: Segmentation, model: SegmentationModel) -> str:
    classes: dict[str, Any] = {name: {"volume_ml": round(ml, 4)} for name, ml in segmentation.volumes_ml.items()}
    for key, ends in (("interval_ml", segmentation.intervals_ml), ("members_ml", segmentation.members_ml)):
        for name, both in ends.items():
            classes[name][key] = [round(end, 4) for end in both]
    for name, dice in segmentation.agreement.items():
        classes[name]["pairwise_dice"] = round(dice, 4) if dice == dice else None
    content: dict[str, Any] = {
        "scan": scan.path.name,
        "model": model.saved.name,
        "seconds": round(scan.seconds, 2),
        "classes": classes,
    }
    if segmentation.disagreement is not None:
        content["disagreement"] = round(segmentation.disagreement, 5)
    if segmentation.level is not None:
        content["interval_level"] = segmentation.level
    if is_deterministic(model.saved.card):
        content["deterministic"] = True
    if segmentation.quality is not None:
        content["quality"] = segmentation.quality
    return json.dumps(content, indent=2) + "\n"


def _check_fits(volume: Volume, model: SegmentationModel) -> None:
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
            remedy = "pass one volume" if expected == 1 else "stack the channels along a fourth axis"
        raise InputError(
            volume.source,
            f"{len(volume.data)} channels" if len(volume.data) > 1 else "1 channel",
            f"{expected} ({', '.join(model.saved.card['channels'])}) for model {model.saved.name}",
            remedy,
        )


def _shard_of(scan: Path, count: int) -> int:
    """The part of a scan, 1..count. It depends only on the path as given, so that further scans do not change it."""
    return int(hashlib.sha256(scan.as_posix().encode()).hexdigest(), 16) % count + 1
