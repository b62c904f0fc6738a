"""What the training scans of a model measured (`methods.seen`): stored at the end of a training, or for an older model.

Of many scans, `MOST_SCANS` are measured, evenly spread over their names: they tell the same ranges.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from torch import Tensor

from medseg_diffusion import build
from medseg_diffusion.config.anomaly import AnomalyConfig
from medseg_diffusion.config.segmenter import SegmenterConfig
from medseg_diffusion.data.brain_classes import CLASSES, tissues_of
from medseg_diffusion.data.cases import Case, CaseFolder, digest, find_cases, split_by_hash
from medseg_diffusion.data.file_lists import Data, FileList, folder_or_files
from medseg_diffusion.data.healthy import HealthyScan, healthy_source
from medseg_diffusion.data.label_maps import LabelMap, class_values, load_label_map
from medseg_diffusion.data.mask_examples import CaseFormat, PreparedCase, prepare
from medseg_diffusion.data.synthetic_brains import SynthesisConfig, synthetic_scan
from medseg_diffusion.diffusion.noise import derive_seed
from medseg_diffusion.errors import UsageError
from medseg_diffusion.methods.seen import (
    FEWEST_SCANS,
    SEEN,
    MeasuredMask,
    MeasuredScan,
    Range,
    Seen,
    measured_mask,
    measured_scan,
)
from medseg_diffusion.models.doubts import measured
from medseg_diffusion.models.finder import box_of
from medseg_diffusion.models.restore import typed_config
from medseg_diffusion.models.store import SavedModel, load_card, load_model_files, replace_card
from medseg_diffusion.volumes.inputs import find_scans
from medseg_diffusion.volumes.io import read_grid, read_volume
from medseg_diffusion.volumes.paths import scan_name
from medseg_diffusion.volumes.preprocessing import Box, Preprocessing, apply_labels
from medseg_diffusion.volumes.volume import Volume

MOST_SCANS = 200
"""Largest number of scans that are measured."""
SYNTHETIC_SCANS = 28
"""Number of synthetic heads that are measured for a training from label maps."""
_COARSE_MM = 2.0
"""Voxel size of these heads: intensities and shares do not need finer ones, which take eight times as long."""
_SLAB, _SLAB_ABOVE_MM = (168, 208, 32), 25.0
"""Voxels of 1 mm in which contrast is measured, which does depend on the resolution, and their height above the middle
of the brain. There, grey matter is mostly cortex of both sides, as it is in the whole brain."""

OnScan = Callable[[int, int], None]
"""Called with (scans measured, all scans)."""
Item = TypeVar("Item")


def seen_entry(seen: Seen | None) -> dict[str, Any]:
    """The entry of a card; none where too few scans were measured."""
    return {} if seen is None else {SEEN: seen.entry()}


def spread(items: Sequence[Item], most: int = MOST_SCANS) -> list[Item]:
    """At most so many items, evenly spread over their order."""
    return [items[i * len(items) // most] for i in range(most)] if len(items) > most else list(items)


def add_seen(model: Path, seen: Seen | None) -> None:
    """Write into the card of a model directory what its training has seen, if that is known."""
    if seen is not None:
        replace_card(model, {**load_card(model), **seen_entry(seen)})


# ---- labelled scans --------------------------------------------------------------------------------------------------


def seen_in_cases(
    cases: Sequence[PreparedCase],
    folder: CaseFolder,
    preprocessing: Preprocessing,
    labels: Mapping[int, str],
    dims: int,
    masks: bool = True,
    on_scan: OnScan = lambda done, total: None,
) -> Seen | None:
    """What prepared training cases of a folder measured.

    Args:
        cases: The training cases on the model's grid.
        folder: The folder, whose files have the cases' own voxel sizes.
        preprocessing: The model's preprocessing.
        labels: Value -> name of the class, background included.
        dims: 2 for a model of slices, 3 for one of volumes.
        masks: Measure the labels, too.
        on_scan: Called after every case.
    """
    files = {case.name: case.image for case in folder.cases}
    names = {value: name for value, name in labels.items() if value}
    chosen = spread(sorted(cases, key=lambda case: case.name))
    scans = []
    for done, case in enumerate(chosen, 1):
        scan = _measured_case(case, files[case.name], preprocessing, names, dims)
        scans.append(scan if masks else replace(scan, masks=[]))
        on_scan(done, len(chosen))
    return Seen.of(scans)


def _measured_case(
    case: PreparedCase, file: Path, preprocessing: Preprocessing, names: Mapping[int, str], dims: int
) -> MeasuredScan:
    shape, affine = read_grid(file)
    scan = measured_scan(case.image, shape, affine, preprocessing.orientation, dims)
    if preprocessing.crop_centre is None:  # images of any size are cut into windows, or resized
        scan = replace(scan, pixels={})
    voxel_mm3 = None if affine is None else preprocessing.voxel_mm3(affine)
    voxel_ml = None if voxel_mm3 is None else voxel_mm3 / 1000
    return replace(scan, masks=[measured_mask(label, case.image, names, voxel_ml) for label in case.labels])


# ---- synthesised heads -----------------------------------------------------------------------------------------------


def seen_in_label_maps(
    maps: Sequence[LabelMap],
    config: SegmenterConfig,
    synthesis: SynthesisConfig,
    examples: int | None = None,
    on_scan: OnScan = lambda done, total: None,
) -> Seen | None:
    """What a training from label maps has seen.

    Intensities and shares are those of whole synthetic T1-like heads, and contrast is that of slabs of such heads,
    because the model is for T1. Voxel sizes are the synthesis' range. Volumes are those of the label maps, and fields
    of view reach from the smallest brain, as after a brain extraction, to the largest head, both times the synthesis'
    range of scales. Structures are measured one by one and as tissues, because masks may be of either.

    Args:
        maps: The training anatomies.
        config: The model's configuration.
        synthesis: Ranges of the synthesis.
        examples: Number of examples of the training; not more heads than that are measured.
        on_scan: Called after every head.
    """
    groups = _groups(config)
    t1_like = replace(synthesis, t1_share=1.0)
    count = SYNTHETIC_SCANS if examples is None else min(SYNTHETIC_SCANS, examples)
    if count < FEWEST_SCANS:
        return None
    scans = []
    for number in range(count):
        anatomy = maps[number % len(maps)]
        seed = derive_seed("seen", f"{anatomy.name}-{number // len(maps)}")
        scans.append(_measured_head(anatomy, torch.Generator().manual_seed(seed), t1_like, config, groups))
        on_scan(len(scans), count)
    seen = Seen.of(scans)
    return None if seen is None else _with_sizes(seen, maps, config, groups, synthesis)


def _groups(config: SegmenterConfig) -> list[dict[str, list[int]]]:
    """Name -> values of the classes, and the same of the tissues to which structures belong."""
    classes = CLASSES[config.data.brain_classes]
    value = {name: number for number, name in enumerate(classes.names)}
    groups = [{name: [number] for name, number in value.items() if number}]
    if config.data.brain_classes == "structures":
        groups.append({tissue: [value[name] for name in names] for tissue, names in tissues_of(classes).items()})
    return groups


def _measured_head(
    anatomy: LabelMap,
    generator: torch.Generator,
    synthesis: SynthesisConfig,
    config: SegmenterConfig,
    groups: Sequence[Mapping[str, Sequence[int]]],
) -> MeasuredScan:
    """A synthetic head of `_COARSE_MM`, with the contrast of a fine slab of another one of the same anatomy."""
    classes, fine = CLASSES[config.data.brain_classes], build.preprocessing(config.preprocessing)
    assert fine.spacing_mm is not None  # `segmenter_data` refuses others
    i, j, k = (max(_COARSE_MM, mm) for mm in fine.spacing_mm)
    coarse = replace(fine, spacing_mm=(i, j, k))
    image, values, affine = synthetic_scan(anatomy, generator, synthesis, classes, _COARSE_MM)
    volume = Volume(image[None], affine)
    scaled, placement = coarse.apply(volume, _finder_box(values, volume, config))
    label = apply_labels(volume.like(values[None]), placement)[0]
    shares = _measured_groups(label, scaled, groups).image_share
    centre = anatomy.brain.double().mean(0) + torch.tensor([0.0, 0.0, _SLAB_ABOVE_MM])
    image, values, affine = synthetic_scan(anatomy, generator, synthesis, classes, part=(_SLAB, centre))
    slab = Volume(image[None], affine)
    i, j, k = slab.shape
    sharp, placement = fine.apply(slab, ((0, i), (0, j), (0, k)))
    contrast = _measured_groups(apply_labels(slab.like(values[None]), placement)[0], sharp, groups).contrast
    scan = measured(volume, scaled, fine.orientation, config.network.dims)
    return replace(scan, masks=[MeasuredMask({}, shares, contrast)])


def _measured_groups(label: Tensor, image: Tensor, groups: Sequence[Mapping[str, Sequence[int]]]) -> MeasuredMask:
    """Shares and contrast of the classes in each of the groups."""
    masks = []
    for group in groups:
        table = torch.zeros(256, dtype=torch.uint8)
        for number, values in enumerate(group.values(), 1):
            table[list(values)] = number
        masks.append(measured_mask(table[label.long()], image, dict(enumerate(group, 1)), None))
    shares = {name: share for mask in masks for name, share in mask.image_share.items()}
    return MeasuredMask({}, shares, {name: others for mask in masks for name, others in mask.contrast.items()})


def _finder_box(values: Tensor, volume: Volume, config: SegmenterConfig) -> Box | None:
    """The box that a finder without errors finds in a synthetic head; None for a model without a finder."""
    if config.finder is None:
        return None
    mm = config.finder.spacing_mm
    _, placement = Preprocessing(config.preprocessing.orientation, (mm, mm, mm)).apply(volume)
    brain = apply_labels(volume.like((values > 0).to(torch.uint8)[None]), placement)[0] > 0
    return box_of(brain, placement, config.finder.margin_mm)


def _with_sizes(
    seen: Seen,
    maps: Sequence[LabelMap],
    config: SegmenterConfig,
    groups: Sequence[Mapping[str, Sequence[int]]],
    synthesis: SynthesisConfig,
) -> Seen:
    """The ranges of synthetic heads with the voxel sizes of the synthesis and the sizes of the label maps."""
    low, high = synthesis.scale
    table = class_values(CLASSES[config.data.brain_classes])
    counts = [torch.bincount(table[one.index.long()].flatten(), minlength=int(table.max()) + 1) for one in maps]
    volumes = {}
    for name, values in ((name, values) for group in groups for name, values in group.items()):
        ml = [float(count[list(values)].sum()) / 1000 for count in counts]
        volumes[name] = _range(low**3 * min(ml), high**3 * max(ml))
    brains = [(one.brain.amax(0) - one.brain.amin(0) + 1).tolist() for one in maps]
    fields = {
        axis: _range(low * min(brain[n] for brain in brains), high * max(one.index.shape[n] for one in maps))
        for n, axis in enumerate(seen.field_of_view_mm)
    }
    voxels = dict.fromkeys(fields, synthesis.spacing)
    return replace(seen, voxel_mm=voxels, field_of_view_mm=fields, volume_ml=volumes)


def _range(low: float, high: float) -> Range:
    return float(f"{low:.4g}"), float(f"{high:.4g}")


# ---- healthy scans ---------------------------------------------------------------------------------------------------


def seen_in_healthy(
    scans: Sequence[HealthyScan], config: AnomalyConfig, on_scan: OnScan = lambda done, total: None
) -> Seen | None:
    """What the training scans of an anomaly model measured."""
    size = config.generator.data.shape
    preprocessing = build.image_preprocessing(config.generator.preprocessing, size)
    chosen = spread(sorted(scans, key=lambda scan: scan.name))
    measured_scans = []
    for done, scan in enumerate(chosen, 1):
        volume = read_volume(scan.image)
        measured_scans.append(measured(volume, preprocessing.apply(volume)[0], preprocessing.orientation, len(size)))
        on_scan(done, len(chosen))
    return Seen.of(measured_scans)


# ---- older models ----------------------------------------------------------------------------------------------------


def store_seen(
    model: str | Path, data: Data, *, lengths: bool = True, on_scan: OnScan = lambda done, total: None
) -> Seen:
    """Measure the training scans of a trained model again, and write what it has seen into its card.

    The weights stay as they are. The training scans are those that the card does not name as held out; a card without
    names has the split of its configuration.

    Args:
        model: Model directory, run folder or installed name.
        data: The data of its training: a folder or a list.
        lengths: Store voxel sizes, fields of view and volumes. Off for data whose voxel sizes are made up.
        on_scan: Called after every scan.

    Raises:
        ModelError: No usable model.
        UsageError: A model of another kind, or too few training scans.
        InputError: Unusable data.
    """
    saved = load_model_files(model)
    seen = _measured_again(saved, folder_or_files(data), on_scan)
    if seen is None:
        raise UsageError(f"{data}: too few training scans of {saved.path} to tell ranges")
    if not lengths:
        seen = replace(seen, voxel_mm={}, field_of_view_mm={}, volume_ml={})
    add_seen(saved.path, seen)
    return seen


def _measured_again(saved: SavedModel, data: Path | FileList, on_scan: OnScan) -> Seen | None:
    if saved.card.get("task") == "anomaly":
        anomaly = typed_config(saved, AnomalyConfig)
        section = anomaly.generator.data
        source = healthy_source(data, None, None, (section.test_images, section.validation_images))
        trained = [scan for scan in source.scans if source.splits[scan.patient] == "train"]
        return seen_in_healthy(trained, anomaly, on_scan)
    if saved.card.get("task") != "mask" or saved.card.get("method") == "label-efficient":
        raise UsageError(f"{saved.path}: is no model of train-segmenter or train-anomaly")
    config = typed_config(saved, SegmenterConfig)
    if config.data.source == "brain-labelmaps":
        if isinstance(data, FileList):
            raise UsageError("label maps: give their folder")
        cases = [Case(scan_name(file), file, file, scan_name(file)) for file in find_scans(data)]
        classes = CLASSES[config.data.brain_classes]
        maps = [load_label_map(case.label, classes) for case in _trained(saved, config, cases)]
        return seen_in_label_maps(maps, config, SynthesisConfig(), on_scan=on_scan)
    folder = find_cases(data)
    chosen = spread(sorted(_trained(saved, config, folder.cases), key=lambda case: case.name))
    labels = {int(value): str(name) for value, name in saved.card["labels"].items()}
    expected = CaseFormat(config.data.channels, len(labels), config.data.merge_labels, folder.labels)
    preprocessing, dims = build.preprocessing(config.preprocessing), config.network.dims
    with TemporaryDirectory() as cache:
        prepared = prepare(chosen, preprocessing, expected, Path(cache), on_scan, slices=dims == 2)
        return seen_in_cases(prepared, folder, preprocessing, labels, dims)


def _trained(saved: SavedModel, config: SegmenterConfig, cases: Sequence[Case]) -> list[Case]:
    """The cases that a model was trained on."""
    held_out = saved.card["training"].get("held_out")
    if held_out is None:
        section = config.data
        names = split_by_hash(cases, section.test_cases, section.validation_cases, section.calibration_cases).train
        return [case for case in cases if case.name in names]
    digests = {name for side in held_out.values() for name in side}
    return [case for case in cases if digest(case.name) not in digests]
