"""Folders on disk to lists of labelled cases, and their split by patient."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from medseg_diffusion.errors import InputError
from medseg_diffusion.volumes.io import read_map
from medseg_diffusion.volumes.paths import is_image, scan_files, scan_name

COLOURS = ("red", "green", "blue")


Side = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Case:
    """One labelled scan. ``patient`` groups the cases that must stay on one side of a split."""

    name: str
    image: Path
    label: Path
    patient: str


@dataclass(frozen=True)
class CaseFolder:
    """The cases of a folder, with the names of its labels and channels.

    Attributes:
        cases: sorted by name.
        labels: label value to name, background 0 included; empty where the folder does not say.
        channels: names of the image channels, one per channel.
    """

    cases: tuple[Case, ...]
    labels: dict[int, str]
    channels: tuple[str, ...]


def find_cases(folder: Path) -> CaseFolder:
    """Reads a Decathlon folder (dataset.json) or an image-mask folder (images/ beside labels/ or masks/).

    In an image-mask folder a mask has its image's name, with or without "_seg" or "_segmentation", and any suffix
    (image.jpg, image.png); a subfolder of images/ names the patient.

    Raises:
        InputError: no such folder, neither layout, an image without its label, or no case at all.
    """
    if not folder.is_dir():
        raise InputError(folder, "no such folder", "a data folder", "check the path given with --data")
    if (folder / "dataset.json").is_file():
        return _decathlon(folder)
    for images, labels in (("images", "labels"), ("images", "masks"), ("imagesTr", "labelsTr")):
        if (folder / images).is_dir() and (folder / labels).is_dir():
            return _image_mask(folder / images, folder / labels)
    raise InputError(
        folder,
        "neither dataset.json nor images/ with labels/ or masks/",
        "a Decathlon folder or an image-mask folder",
        "arrange the scans in one of these layouts",
    )


def _decathlon(folder: Path) -> CaseFolder:
    source = folder / "dataset.json"
    try:
        info = json.loads(source.read_text())
        pairs = [(folder / entry["image"], folder / entry["label"]) for entry in info["training"]]
        labels = {int(value): str(name) for value, name in info.get("labels", {}).items()}
        modality = info.get("modality", info.get("channel_names", {"0": "image"}))
        channels = tuple(str(modality[key]) for key in sorted(modality, key=int))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            source, f"an unreadable entry ({error!r})", "a Decathlon dataset.json", "correct the file"
        ) from error
    cases = [Case(scan_name(image), image, label, scan_name(image)) for image, label in pairs]
    return CaseFolder(_checked(folder, cases), labels, channels)


def _image_mask(images: Path, labels: Path) -> CaseFolder:
    groups = [images, *sorted(path for path in images.iterdir() if path.is_dir())]
    masks = {
        (path.parent.relative_to(labels), re.sub("_seg(mentation)?$", "", scan_name(path))): path
        for group in [labels, *sorted(p for p in labels.iterdir() if p.is_dir())]
        for path in scan_files(group)
    }
    cases = []
    for group in groups:
        for image in scan_files(group):
            name, relative = scan_name(image), group.relative_to(images)
            label = masks.get((relative, name), labels / relative / image.name)
            patient = name if group == images else group.name
            cases.append(Case(name if group == images else f"{group.name}/{name}", image, label, patient))
    checked = _checked(images.parent, cases)
    first = checked[0].image
    colour = is_image(first) and len(read_map(first).data) == len(COLOURS)
    return CaseFolder(checked, {}, COLOURS if colour else ("image",))


def _checked(folder: Path, cases: list[Case]) -> tuple[Case, ...]:
    if not cases:
        raise InputError(folder, "no labelled case", "at least one image with its label", "check the folder's layout")
    for case in cases:
        for path in (case.image, case.label):
            if not path.is_file():
                raise InputError(
                    path,
                    "no such file",
                    f"the image and the label of case {case.name}",
                    "add the file or drop the case",
                )
    names = [case.name for case in cases]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(
            folder, f"two cases named {twice[0]}", "names that differ before the suffix", "rename one of them"
        )
    return tuple(sorted(cases, key=lambda case: case.name))


@dataclass(frozen=True)
class Split:
    """Names of the cases on each side; no patient is on two sides."""

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]

    def held_out(self) -> dict[str, list[str]]:
        """The `digest` of every case of both held-out sides, sorted."""
        return {side: sorted(map(digest, getattr(self, side))) for side in ("validation", "test")}


@dataclass(frozen=True)
class Bounds:
    """The largest SHA-256 of a name on the test and on the validation side; empty where nothing is.

    A model that holds them tells a name that it was trained on from one that it never saw, in whatever folder.
    """

    test: str
    validation: str

    @classmethod
    def of(cls, sides: Mapping[str, Side]) -> Bounds:
        """Those of sides by hash (`split_of_patients`)."""
        last = {part: max((_rank(name) for name, side in sides.items() if side == part), default="") for part in _HELD}
        return cls(last["test"], max(last.values()))

    def count(self, names: Iterable[str]) -> tuple[int, int]:
        """How many different ones of ``names`` are on the test and on the validation side."""
        ranks = {_rank(name) for name in names}
        test = sum(rank <= self.test for rank in ranks)
        return test, sum(rank <= self.validation for rank in ranks) - test


_HELD: tuple[Side, ...] = ("test", "validation")


def _rank(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def digest(name: str) -> str:
    """What a model may hold of a case's name, which could tell the patient: 16 hexadecimal digits of its SHA-256."""
    return _rank(name)[:16]


def split_by_hash(cases: Sequence[Case], test: int, validation: int) -> Split:
    """Splits by the rank of the SHA-256 of the patients' names: the smallest test, then validation, then training.

    The side of a patient depends on the names alone, never on the order of files or on a seed. ``test`` and
    ``validation`` count patients.

    Raises:
        InputError: no patient would be left to train on.
    """
    sides = split_of_patients([case.patient for case in cases], test, validation)
    parts = (
        tuple(case.name for case in cases if sides[case.patient] == side) for side in ("train", "validation", "test")
    )
    return Split(*parts)


def split_of_patients(patients: Sequence[str], test: int, validation: int) -> dict[str, Side]:
    """The side of every patient, as `split_by_hash` chooses it.

    Raises:
        InputError: no patient would be left to train on.
    """
    ordered = sorted(set(patients), key=_rank)
    if test < 0 or validation < 0 or len(ordered) <= test + validation:
        raise InputError(
            None,
            f"{len(ordered)} patients",
            f"more than {test} for testing and {validation} for validation",
            "lower what the configuration holds out: data.test_cases and validation_cases, or test_images and "
            "validation_images",
        )
    return {
        name: "test" if i < test else "validation" if i < test + validation else "train"
        for i, name in enumerate(ordered)
    }
