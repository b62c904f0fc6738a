"""Labelled scans as training examples: preprocessed once, cropped to windows and augmented."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from medseg_diffusion.errors import InputError, listed, remark
from medseg_diffusion.volumes.io import read_labels, read_volume, stacked
from medseg_diffusion.volumes.paths import file_states
from medseg_diffusion.volumes.preprocessing import Preprocessing, apply_labels
from medseg_diffusion.volumes.volume import Volume, orientation_transform

from .augmentation import Augmenter
from .case_store import CaseStore
from .cases import Case
from .draws import UNFINISHED

_CLASS_NUMBERS = 16
"""Labels without names are expected to be below this number, and there are at most this many."""


@dataclass(frozen=True)
class CaseFormat:
    """What the images and labels of a model's cases must look like.

    Attributes:
        channels: channels of the image.
        num_classes: labels are 0 to ``num_classes`` - 1.
        merge_labels: read every label above 0 as 1. ``num_classes`` is 2 then.
        named_labels: the label values that have a name. With ``merge_labels`` only these are accepted; if no label has
            a name, values that look like class numbers, or a single value beside 0, are accepted.
    """

    channels: int
    num_classes: int
    merge_labels: bool = False
    named_labels: Collection[int] = ()


@dataclass(frozen=True, eq=False)
class PreparedCase:
    """A case on the model's grid: ``image`` (C, *S) float32 and ``label`` (*S) integers.

    ``further_labels`` are those of other readers. The tensors are memory-mapped if the case is in a ``store``.
    """

    name: str
    image: Tensor
    label: Tensor
    further_labels: tuple[Tensor, ...] = ()
    store: CaseStore | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles a stored case by its name alone: tensors would be copied for worker processes."""
        if self.store is not None:
            return stored_case, (self.store, self.name)
        return PreparedCase, (self.name, self.image, self.label, self.further_labels)

    @property
    def labels(self) -> tuple[Tensor, ...]:
        """The labels of all readers."""
        return (self.label, *self.further_labels)


def stored_case(store: CaseStore, name: str) -> PreparedCase:
    """The case ``name`` of a store."""
    image, label, *others = store.tensors(name)
    return PreparedCase(name, image, label, tuple(others), store)


def read_case(case: Case, expected: CaseFormat) -> tuple[Volume, Volume]:
    """Read a case's image and the labels of its first reader and check them.

    Raises:
        InputError: an unusable file, labels on another grid than their image, or an unexpected label value.
    """
    volume = read_case_image(case, expected.channels)
    return volume, read_case_labels(case.label, volume, expected)


def read_case_image(case: Case, channels: int) -> Volume:
    """Read a case's image from one file, or from one file for each channel.

    Raises:
        InputError: an unusable file, files on different grids, or another number of channels.
    """
    if not case.further_channels:
        return read_volume(case.image, channels=channels)
    if len(case.images) != channels:
        raise InputError(
            case.image,
            f"{len(case.images)} files, one for each channel",
            f"{channels} channels",
            "set data.channels in the configuration",
        )
    return stacked(read_volume(path) for path in case.images)


def read_case_labels(path: Path, volume: Volume, expected: CaseFormat) -> Volume:
    """Read one reader's labels of the image ``volume`` and check them.

    Raises:
        InputError: an unusable file, labels on another grid than their image, or an unexpected label value.
    """
    labels = read_labels(path)
    volume.require_same_grid(labels)
    return checked_labels(labels, path, expected)


def checked_labels(labels: Volume, path: Path | None, expected: CaseFormat) -> Volume:
    """The labels, merged if ``expected`` says so; ``path`` is named in messages.

    Raises:
        InputError: an unexpected label value.
    """
    if expected.merge_labels:
        _check_merged(labels, path, expected.named_labels)
        labels = labels.like(labels.data.clamp(max=1))
    _check_values(labels, path, expected.num_classes)
    return labels


def require_slices(volume: Volume, orientation: str | None) -> None:
    """InputError for a volume whose slices across the third axis of ``orientation`` are only one voxel wide."""
    transform = orientation_transform(volume.affine, orientation or volume.axcodes)
    shape = [volume.shape[axis] for axis in np.argsort(transform[:, 0])]
    if 1 in shape[:2] and shape[2] > 1:
        raise InputError(
            volume.source,
            f"a single slice across another axis ({' x '.join(map(str, shape))} voxels, {orientation or 'as stored'})",
            "slices across the third axis for a 2D model",
            "give the whole volume, or a model that was trained on slices of this direction",
        )


