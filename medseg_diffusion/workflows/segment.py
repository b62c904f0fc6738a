"""Scan in, files out: the whole of `medseg segment` as functions."""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from medseg_diffusion import build
from medseg_diffusion.config.pixel_classifier import PixelClassifierConfig
from medseg_diffusion.config.segmenter import SegmenterConfig
from medseg_diffusion.config.shared import InferenceSection
from medseg_diffusion.data.mask_examples import require_slices
from medseg_diffusion.device import arranged, autocast_dtype, choose_device, keep_freed_memory, tune
from medseg_diffusion.diffusion.noise import derive_seed
from medseg_diffusion.errors import InputError, MedsegError, ModelError, UsageError
from medseg_diffusion.files import write_files
from medseg_diffusion.methods.calibration import Calibration
from medseg_diffusion.methods.ensemble import Ensemble, Fusion, Uncertainty, entropy, largest_part, tempered
from medseg_diffusion.methods.segment import Segmenter
from medseg_diffusion.methods.segment import segment as segment_tensor
from medseg_diffusion.methods.windows import Windows, count_batches
from medseg_diffusion.models.pixel_segmenter import (
    pixel_inference,
    pixel_preprocessing,
    restore_pixel_segmentation,
    restore_segmenter,
    shape_prior,
)
from medseg_diffusion.models.store import SavedModel, load_model_files
from medseg_diffusion.reports.html import SegmentedCase, segment_report
from medseg_diffusion.reports.preview import preview_png
from medseg_diffusion.sampling.loop import spaced
from medseg_diffusion.volumes.io import read_volume, upright, write_labels, write_map
from medseg_diffusion.volumes.paths import SUFFIXES, find_scans, is_image, scan_name, suffix_of
from medseg_diffusion.volumes.preprocessing import Placement
from medseg_diffusion.volumes.volume import Volume

DEFAULT_MODEL = "brain-tissue-t1"

IGNORED = 255
"""The value of pseudo-labels that are too uncertain to be used."""

MEMBERS_AT_ONCE = 10
"""Of an ensemble: the image is encoded once for them, and their probabilities are held together."""

PROBABILITIES_AT_ONCE = 2**28
"""Of all members that are held together: 1 GB. A large scan takes fewer members, or fewer slices, at once."""


