"""Training data of segmenters: labelled scans, or brains that are synthesised from label maps."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from medseg_diffusion import build
from medseg_diffusion.config.generator import GeneratorDataSection
from medseg_diffusion.config.segmenter import DataSection, SegmenterConfig
from medseg_diffusion.config.shared import warn_of_unused
from medseg_diffusion.data.augmentation import Augmenter
from medseg_diffusion.data.brain_classes import BRAIN, CLASSES, BrainClasses, tissues_of
from medseg_diffusion.data.cases import Case, CaseFolder, Split, find_cases, middle_cases, split_by_hash
from medseg_diffusion.data.class_names import misnamed
from medseg_diffusion.data.draws import Examples
from medseg_diffusion.data.file_lists import FileList
from medseg_diffusion.data.label_maps import LabelMap, load_label_map, tissues
from medseg_diffusion.data.mask_examples import (
    CaseFormat,
    MaskExamples,
    PreparedCase,
    prepare,
    require_every_class,
    require_usable,
)
from medseg_diffusion.data.synthetic_brains import SyntheticBrains
from medseg_diffusion.diffusion.noise import derive_seed
from medseg_diffusion.errors import UsageError
from medseg_diffusion.methods.seen import Seen
from medseg_diffusion.methods.shape_prior import ShapePrior, average_shape
from medseg_diffusion.volumes.inputs import find_scans
from medseg_diffusion.volumes.paths import scan_name

from .training_scans import seen_in_cases, seen_in_label_maps

VALIDATION_WINDOWS = 12
"""Number of synthetic windows of held-out anatomies that validate a training from label maps."""

OnCase = Callable[[int, int], None]
"""Called with (cases prepared, all cases)."""
_Windows = tuple[SyntheticBrains, list[PreparedCase]]


@dataclass(frozen=True)
class SegmenterData:
    """The content of a data folder, ready to train a segmenter.

    Attributes:
        examples: Training examples.
        validation: Prepared cases of the validation side.
        labels: Label value -> class name.
        channels: Names of the image's channels.
        summary: Facts about the data for the model card.
        split: Split of the cases.
        several_readers: Whether any case of the folder has several readers. Validation cases are one per patient then.
        calibration: Cases of the calibration side.
        named_labels: Label values that have a name in the folder, see `CaseFormat`.
        shape: Average shape of the training anatomies; None unless the configuration has a shape prior.
        coarse: Examples and validation cases of the finder; None unless the configuration has one.
        measure: Measures the training scans (`methods.seen`), which takes a while, for a training of so many examples;
            its second argument is called after each scan.
        tissues: Tissue -> names of the classes that belong to it, for classes that are structures of a brain.
    """

    examples: Examples
    validation: list[PreparedCase]
    labels: dict[int, str]
    channels: tuple[str, ...]
    summary: dict[str, Any]
    split: Split
    measure: Callable[[int, OnCase], Seen | None]
    several_readers: bool = False
    calibration: Sequence[Case] = ()
    named_labels: Collection[int] = ()
    shape: ShapePrior | None = None
    coarse: tuple[Examples, list[PreparedCase]] | None = None
    tissues: Mapping[str, Sequence[str]] = field(default_factory=dict)


def segmenter_data(
    config: SegmenterConfig, data: Path | FileList, cache: Path, on_case: OnCase, on_gpu: bool = False
) -> SegmenterData:
    """Read and prepare the scans of a folder or list for a configuration.

    Args:
        config: The configuration; its ``data.source`` says what the folder holds.
        data: The folder or list.
        cache: Folder for prepared cases; cases that are in it are not prepared again.
        on_case: Called after every case.
        on_gpu: Whether a GPU trains on the examples. It augments and synthesises volumes, for which a core takes longer
            than the GPU for a step.

    Raises:
        UsageError: A configuration that does not fit the data.
        InputError: Unusable data.
    """
    if config.data.source == "brain-labelmaps":
        prepared = _synthetic_brains(config, data, on_case, on_gpu)
    else:
        prepared = _labelled_scans(config, data, cache, on_case, on_gpu)
    warn_of_unused(config.data.codes, [name for value, name in prepared.labels.items() if value])
    return prepared


def _labelled_scans(
    config: SegmenterConfig, data: Path | FileList, cache: Path, on_case: OnCase, on_gpu: bool
) -> SegmenterData:
    if config.inference.shape_prior_mm is not None:
        raise UsageError("inference.shape_prior_mm is for data.source brain-labelmaps")
    folder = find_cases(data)
    labels = class_names_of(config.data, folder, data)
    section = config.data
    split = split_by_hash(folder.cases, section.test_cases, section.validation_cases, section.calibration_cases)
    dims, total = config.network.dims, len(folder.cases)
    used = {*split.train, *split.validation}
    early = [case for case in folder.cases if case.name in used]
    late = [case for case in folder.cases if case.name not in used]
    preprocessing = build.preprocessing(config.preprocessing)
    expected = CaseFormat(section.channels, len(labels), section.merge_labels, folder.labels)
    prepared = prepare(early, preprocessing, expected, cache, lambda done, _: on_case(done, total), dims == 2)
    require_usable(late, preprocessing, expected, cache, lambda done, _: on_case(len(early) + done, total), dims == 2)
    training = [case for case in prepared if case.name in split.train]
    require_every_class(training, labels, str(data))
    augmenter = Augmenter(build.augmentation(config.augmentation), dims)
    later = on_gpu and dims == 3
    examples = MaskExamples(training, config.data.window, config.data.foreground_share, augmenter, later)
    summary = {
        "cases": len(split.train),
        "validation_cases": len(split.validation),
        "test_cases": len(split.test),
        **({"calibration_cases": len(split.calibration)} if split.calibration else {}),
        **{
            f"{prefix}patients": len({case.patient for case in folder.cases if case.name in names})
            for prefix, names in (
                ("", split.train),
                ("validation_", split.validation),
                ("test_", split.test),
                ("calibration_", split.calibration),
            )
            if names or prefix != "calibration_"
        },
        "training_shapes": _ranges([tuple(case.label.shape) for case in training]),
    }
    held_out = [case for case in folder.cases if case.name in split.validation]
    several_readers = any(case.further_labels for case in folder.cases)
    if several_readers:
        held_out = middle_cases(held_out)  # every case takes many samples
    names = {case.name for case in held_out}
    validation = [case for case in prepared if case.name in names]
    calibration = [case for case in folder.cases if case.name in split.calibration]

    def measure(examples: int, on_scan: OnCase) -> Seen | None:
        return seen_in_cases(training, folder, preprocessing, labels, dims, on_scan=on_scan)

    return SegmenterData(
        examples,
        validation,
        labels,
        folder.channels,
        summary,
        split,
        measure,
        several_readers,
        calibration,
        folder.labels,
    )


def class_names_of(
    section: DataSection | GeneratorDataSection, folder: CaseFolder, data: Path | FileList
) -> dict[int, str]:
    """Label value -> class name, background included, from the configuration or else from the folder.

    Raises:
        UsageError: names that are unknown, or that contradict those of the folder.
    """
    labels = dict(enumerate(["background", *section.labels])) if section.labels else folder.labels
    if len(labels) < 2 or sorted(labels) != list(range(len(labels))):
        raise UsageError(f"{data}: the names of labels 1, 2, ... are unknown; set data.labels in the configuration")
    if folder.labels and not section.merge_labels and set(folder.labels) != set(labels):
        raise UsageError(
            f"{data}: dataset.json names labels {', '.join(map(str, sorted(folder.labels)))}, but data.labels names "
            f"labels 0 to {len(labels) - 1}; name all of them, or set data.merge_labels"
        )
    if folder.labels and not section.merge_labels:
        _require_same_names(labels, folder.labels, data)
    return labels


def _require_same_names(configured: dict[int, str], stored: dict[int, str], data: Path | FileList) -> None:
    """UsageError if dataset.json gives a label the name that the configuration gives to another one."""
    if (wrong := misnamed(configured, stored)) is not None:
        value, other = wrong
        raise UsageError(
            f"{data}: dataset.json names label {value} {stored[value]!r}, but data.labels names it "
            f"{configured[value]!r} and label {other} {configured[other]!r}; put data.labels into the order of "
            "dataset.json"
        )


def _synthetic_brains(config: SegmenterConfig, data: Path | FileList, on_case: OnCase, on_gpu: bool) -> SegmenterData:
    spacing = config.preprocessing.spacing_mm
    if spacing is None or len(set(spacing)) != 1 or config.data.channels != 1 or config.network.dims != 3:
        raise UsageError("data.source brain-labelmaps needs isotropic preprocessing.spacing_mm, 1 channel and 3D")
    section = config.preprocessing
    if (section.orientation, section.intensity, section.low, section.high) != ("RAS", "percentile", 0.5, 99.5):
        raise UsageError(
            "data.source brain-labelmaps makes heads in RAS, scaled by percentiles 0.5 and 99.5; set "
            "preprocessing.orientation: RAS, and leave intensity, low and high out"
        )
    if isinstance(data, FileList):
        cases = [Case(one.name, one.images[0], one.images[0], one.patient) for one in data.entries]
    else:
        cases = [Case(scan_name(file), file, file, scan_name(file)) for file in find_scans(data)]
    split = split_by_hash(cases, config.data.test_cases, config.data.validation_cases)
    classes = CLASSES[config.data.brain_classes]
    maps: dict[str, LabelMap] = {}
    for case in cases:
        if case.name not in split.test:
            maps[case.name] = load_label_map(case.label, classes)
            on_case(len(maps), len(cases) - len(split.test))
    training, validating = [maps[name] for name in split.train], [maps[name] for name in split.validation]

    def windows(size: Sequence[int], mm: float, told_apart: BrainClasses, margin: float | None) -> _Windows:
        shared: dict[str, Any] = {"classes": told_apart, "margin_mm": margin}
        held_out = SyntheticBrains(validating, size, mm, **shared)
        examples = SyntheticBrains(training, size, mm, config.data.examples_per_map, in_batches=on_gpu, **shared)
        return examples, _validation_windows(held_out)

    finder = config.finder
    examples, validation = windows(
        config.data.window, spacing[0], classes, None if finder is None else finder.margin_mm
    )
    coarse = None if finder is None else windows(finder.window, finder.spacing_mm, BRAIN, None)
    summary = {
        "label_maps": len(split.train),
        "validation_label_maps": len(split.validation),
        "test_label_maps": len(split.test),
        "examples": "synthesised, never the same twice",
    }
    shape = None
    if config.inference.shape_prior_mm is not None:
        shape = average_shape([tissues(anatomy) > 0 for anatomy in training], 1.0)
    return SegmenterData(
        examples,
        validation,
        dict(enumerate(classes.names)),
        ("T1",),
        summary,
        split,
        partial(seen_in_label_maps, training, config, examples.config),
        shape=shape,
        coarse=coarse,
        tissues=tissues_of(classes) if config.data.brain_classes == "structures" else {},
    )


def _validation_windows(held_out: SyntheticBrains) -> list[PreparedCase]:
    """`VALIDATION_WINDOWS` windows that are the same in every run."""
    windows = []
    for i in range(VALIDATION_WINDOWS):
        name = f"{held_out.maps[i % len(held_out)].name}-{i}"
        example = held_out.example(i, torch.Generator().manual_seed(derive_seed("validation", name)))
        windows.append(PreparedCase(name, example["image"], example["label"].to(torch.uint8)))
    return windows


def _ranges(shapes: list[tuple[int, ...]]) -> list[list[int]]:
    return [[min(axis), max(axis)] for axis in zip(*shapes, strict=True)]