def prepare(
    cases: Sequence[Case],
    preprocessing: Preprocessing,
    expected: CaseFormat,
    cache: Path,
    on_case: Callable[[int, int], None] = lambda done, total: None,
    slices: bool = False,
) -> list[PreparedCase]:
    """Preprocess every case once and memory-map the results.

    A warning names the cases whose labels lie partly beyond the middle that the preprocessing keeps (`crop_centre`).

    Args:
        cases: the cases.
        preprocessing: the model's preprocessing.
        expected: format of the cases.
        cache: folder of the preprocessed cases (`medseg_diffusion.data.case_store`).
        on_case: called with (cases done, cases in all).
        slices: the model is 2D: `require_slices`.

    Raises:
        InputError: as `read_case`, and `require_slices` if ``slices`` is set.
    """
    store = CaseStore(cache)
    kind = np.uint8 if expected.num_classes <= 256 else np.int32
    cut_off = []
    for i, case in enumerate(cases):
        state = _state(case, preprocessing, expected, slices)
        if not store.holds(case.name, state):
            volume, readers = _read(case, preprocessing, expected, slices)
            image, placement = preprocessing.apply(volume)
            if preprocessing.crop_centre is not None and any(map(placement.leaves_out, readers)):
                cut_off.append(case.name)
            labels = [apply_labels(labels, placement)[0].numpy().astype(kind) for labels in readers]
            store.add(case.name, state, [image.numpy().astype(np.float32), *labels])
        on_case(i + 1, len(cases))
    if cut_off and preprocessing.crop_centre is not None:
        width, height = preprocessing.crop_centre
        remark(
            f"{len(cut_off)} of {len(cases)} cases have labels beyond the middle {width} x {height} voxels, which are "
            f"left out ({listed(cut_off, 3)}); set preprocessing.crop_centre if that is not meant"
        )
    return [stored_case(store, case.name) for case in cases]


def require_usable(
    cases: Sequence[Case],
    preprocessing: Preprocessing,
    expected: CaseFormat,
    cache: Path,
    on_case: Callable[[int, int], None] = lambda done, total: None,
    slices: bool = False,
) -> None:
    """Check cases that are used only after the training by the rules of `prepare`, which has the same arguments.

    The store notes which cases are checked, so that a resumed run does not read them again.

    Raises:
        InputError: as `prepare`.
    """
    store = CaseStore(cache)
    for i, case in enumerate(cases):
        state = f"checked {_state(case, preprocessing, expected, slices)}"
        if not store.holds(case.name, state):
            _read(case, preprocessing, expected, slices)
            store.add(case.name, state, [])
        on_case(i + 1, len(cases))


def _state(case: Case, preprocessing: Preprocessing, expected: CaseFormat, slices: bool) -> str:
    """A text that changes if one of the case's files or the way of reading it changes."""
    files = file_states((*case.images, *case.labels))
    reading = [expected.channels, expected.num_classes, expected.merge_labels, sorted(expected.named_labels)]
    return json.dumps([*files, repr(preprocessing), *reading, slices])


def _read(case: Case, preprocessing: Preprocessing, expected: CaseFormat, slices: bool) -> tuple[Volume, list[Volume]]:
    """The image of a case and the labels of all its readers, checked."""
    volume = read_case_image(case, expected.channels)
    if slices:
        require_slices(volume, preprocessing.orientation)
    return volume, [read_case_labels(path, volume, expected) for path in case.labels]


def require_every_class(cases: Sequence[PreparedCase], labels: Mapping[int, str], folder: Path | str) -> None:
    """InputError if a class of ``labels`` (value -> name) has no voxel in any of the training cases."""
    values = set()
    for case in cases:
        for label in case.labels:
            values.update(torch.unique(label).tolist())
        if len(values) == len(labels):
            return
    empty = [f"{value} ({labels[value]})" for value in sorted(set(labels) - values) if value]
    if empty:
        raise InputError(
            folder,
            f"no voxel of label {', '.join(empty)} in the {len(cases)} training cases",
            "every class in at least one of them",
            "add cases that show it, or take it out of the names of the labels",
        )


def _check_merged(labels: Volume, path: Path | None, named: Collection[int]) -> None:
    """InputError for values that are not to be merged: see `CaseFormat`. Levels of grey are refused."""
    values = torch.unique(labels.data).tolist()
    unnamed = [value for value in values if value and value not in named]
    if named and unnamed:
        expected = f"one of {', '.join(map(str, sorted(named)))}"
        raise InputError(path, f"label {unnamed[0]}", expected, "correct the label file or the names in dataset.json")
    if not named and len(values) > 2 and values[-1] >= _CLASS_NUMBERS:
        raise InputError(
            path,
            f"{len(values)} different values up to {values[-1]}, as of a greyscale mask that was interpolated",
            f"labels below {_CLASS_NUMBERS}, or one value beside 0",
            "make it again from the original mask, with nearest-neighbour resizing; or name its labels in dataset.json",
        )


def _check_values(labels: Volume, path: Path | None, num_classes: int) -> None:
    largest = int(labels.data.max())
    if largest < num_classes:
        return
    values = torch.unique(labels.data)
    if len(values) > max(num_classes, _CLASS_NUMBERS):
        found = f"{len(values)} different values up to {largest}, as of a greyscale mask that was interpolated"
        remedy = "make it again from the original mask, with nearest-neighbour resizing"
    elif len(values) == num_classes == 2:
        found, remedy = f"the values 0 and {largest}", f"divide the mask by {largest}"
    else:
        found, remedy = f"label {largest}", "correct the label file or the names of the labels"
    raise InputError(path, found, f"labels 0 to {num_classes - 1}", remedy)


