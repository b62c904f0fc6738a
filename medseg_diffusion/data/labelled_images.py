"""Labelled images as packed images with masks, for generators that are conditioned by masks.

Images and masks are read, checked and split by patient as those of segmenters (`cases`, `mask_examples`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from medseg_diffusion.errors import InputError, UsageError
from medseg_diffusion.files import whole_folder
from medseg_diffusion.volumes.fitting import labels_to_generator_grid, to_generator_grid
from medseg_diffusion.volumes.paths import file_states, is_image
from medseg_diffusion.volumes.preprocessing import Preprocessing, apply_labels

from .cases import Bounds, Case, CaseFolder, split_of_patients
from .image_cache import VERSION, PackedImages, Row, open_packed, to_levels, write_packed
from .image_files import FOREGROUND_SHARE
from .mask_examples import CaseFormat, read_case_image, read_case_labels, require_slices

MOST_CLASSES = 255
"""Masks are stored as uint8, of which one value is left for "no mask"."""


@dataclass(frozen=True)
class LabelledImages:
    """The labelled images of a training.

    Attributes:
        folder: The cases.
        names: Label value -> class name, background included.
        channels: Channels of the images.
        merge_labels: Read every label above 0 as 1.
        held_out: Number of patients in the test and in the validation split.
    """

    folder: CaseFolder
    names: Mapping[int, str]
    channels: int
    merge_labels: bool
    held_out: tuple[int, int]

    def __post_init__(self) -> None:
        if len(self.names) > MOST_CLASSES:
            raise UsageError(f"masks of {len(self.names)} classes; a generator takes at most {MOST_CLASSES}")

    @property
    def expected(self) -> CaseFormat:
        """What every case must look like."""
        return CaseFormat(self.channels, len(self.names), self.merge_labels, self.folder.labels)


def packed_labelled(
    source: LabelledImages,
    store: Path,
    size: Sequence[int],
    preprocessing: Preprocessing,
    *,
    skip_broken: bool = False,
    on_case: Callable[[int, int], None] = lambda done, total: None,
) -> PackedImages:
    """The images of a labelled folder with their masks. The first call packs them into ``store``; later ones open them.

    Of volumes, slices are images of their own (two sides), or the volume is (three sides). Slices that are almost empty
    are left out, unless something is labelled in them. An image of several readers is packed once with each mask.

    Args:
        source: the labelled images.
        store: folder of packed collections.
        size: two or three sides.
        preprocessing: the model's preprocessing.
        skip_broken: leave broken cases out instead of stopping.
        on_case: called with (cases done, cases in all).

    Raises:
        InputError: an unusable case, too few patients to hold out this many, or a class that no training mask shows.
    """
    cases = source.folder.cases
    splits = split_of_patients([case.patient for case in cases], *source.held_out)
    files = [path for case in cases for path in (*case.images, *case.labels)]
    expected = asdict(source.expected) | {"named_labels": sorted(source.folder.labels)}
    about: list[object] = [file_states(files), splits, sorted((case.name, case.patient) for case in cases)]
    about += [sorted(source.names.items()), expected, list(size), skip_broken, VERSION]
    key = hashlib.sha256(json.dumps([*about, asdict(preprocessing)]).encode()).hexdigest()[:16]
    folder = store / f"labelled-{'x'.join(map(str, size))}-{key}"
    near = cases[0].image.parent
    skipped: list[str] = []

    def rows() -> Iterator[Row]:
        seen: set[int] = set()
        for done, case in enumerate(cases, 1):
            try:
                images, masks = read_labelled(case, source.expected, size, preprocessing)
            except InputError:
                if not skip_broken:
                    raise
                skipped.append(case.name)
                continue
            if splits[case.patient] == "train":
                seen.update(torch.unique(masks).tolist())
            yield Row(case.name, -1, splits[case.patient], images.numpy(), masks.to(torch.uint8).numpy())
            on_case(done, len(cases))
        if empty := [f"{value} ({source.names[value]})" for value in sorted(set(source.names) - seen - {0})]:
            raise InputError(
                near,
                f"no voxel of label {', '.join(empty)} in the training cases",
                "every class in at least one of them",
                "add cases that show it, or take it out of the names of the labels",
            )

    if not (folder / "index.json").is_file():
        with whole_folder(folder) as temporary:
            names = [source.names[value] for value in sorted(source.names)]
            bounds, shape = Bounds.of(splits), (*size, source.channels)
            write_packed(temporary, rows(), near, shape, skipped=skipped, held_out=bounds, mask_classes=names)
    return open_packed(folder)


def oriented_for(preprocessing: Preprocessing, source: Path | None) -> Preprocessing:
    """The preprocessing that leaves an image file upright and not mirrored; that of volumes is as it was.

    Image files are read with ITK's axes (`volumes.raster`), and slices are turned as those of RAS volumes.
    """
    return replace(preprocessing, orientation="LAS") if source is not None and is_image(source) else preprocessing


def read_labelled(
    case: Case, expected: CaseFormat, size: Sequence[int], preprocessing: Preprocessing
) -> tuple[Tensor, Tensor]:
    """The images (n, *size, C) uint8 and masks (n, *size) of a case on the generator's grid.

    Raises:
        InputError: an unusable case.
    """
    volume = read_case_image(case, expected.channels)
    if len(size) == 2:
        require_slices(volume, preprocessing.orientation)
    elif 1 in volume.shape:
        raise InputError(case.image, "a 2D image", "volumes, for data.size of three sides", "give data.size one number")
    image, placement = oriented_for(preprocessing, case.image).apply(volume)
    images, masks = [], []
    for path in case.labels:
        label = apply_labels(read_case_labels(path, volume, expected), placement)[0]
        if len(size) == 3:
            images.append(image[None])
            masks.append(label[None])
            continue
        visible = (image > -0.9).movedim(-1, 0).flatten(1).float().mean(1) >= FOREGROUND_SHARE
        # A picture was taken for what is in it, however dark it is.
        kept = visible | label.flatten(0, 1).any(0) | (label.shape[-1] == 1)
        images.append(image.movedim(-1, 0)[kept])
        masks.append(label.movedim(-1, 0)[kept])
    on_grid = to_generator_grid(torch.cat(images).clamp(-1, 1), size)
    return to_levels(on_grid).movedim(1, -1), labels_to_generator_grid(torch.cat(masks), size)