@dataclass(frozen=True)
class SegmentOptions:
    """Options of `segment`; None takes the model's own default.

    Attributes:
        model: model folder, run folder or installed name.
        output: a file (one scan) or a folder; None writes next to each scan.
        ensemble: number of sampled masks; None takes the model's.
        steps: denoiser calls per sample.
        sampler: "ddpm", "ddim" or "dpm++".
        fusion: how members become one: "mean", "majority" or "staple".
        seed: every case derives its own from this and its name.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        save_probabilities: write *_prob.nii.gz, channels last.
        save_uncertainty: write *_uncertainty.nii.gz.
        uncertainty: which one: "entropy" (of the mean, 0 to 1), "mutual-information" (the members' disagreement, on the
            same scale) or "variance" (of the foreground's probability over members).
        save_members: write *_members.nii.gz, the mask of every member, channels last.
        save_pseudo_labels: write *_pseudo.nii.gz, the mask with `IGNORED` where members disagree more than
            ``max_disagreement``: labels to train on, for scans that nobody has labelled.
        max_disagreement: mutual information of the members, 0 to 1 (`Ensemble.uncertainty`).
        statistics: write *_statistics.json.
        preview: write *_preview.png.
        report: write one HTML page on all scans to this file.
        skip_existing: leave scans alone whose mask is there.
        shard: (i, n), 1 <= i <= n: only the scans of part i, chosen by a hash of the name.
        output_format: "nifti".
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


@dataclass(frozen=True)
class CaseResult:
    """What became of one scan.

    ``outputs`` maps a kind (segmentation, preview, ...) to its file; volumes, their intervals and the quality are those
    of `Segmentation`.
    """

    scan: Path
    status: Literal["done", "skipped", "failed"]
    outputs: dict[str, Path] = field(default_factory=dict)
    seconds: float = 0.0
    volumes_ml: dict[str, float] = field(default_factory=dict)
    members_ml: dict[str, tuple[float, float]] = field(default_factory=dict)
    intervals_ml: dict[str, tuple[float, float]] = field(default_factory=dict)
    level: float | None = None
    quality: Literal["usual", "check"] | None = None
    error: str | None = None
    exit_code: int = 0
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Segmentation:
    """A segmented scan in memory, on the scan's own grid (I, J, K).

    Attributes:
        labels: (I, J, K) uint8 or int32 class values.
        probabilities: (K, I, J, K') class probabilities.
        uncertainty: (I, J, K) of the kind that was asked for.
        members: (N, *S) labels of every member on the model's grid.
        volumes_ml: class name to volume, background left out.
        members_ml: class name to the smallest and largest volume of the members; empty for one member.
        intervals_ml: class name to an interval that holds the reference's volume in a share ``level`` of scans like the
            model's validation cases (`methods.calibration`); empty where the model was not calibrated with these
            options.
        level: 0.95, or less of few validation cases; None without intervals.
        agreement: class name to the mean Dice of pairs of members; empty for one member.
        quality: "check" where the members agree less than on 95 of 100 validation cases of the model, else "usual";
            None where the model was not calibrated with these options.
        disagreement: of the members, one number for the scan (`Ensemble.disagreement`); None for one member.
    """

    labels: Tensor
    probabilities: Tensor
    uncertainty: Tensor
    members: Tensor
    volumes_ml: dict[str, float]
    members_ml: dict[str, tuple[float, float]]
    intervals_ml: dict[str, tuple[float, float]]
    level: float | None
    agreement: dict[str, float]
    quality: Literal["usual", "check"] | None
    disagreement: float | None


class SegmentationModel:
    """A trained segmenter, loaded once for many scans.

    Args:
        name_or_path: model folder, run folder or installed name.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        ensemble: sampled masks per scan; None, like ``steps`` and ``sampler``, takes the model's default.
        steps: denoiser calls per sample.
        sampler: "ddpm", "ddim" or "dpm++".
        fusion: "mean", "majority" or "staple".
        uncertainty: see `SegmentOptions`.

    Raises:
        ModelError: missing or unusable model.
        UsageError: unknown device or sampler.
    """

    def __init__(
        self,
        name_or_path: str | Path = DEFAULT_MODEL,
        device: str = "auto",
        ensemble: int | None = None,
        steps: int | None = None,
        sampler: str | None = None,
        fusion: Fusion = "mean",
        uncertainty: Uncertainty = "entropy",
    ) -> None:
        self.device = choose_device(device)
        tune(self.device)
        self.saved: SavedModel = load_model_files(name_or_path)
        self.notes: list[str] = []
        if self.saved.card.get("method") == "label-efficient":
            self._restore_pixel_segmentation(steps, sampler)
        else:
            self._restore_segmenter(steps)
            if self.feed_forward and (steps, sampler) != (None, None):
                raise UsageError(f"{self.saved.path}: is feed-forward: leave --steps and --sampler out")
        if self.feed_forward and (ensemble or 1) > 1:
            self.notes.append("a feed-forward model has one mask, whatever the ensemble")
            ensemble = 1
        self.prior = shape_prior(self.saved)
        self.labels = {int(value): str(name) for value, name in self.saved.card["labels"].items()}
        self.ensemble = ensemble or self.inference.ensemble
        self.sampler_name = sampler or self.inference.sampler
        self.sampler = build.sampler(self.sampler_name)
        self.fusion: Fusion = fusion
        self.uncertainty: Uncertainty = uncertainty
        self.calibration = self._calibration()

    def _restore_segmenter(self, steps: int | None) -> None:
        model, config = restore_segmenter(self.saved)
        arranged(model.to(self.device).network, config.training.channels_last, compiled=False)
        self.model: Segmenter = model
        self.config: SegmenterConfig | PixelClassifierConfig = config
        self.inference: InferenceSection = config.inference
        self.dims: int = config.network.dims
        self.channels: int = config.data.channels
        self.precision = config.training.precision
        self.preprocessing = build.preprocessing(config.preprocessing)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.times = spaced(build.noise_schedule(config.diffusion.schedule), steps or config.inference.steps)
        self.notes += [str(item.message) for item in caught]

    def _restore_pixel_segmentation(self, steps: int | None, sampler: str | None) -> None:
        if steps is not None or sampler is not None:
            raise UsageError(
                f"{self.saved.path}: classifies pixels and samples nothing: leave --steps and --sampler out"
            )
        self.model, config, generator = restore_pixel_segmentation(self.saved)
        self.model.to(self.device)
        self.config = config
        self.inference = pixel_inference(generator, config)
        self.dims = len(generator.config.data.shape)
        self.channels = len(self.saved.card["channels"])  # of the scans: a generator of colours takes grey ones too
        self.precision = generator.config.training.precision
        self.preprocessing = pixel_preprocessing(generator)
        self.times = [1, 0]

    @property
    def feed_forward(self) -> bool:
        """Whether the model samples nothing."""
        return self.config.method == "baseline"

    @property
    def name(self) -> str:
        path = self.saved.path
        return path.resolve().parent.name if path.name == "model" else path.name

    def sample(
        self, volume: Volume, seed: int, on_progress: Callable[[float], None] = lambda done: None
    ) -> tuple[Ensemble, Placement]:
        """The ensemble on the model's grid, on the CPU, and the way back to the scan."""
        image, placement = self.preprocessing.apply(volume)
        inference, dims = self.inference, self.dims
        of_pixels = isinstance(self.config, PixelClassifierConfig)
        # Activations take much more memory than samples of masks.
        batch_size = (1 if self.device.type == "cpu" else 4) if of_pixels else None
        windows = Windows(inference.window, inference.overlap, batch_size)
        seeds = [derive_seed(seed, member) for member in range(self.ensemble)]
        slabs, parts = self._portions(image, seeds)
        batches = [count_batches(slab.shape, windows, dims, len(part), self.device) for slab in slabs for part in parts]
        total, done = sum(batches), 0

        def step() -> None:
            nonlocal done
            done += 1
            on_progress(min(1.0, done / total))

        dtype = autocast_dtype(self.device, self.precision)
        autocast = torch.autocast(self.device.type, dtype) if dtype else nullcontext()
        joined: list[Ensemble] = []
        for slab in slabs:
            there = slab.to(self.device)
            ensemble: Ensemble | None = None
            for part in parts:
                with torch.no_grad(), autocast:
                    found = segment_tensor(self.model, there, part, self.sampler, self.times, windows, dims, step)
                members = found.float().cpu()
                ensemble = Ensemble.of(members) if ensemble is None else ensemble.add(members)
            assert ensemble is not None
            joined.append(ensemble)
        return Ensemble.joined(joined), placement

    def _portions(self, image: Tensor, seeds: list[int]) -> tuple[Sequence[Tensor], list[list[int]]]:
        """What is held at once: slabs of ``image`` (C, I, J, K) along its last axis, and parts of the ensemble.

        Pixel classifiers are trained members and no samples. They are taken together, for their activations are the
        expensive part; and with no noise that depends on a slice's number, any slab gives what the whole image does.
        """
        of_one_slice = len(self.labels) * image[0, :, :, 0].numel()
        if isinstance(self.config, PixelClassifierConfig):
            thick = max(1, PROBABILITIES_AT_ONCE // (len(seeds) * of_one_slice))
            return image.split(thick, -1) if self.dims == 2 else [image], [seeds]
        members = PROBABILITIES_AT_ONCE // (of_one_slice * image.shape[-1])
        members = min(MEMBERS_AT_ONCE, max(1, members))
        return [image], [seeds[i : i + members] for i in range(0, len(seeds), members)]

    def combine(self, ensemble: Ensemble, placement: Placement) -> Segmentation:
        """One answer on the scan's grid from the ensemble: probabilities, never labels, are mapped back to it."""
        outside = [1.0] + [0.0] * (len(self.labels) - 1)
        if (near := self._near_the_shape(ensemble, placement)) is not None:
            ensemble = ensemble.within(near)
        mean = placement.restore(ensemble.mean, outside)
        scores = mean if self.fusion == "mean" else placement.restore(ensemble.fuse(self.fusion), outside)
        labels = scores.argmax(0).to(torch.uint8 if len(self.labels) <= 256 else torch.int32)
        if self.inference.largest_part:
            lost = (labels > 0) & ~largest_part(labels)
            labels[lost] = 0
            mean[:, lost] = torch.tensor(outside)[:, None]
            # What follows is of what is kept.
            found = ensemble.mean.argmax(0)
            ensemble = ensemble.within((found == 0) | largest_part(found))
        voxel_ml = _voxel_ml(placement.native_affine)
        counts = np.bincount(labels.numpy().ravel(), minlength=len(self.labels)) * voxel_ml
        names = {value: name for value, name in self.labels.items() if value}
        volumes = {name: float(counts[value]) for value, name in names.items()}
        ranges: dict[str, tuple[float, float]] = {}
        intervals: dict[str, tuple[float, float]] = {}
        agreement: dict[str, float] = {}
        position_ml = _voxel_ml(placement.affine)
        if len(ensemble) > 1:
            sampled = ensemble.volumes_ml(1000 * position_ml)
            low, high = sampled.min(0).values, sampled.max(0).values
            ranges = {name: (float(low[value]), float(high[value])) for value, name in names.items()}
            dice = ensemble.pairwise_dice()
            agreement = {name: float(dice[value - 1]) for value, name in names.items()}
        if self.calibration is not None and self.calibration.volume_errors:
            known = self.calibration
            intervals = {k: known.volume_interval(value, volumes[k], position_ml) for value, k in names.items()}
        if self.calibration is not None:  # it changes no label, so it may come after the largest class was taken
            mean = tempered(mean, self.calibration.temperature(len(ensemble)))
        kind = self.uncertainty
        uncertain = entropy(mean) if kind == "entropy" else placement.restore(ensemble.uncertainty(kind)[None])[0]
        several = len(ensemble) > 1
        return Segmentation(
            labels=labels,
            probabilities=mean,
            uncertainty=uncertain,
            members=ensemble.labels,
            volumes_ml=volumes,
            members_ml=ranges,
            intervals_ml=intervals,
            level=self.calibration.level if self.calibration is not None and intervals else None,
            agreement=agreement,
            quality=self._quality(agreement),
            disagreement=ensemble.disagreement if several else None,
        )

    def members_on_scan(self, found: Segmentation, placement: Placement) -> Tensor:
        """Masks of all members on the scan's grid, (N, I, J, K) of the type of ``found.labels``."""
        outside = [1.0] + [0.0] * (len(self.labels) - 1)
        return torch.stack(
            [
                placement.restore(F.one_hot(member.long(), len(self.labels)).movedim(-1, 0).float(), outside).argmax(0)
                for member in found.members
            ]
        ).to(found.labels.dtype)

    def _calibration(self) -> Calibration | None:
        """The model's calibration, if it was made with this sampler and so many steps."""
        content = self.saved.card.get("calibration")
        if content is None:
            return None
        try:
            known = Calibration(**content)
        except TypeError as error:
            raise ModelError(f"{self.saved.path}: its calibration is of another version; train it again") from error
        if self.feed_forward or (known.sampler, known.steps) == (self.sampler_name, len(self.times) - 1):
            return known
        self.notes.append(
            f"probabilities are not calibrated: the model's calibration is for {known.sampler} with {known.steps} steps"
        )
        return None

    def _quality(self, agreement: dict[str, float]) -> Literal["usual", "check"] | None:
        if self.calibration is None or self.calibration.agreement is None or not agreement:
            return None
        known = [value for value in agreement.values() if value == value]
        if not known:  # all members found nothing, and agree
            return "usual"
        return "usual" if sum(known) / len(known) >= self.calibration.agreement else "check"

    def _near_the_shape(self, ensemble: Ensemble, placement: Placement) -> Tensor | None:
        tolerance = self.inference.shape_prior_mm
        if self.prior is None or tolerance is None:
            return None
        return self.prior.near(ensemble.mean.argmax(0) > 0, placement.spacing, tolerance)

    def segment(
        self, volume: Volume, seed: int = 0, on_progress: Callable[[float], None] = lambda done: None
    ) -> Segmentation:
        """Segments a scan; ``seed`` decides all randomness."""
        return self.combine(*self.sample(volume, seed, on_progress))


def segment(
    scans: Sequence[Path],
    options: SegmentOptions = SegmentOptions(),
    on_case: Callable[[CaseResult], None] | None = None,
    on_progress: Callable[[str, float], None] | None = None,
) -> list[CaseResult]:
    """Segments files and folders of scans and writes the results; one bad scan does not stop the others.

    The mask is written last: where it is, the scan is finished.

    Args:
        scans: files, or folders of them.
        options: see `SegmentOptions`.
        on_case: called after every scan.
        on_progress: called with (scan name, share done).

    Raises:
        UsageError: contradictory options, or two scans with the same output.
        InputError: a path that does not exist, or a folder without scans.
        ModelError: no usable model.
    """
    found = [path for scan in scans for path in find_scans(scan)]
    targets = {scan: _targets(scan, options, len(found)) for scan in found}
    refuse_collisions(targets)
    if options.shard is not None:
        found = [scan for scan in found if _shard_of(scan, options.shard[1]) == options.shard[0]]
    model: SegmentationModel | None = None
    results: list[CaseResult] = []
    pages: list[SegmentedCase] = []
    for scan in found:
        files = targets[scan]
        if options.skip_existing and files["segmentation"].exists():
            result = CaseResult(scan, "skipped", {"segmentation": files["segmentation"]})
        else:
            try:
                # The scan is read before the weights: a mistyped path is answered at once.
                volume = read_volume(scan, channels=None)
                model = model or _loaded(options)
                result, page = _one(scan, volume, files, model, options, on_progress)
                pages.append(page)
            except MedsegError as error:
                # What concerns the model or the options concerns every scan.
                if model is None and not _about_scan(error):
                    raise
                result = CaseResult(scan, "failed", error=str(error), exit_code=error.exit_code)
            except Exception as error:
                text = " ".join(str(error).split()) or type(error).__name__
                result = CaseResult(scan, "failed", error=f"{scan}: {type(error).__name__}: {text}", exit_code=1)
        results.append(result)
        if on_case is not None:
            on_case(result)
    if options.report is not None and pages:
        options.report.parent.mkdir(parents=True, exist_ok=True)
        write_files(options.report.parent, {options.report.name: segment_report(pages)})
    return results


def _one(
    scan: Path,
    volume: Volume,
    files: dict[str, Path],
    model: SegmentationModel,
    options: SegmentOptions,
    on_progress: Callable[[str, float], None] | None,
) -> tuple[CaseResult, SegmentedCase]:
    started = time.monotonic()
    name = scan_name(scan)
    _check_fits(volume, model)
    ensemble, placement = model.sample(
        volume,
        derive_seed(options.seed, name),
        lambda done: on_progress(name, done) if on_progress is not None else None,
    )
    found = model.combine(ensemble, placement)
    folder = files["segmentation"].parent
    folder.mkdir(parents=True, exist_ok=True)
    written: dict[str, Path] = {}
    if options.save_probabilities:
        write_map(found.probabilities, volume, files["probabilities"])
        written["probabilities"] = files["probabilities"]
    if options.save_uncertainty:
        write_map(found.uncertainty, volume, files["uncertainty"])
        written["uncertainty"] = files["uncertainty"]
    if options.save_members:
        write_labels(model.members_on_scan(found, placement), volume, files["members"])
        written["members"] = files["members"]
    if options.save_pseudo_labels:
        write_labels(_pseudo_labels(ensemble, placement, found.labels, options), volume, files["pseudo-labels"])
        written["pseudo-labels"] = files["pseudo-labels"]
    picture = b""
    if options.preview or options.report is not None:
        shown = upright(volume, scan)
        names = {value: text for value, text in model.labels.items() if value}
        picture = preview_png(
            shown.data[0].numpy(),
            upright(volume.like(found.labels[None]), scan).data[0].numpy(),
            shown.spacing,
            names,
            uncertainty=upright(volume.like(found.uncertainty[None]), scan).data[0].numpy()
            if options.save_uncertainty
            else None,
        )
    if options.preview:
        write_files(folder, {files["preview"].name: picture})
        written["preview"] = files["preview"]
    seconds = time.monotonic() - started
    if options.statistics:
        write_files(folder, {files["statistics"].name: _statistics(scan, found, model, seconds)})
        written["statistics"] = files["statistics"]
    write_labels(found.labels, volume, files["segmentation"])
    written = {"segmentation": files["segmentation"], **written}
    seconds = time.monotonic() - started
    notes = [*model.notes]
    if found.quality == "check":
        notes.append("the sampled masks agree less than is usual for this model; look at the result")
    result = CaseResult(
        scan,
        "done",
        written,
        seconds,
        found.volumes_ml,
        found.members_ml,
        found.intervals_ml,
        found.level,
        found.quality,
        warnings=tuple(notes),
    )
    return result, _page(scan, found, model, options, result, picture)


def _loaded(options: SegmentOptions) -> SegmentationModel:
    keep_freed_memory()
    model = SegmentationModel(
        options.model or DEFAULT_MODEL,
        options.device,
        options.ensemble,
        options.steps,
        options.sampler,
        options.fusion,
        options.uncertainty,
    )
    if options.save_pseudo_labels and model.ensemble < 2:
        raise UsageError("pseudo-labels need members that can disagree: use --ensemble 2 or more")
    if options.save_pseudo_labels and max(model.labels) >= IGNORED:
        raise UsageError(f"pseudo-labels mark what to ignore by {IGNORED}, which is a class of this model")
    return model


def _pseudo_labels(ensemble: Ensemble, placement: Placement, labels: Tensor, options: SegmentOptions) -> Tensor:
    disagreement = placement.restore(ensemble.uncertainty("mutual-information")[None])[0]
    return torch.where(disagreement > options.max_disagreement, IGNORED, labels.to(torch.uint8))


def _page(
    scan: Path,
    found: Segmentation,
    model: SegmentationModel,
    options: SegmentOptions,
    result: CaseResult,
    picture: bytes,
) -> SegmentedCase:
    return SegmentedCase(
        name=scan.name,
        preview=picture,
        volumes_ml=found.volumes_ml,
        members_ml=found.members_ml,
        intervals_ml=found.intervals_ml,
        level=found.level,
        seconds=result.seconds,
        model=model.name,
        options=_used(model, options.seed),
        files=[str(path) for path in result.outputs.values()],
        warnings=list(result.warnings),
    )


def _used(model: SegmentationModel, seed: int) -> dict[str, str]:
    return {
        "sampler": model.sampler_name,
        "steps": str(len(model.times) - 1),
        "ensemble": str(model.ensemble),
        "fusion": model.fusion,
        "seed": str(seed),
        "device": str(model.device),
    }


def _statistics(scan: Path, found: Segmentation, model: SegmentationModel, seconds: float) -> str:
    classes: dict[str, Any] = {name: {"volume_ml": round(ml, 4)} for name, ml in found.volumes_ml.items()}
    for key, ends in (("interval_ml", found.intervals_ml), ("members_ml", found.members_ml)):
        for name, both in ends.items():
            classes[name][key] = [round(end, 4) for end in both]
    for name, dice in found.agreement.items():
        classes[name]["pairwise_dice"] = round(dice, 4) if dice == dice else None
    content: dict[str, Any] = {"scan": scan.name, "model": model.name, "seconds": round(seconds, 2), "classes": classes}
    if found.disagreement is not None:
        content["disagreement"] = round(found.disagreement, 5)
    if found.level is not None:
        content["interval_level"] = found.level
    if found.quality is not None:
        content["quality"] = found.quality
    return json.dumps(content, indent=2) + "\n"


def _check_fits(volume: Volume, model: SegmentationModel) -> None:
    """Refuse an image for a 3D model, and another number of channels than the model's."""
    if model.dims == 3 and 1 in volume.shape:
        size = " x ".join(str(n) for n in volume.shape if n > 1)
        raise InputError(
            volume.source, f"a 2D image ({size})", f"a volume for the 3D model {model.name}", "name a 2D model with -m"
        )
    if model.dims == 2:
        require_slices(volume, model.preprocessing.orientation)
    expected = model.channels
    if len(volume.data) != expected:
        if is_image(volume.source or ""):
            known = {1: "convert the image to greyscale", 3: "convert the image to colour"}
            remedy = known.get(expected, f"pass a volume of {expected} channels")
        else:
            remedy = "pass one volume" if expected == 1 else "stack the channels along a fourth axis"
        raise InputError(
            volume.source,
            f"{len(volume.data)} channels" if len(volume.data) > 1 else "1 channel",
            f"{expected} ({', '.join(model.saved.card['channels'])}) for model {model.name}",
            remedy,
        )


def _targets(scan: Path, options: SegmentOptions, count: int) -> dict[str, Path]:
    """The files of a scan by kind, as DESIGN'ed names beside the scan, in a folder, or beside the given file."""
    output = options.output
    if output is not None and output.name.lower().endswith(SUFFIXES):
        if count > 1:
            raise UsageError(f"-o {output} is a file, but there are {count} scans; give a folder")
        if is_image(output) and not (is_image(scan) and suffix_of(output) == ".png"):
            known = ".png or .nii.gz" if is_image(scan) else ".nii.gz"
            raise UsageError(f"-o {output}: the mask of {scan.name} is not written as {suffix_of(output)}; use {known}")
        base, segmentation = output.parent / scan_name(output).removesuffix("_seg"), output
    else:
        base = (scan.parent if output is None else output) / scan_name(scan)
        segmentation = base.with_name(base.name + ("_seg.png" if is_image(scan) else "_seg.nii.gz"))
    endings = {
        "probabilities": "_prob.nii.gz",
        "uncertainty": "_uncertainty.nii.gz",
        "members": "_members.nii.gz",
        "pseudo-labels": "_pseudo.nii.gz",
        "preview": "_preview.png",
        "statistics": "_statistics.json",
    }
    return {
        "segmentation": segmentation,
        **{kind: base.with_name(base.name + ending) for kind, ending in endings.items()},
    }


def refuse_collisions(targets: dict[Path, dict[str, Path]]) -> None:
    """UsageError if a result would overwrite a scan or another result; ``targets`` are files by kind, for each scan."""
    taken: dict[Path, Path] = {}
    for scan, files in targets.items():
        if scan.absolute() in [path.absolute() for path in files.values()]:
            raise UsageError(f"{scan}: the result would overwrite the scan; give -o another name")
        # Of an image and a volume of one name the masks differ in suffix; the maps do not.
        for target in (path.absolute() for path in files.values()):
            if target in taken:
                raise UsageError(f"{taken[target]} and {scan} would both be written to {target}; segment them apart")
            taken[target] = scan


def _shard_of(scan: Path, count: int) -> int:
    """The part, 1..count, of a scan: by its name alone, so that further scans do not move it."""
    return int(hashlib.sha256(scan_name(scan).encode()).hexdigest(), 16) % count + 1


def _about_scan(error: MedsegError) -> bool:
    return error.exit_code == 3


def _voxel_ml(affine: np.ndarray) -> float:
    return abs(float(np.linalg.det(affine[:3, :3]))) / 1000