class MaskExamples:
    """Random windows of labelled scans, one per scan and epoch.

    Args:
        cases: the prepared cases.
        window: size in voxels, 3 numbers, or 2 for slices across the third axis. Smaller cases are padded.
        foreground_share: share of the windows that are centred near a labelled voxel. Such a slice contains one.
        augmenter: changes each window, or None.
        augment_batches: leaves the changes to `finish`, which is called with batches on the training's device.

    Raises:
        InputError: a case of one slice for windows of three axes.
    """

    def __init__(
        self,
        cases: Sequence[PreparedCase],
        window: Sequence[int],
        foreground_share: float = 0.33,
        augmenter: Augmenter | None = None,
        augment_batches: bool = False,
    ) -> None:
        self.cases = list(cases)
        self.window = tuple(window)
        self.foreground_share = foreground_share
        self.augmenter = augmenter
        self.augment_batches = augment_batches
        for case in self.cases:
            if len(self.window) == 3 and 1 in case.label.shape:
                size = " x ".join(str(n) for n in case.label.shape if n > 1)
                raise InputError(case.name, f"a 2D image ({size})", "volumes for a 3D model", "set network.dims to 2")
        # One tensor for all cases and readers: worker processes share each tensor through a file of its own.
        positions = [torch.nonzero(label)[::7].to(torch.int32) for case in self.cases for label in case.labels]
        self.foreground = torch.cat(positions)
        self.ends = list(accumulate(len(part) for part in positions))
        self.first_label = list(accumulate((len(case.labels) for case in self.cases), initial=0))

    def __len__(self) -> int:
        return len(self.cases)

    def example(self, index: int, generator: torch.Generator) -> Mapping[str, Tensor]:
        """The "image" (C, *window) float32 and "label" (*window) int64.

        With ``augment_batches`` also the seed that `finish` takes.
        """
        case, window = self.cases[index], (*self.window, 1)[:3]
        # With one reader nothing is drawn.
        reader = int(torch.randint(len(case.labels), (), generator=generator)) if case.further_labels else 0
        labels = case.labels[reader]
        positions = self._labelled(self.first_label[index] + reader)
        labelled = len(positions) > 0 and float(torch.rand((), generator=generator)) < self.foreground_share
        centre = positions[int(torch.randint(len(positions), (), generator=generator))].tolist() if labelled else None
        corner = [
            self._start(size, width, None if centre is None else centre[axis], generator)
            for axis, (size, width) in enumerate(zip(case.label.shape, window, strict=True))
        ]
        cut = tuple(slice(start, start + width) for start, width in zip(corner, window, strict=True))
        image, label = case.image[(slice(None), *cut)].float(), labels[cut].long()
        missing = [width - size for size, width in zip(label.shape, window, strict=True)]
        if any(missing):
            pad = [n for m in reversed(missing) for n in (m // 2, m - m // 2)]
            image, label = F.pad(image[None], pad, mode="replicate")[0], F.pad(label, pad)
        if len(self.window) == 2:
            image, label = image[..., 0], label[..., 0]
        if self.augmenter is not None and self.augment_batches:
            seed = torch.tensor(self.augmenter.draw_seed(generator))
            return {"image": image.contiguous(), "label": label.contiguous(), UNFINISHED: seed}
        if self.augmenter is not None:
            image, label = self.augmenter(image, label, generator)
        return {"image": image.contiguous(), "label": label.contiguous()}

    def finish(self, batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """A batch of examples after the changes that `example` has left."""
        finished = {name: value for name, value in batch.items() if name != UNFINISHED}
        if self.augmenter is None or UNFINISHED not in batch:
            return finished
        seeds = batch[UNFINISHED].tolist()
        changed = [self.augmenter.changed(*one) for one in zip(batch["image"], batch["label"], seeds, strict=True)]
        images, labels = zip(*changed, strict=True)
        return {**finished, "image": torch.stack(images), "label": torch.stack(labels)}

    def _labelled(self, label: int) -> Tensor:
        """(n, 3) positions of labelled voxels of the ``label``-th of all labels."""
        return self.foreground[self.ends[label - 1] if label else 0 : self.ends[label]]

    @staticmethod
    def _start(size: int, width: int, centre: int | None, generator: torch.Generator) -> int:
        """First voxel of a window of ``width`` along an axis of ``size``: near ``centre``, or anywhere if None."""
        room = size - width
        if room <= 0:
            return 0
        if centre is None:
            return int(torch.randint(room + 1, (), generator=generator))
        jitter = int(torch.randint(-(width // 4), width // 4 + 1, (), generator=generator)) if width > 3 else 0
        return min(max(centre - width // 2 + jitter, 0), room)
