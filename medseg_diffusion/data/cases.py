"""Finds the labelled cases of a folder and splits them by patient."""

from __future__ import annotations

import glob
import hashlib
import json
import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from medseg_diffusion.errors import InputError
from medseg_diffusion.volumes.inputs import scan_files
from medseg_diffusion.volumes.io import read_map
from medseg_diffusion.volumes.paths import is_image, scan_name

from .file_lists import FileList
from .patients import patients_of

COLOURS = ("red", "green", "blue")

SplitName = Literal["train", "validation", "test", "calibration"]


@dataclass(frozen=True)
class Case:
    """One labelled scan. All cases of one ``patient`` are in the same split.

    ``label`` is the first reader's; ``further_labels`` are those of other readers of the same image. ``image`` holds
    all channels, or the first one if the others are in ``further_channels``.
    """

    name: str
    image: Path
    label: Path
    patient: str
    further_labels: tuple[Path, ...] = ()
    further_channels: tuple[Path, ...] = ()

    @property
    def images(self) -> tuple[Path, ...]:
        """The files of the image, one for each channel or one for all."""
        return (self.image, *self.further_channels)

    @property
    def labels(self) -> tuple[Path, ...]:
        """The label files of all readers."""
        return (self.label, *self.further_labels)


@dataclass(frozen=True)
class CaseFolder:
    """The cases of a folder, with the names of its labels and channels.

    Attributes:
        cases: sorted by name.
        labels: label value -> name, background 0 included; empty if the folder does not name its labels.
        channels: names of the image channels, one per channel.
    """

    cases: tuple[Case, ...]
    labels: dict[int, str]
    channels: tuple[str, ...]


def find_cases(data: Path | FileList) -> CaseFolder:
    """Find the cases of a list of files, or of a folder.

    A folder is of the Decathlon (dataset.json), or has images/ beside labels/ or masks/ (an image-mask folder).

    A folder of nnU-Net is one of either kind: its images are named CASE_0000, CASE_0001, ..., one file for each
    channel, and version 2 lists its labels by name and no cases.

    In an image-mask folder, a mask has the name of its image, with or without "_seg" or "_segmentation". The suffixes
    may differ (image.jpg, image.png). Several readers have folders raters/1, raters/2, ... instead; a reader's file may
    be missing, and an empty mask is an answer. Beside labels/ or masks/ such folders are not read.

    patients.csv (`medseg_diffusion.data.patients`) says which cases are of one patient. Without it the name of a
    subfolder of images/ is the patient, else every case has a patient of its own.

    Raises:
        InputError: a missing folder, another layout, an image without a label, two masks of one case, a reader's mask
            without an image, no case at all, or a patients.csv that lacks a case.
    """
    if isinstance(data, FileList):
        return _listed(data)
    folder = data
    if not folder.is_dir():
        raise InputError(folder, "no such folder", "a data folder", "check the path")
    found = _cases(folder)
    patients = patients_of(folder, [case.name for case in found.cases])
    return replace(
        found, cases=tuple(replace(case, patient=patients.get(case.name, case.patient)) for case in found.cases)
    )


def _listed(files: FileList) -> CaseFolder:
    cases = []
    for entry in files.entries:
        if not entry.labels:
            raise InputError(entry.images[0], "no labels", "a label map of every image", "list pairs (image, label)")
        first, *others = entry.labels
        image, *channels = entry.images
        cases.append(Case(entry.name, image, first, entry.patient, tuple(others), tuple(channels)))
    return CaseFolder(tuple(sorted(cases, key=lambda case: case.name)), {}, _channels(cases))


def _cases(folder: Path) -> CaseFolder:
    """The cases by the layout of the folder alone."""
    if (folder / "dataset.json").is_file():
        return _decathlon(folder)
    for images, labels in (("images", "labels"), ("images", "masks"), ("imagesTr", "labelsTr")):
        if (folder / images).is_dir() and (folder / labels).is_dir():
            return _image_mask(folder / images, folder / labels)
    if (folder / "images").is_dir() and (folder / "raters").is_dir():
        return _several_readers(folder / "images", folder / "raters")
    raise InputError(
        folder,
        "neither dataset.json nor images/ with labels/, masks/ or raters/",
        "a Decathlon folder or an image-mask folder",
        "arrange the scans in one of these layouts",
    )


def _decathlon(folder: Path) -> CaseFolder:
    source = folder / "dataset.json"
    try:
        info = json.loads(source.read_text())
        if "training" not in info and "channel_names" in info:
            return _nnunet(folder, info)
        pairs = [(folder / entry["image"], folder / entry["label"]) for entry in info["training"]]
        labels = label_names(info.get("labels", {}))
        modality = info.get("modality", info.get("channel_names", {"0": "image"}))
        channels = tuple(str(modality[key]) for key in sorted(modality, key=int))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            source, f"an unreadable entry ({error!r})", "a Decathlon dataset.json", "correct the file"
        ) from error
    cases = []
    for image, label in pairs:
        name = scan_name(image)
        # nnU-Net's version 1 lists CASE.nii.gz, but its files are CASE_0000.nii.gz, ...
        first, *others = [image] if image.is_file() else _channel_files(image.parent, name) or [image]
        cases.append(Case(name, first, label, name, further_channels=tuple(others)))
    return CaseFolder(_checked(folder, cases), labels, channels)


_CHANNEL = re.compile(r"_\d{4}$")


def _channel_files(folder: Path, name: str) -> list[Path]:
    """nnU-Net's files NAME_0000, NAME_0001, ... of a case."""
    return sorted(path for path in folder.glob(f"{glob.escape(name)}_[0-9][0-9][0-9][0-9].*") if path.is_file())


def _nnunet(folder: Path, info: Mapping[str, Any]) -> CaseFolder:
    """A raw folder of nnU-Net, version 2: labels by name, and no list of cases.

    Regions of several labels overlap, but the files hold labels. These are trained, with names from the regions.
    """
    labels = label_names(info["labels"])
    found = _image_mask(folder / "imagesTr", folder / "labelsTr")
    names = info["channel_names"]
    return replace(found, labels=labels, channels=tuple(str(names[key]) for key in sorted(names, key=int)))


def label_names(labels: Mapping[str, Any]) -> dict[int, str]:
    """Label value -> class name from the ``labels`` of a dataset.json: of the Decathlon, or of nnU-Net, version 2.

    Raises:
        ValueError, TypeError, AttributeError: another content.
    """
    if all(isinstance(name, str) for name in labels.values()):
        return {int(value): str(name) for value, name in labels.items()}
    regions = {
        str(name): frozenset([value] if isinstance(value, int) else map(int, value))
        for name, value in labels.items()
        if name != "ignore"
    }
    return _names_in_regions(regions)


def _names_in_regions(regions: Mapping[str, frozenset[int]]) -> dict[int, str]:
    """The name of each label: the smallest region that holds it, without the regions inside of that one.

    With whole tumour {1, 2, 3} and core {2, 3}, label 1 is the whole tumour without core, and 2 and 3 are core 2 and
    core 3.
    """
    names: dict[int, str] = {}
    for value in sorted(frozenset().union(*regions.values())):
        holding = {name: values for name, values in regions.items() if value in values}
        own = [name for name in holding if not any(values < holding[name] for values in holding.values())]
        common = frozenset.intersection(*(holding[name] for name in own))
        inside = {name: values for name, values in regions.items() if values < common}
        outer = [name for name in inside if not any(inside[name] < values for values in inside.values())]
        names[value] = " and ".join(own) + (f" without {' and '.join(outer)}" if outer else "")
    alike = [name for name in names.values() if list(names.values()).count(name) > 1]
    return {value: f"{name} {value}" if name in alike else name for value, name in names.items()}


def case_of_mask(name: str) -> str:
    """The case of a mask, whose ``name`` is its path without suffix: the name without "_seg" or "_segmentation"."""
    return re.sub("_seg(mentation)?$", "", name)


def case_of_image(name: str, cases: Container[str]) -> str:
    """The case of an image: its name, without nnU-Net's number of a channel if only the shorter name is a case.

    Args:
        name: path without suffix in the folder of images.
        cases: `case_of_mask` of all masks.
    """
    plain = _CHANNEL.sub("", name)
    return plain if name not in cases and plain in cases else name


def _image_mask(images: Path, labels: Path) -> CaseFolder:
    masks = _masks(labels, [labels, *sorted(path for path in labels.iterdir() if path.is_dir())])
    by_case: dict[str, list[Path]] = {}
    for group in [images, *sorted(path for path in images.iterdir() if path.is_dir())]:
        for image in scan_files(group):
            by_case.setdefault(case_of_image(_name_in(images, image), masks), []).append(image)
    cases = []
    for name, (first, *others) in by_case.items():
        label = masks.get(name, labels / first.relative_to(images))
        cases.append(Case(name, first, label, name.partition("/")[0], further_channels=tuple(others)))
    checked = _checked(images.parent, cases)
    return CaseFolder(checked, {}, _channels(checked))


def _masks(folder: Path, groups: Iterable[Path]) -> dict[str, Path]:
    """The masks in a folder and its ``groups`` by case.

    Raises:
        InputError: two masks of one case.
    """
    masks: dict[str, Path] = {}
    for path in (path for group in groups for path in scan_files(group)):
        case = case_of_mask(_name_in(folder, path))
        if case in masks:
            raise InputError(
                folder,
                f"two masks of the case {case}, {masks[case].name} and {path.name}",
                "one mask for each case",
                "move the other one out of the folder",
            )
        masks[case] = path
    return masks


def _name_in(folder: Path, file: Path) -> str:
    return file.relative_to(folder).with_name(scan_name(file)).as_posix()


def _several_readers(images: Path, raters: Path) -> CaseFolder:
    """Cases whose readers have a folder each."""
    folders = sorted((path for path in raters.iterdir() if path.is_dir()), key=lambda path: (len(path.name), path.name))
    masks = [_masks(one, [one]) for one in folders]
    cases = []
    for image in scan_files(images):
        name = scan_name(image)
        labels = [reader[name] for reader in masks if name in reader]
        if not labels:
            raise InputError(
                image, f"no mask in any of the {len(folders)} folders of {raters}", "the mask of at least one reader",
                "add it (an empty one where the reader found nothing), or drop the image",
            )  # fmt: skip
        cases.append(Case(name, image, labels[0], name, tuple(labels[1:])))
    names = {case.name for case in cases}
    for reader in masks:
        if alone := sorted(set(reader) - names):
            raise InputError(reader[alone[0]], "a mask without an image", f"an image {alone[0]} in {images}", "add it")
    return CaseFolder(_checked(images.parent, cases), {}, _channels(cases))


def _channels(cases: Sequence[Case]) -> tuple[str, ...]:
    """Names of the channels of the first image."""
    if cases and cases[0].further_channels:
        return tuple(f"channel {i}" for i in range(len(cases[0].images)))
    first = cases[0].image if cases else None
    colour = first is not None and is_image(first) and len(read_map(first).data) == len(COLOURS)
    return COLOURS if colour else ("image",)


def _checked(folder: Path, cases: list[Case]) -> tuple[Case, ...]:
    if not cases:
        raise InputError(folder, "no labelled case", "at least one image with its label", "check the folder's layout")
    for case in cases:
        others = [scan_name(path) for path in case.further_channels]
        first = _CHANNEL.sub("", scan_name(case.image))
        if others != [f"{first}_{number:04d}" for number in range(1, len(case.images))]:
            raise InputError(
                case.image,
                f"the further channels {', '.join(others)}",
                f"{first}_0000, {first}_0001, ... without a gap",
                "add the missing file",
            )
        for path in (*case.images, *case.labels):
            if not path.is_file():
                raise InputError(
                    path,
                    "no such file",
                    f"the image and the label of case {case.name}",
                    "add the file or drop the case",
                )
    counts = Counter(case.name for case in cases)
    if twice := sorted(name for name, count in counts.items() if count > 1):
        raise InputError(
            folder, f"two cases named {twice[0]}", "names that differ before the suffix", "rename one of them"
        )
    return tuple(sorted(cases, key=lambda case: case.name))


def middle_cases(cases: Sequence[Case]) -> list[Case]:
    """One case of each patient: the middle one by name."""
    groups: dict[str, list[Case]] = {}
    for case in sorted(cases, key=lambda case: case.name):
        groups.setdefault(case.patient, []).append(case)
    return [group[len(group) // 2] for group in groups.values()]


@dataclass(frozen=True)
class Split:
    """Names of the cases of each split. No patient is in two splits."""

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]
    calibration: tuple[str, ...] = ()

    def held_out(self) -> dict[str, list[str]]:
        """The `digest` of every case that is not in the training split, sorted; no calibration split if it is empty."""
        names = ("validation", "test", *(["calibration"] if self.calibration else []))
        return {split: sorted(map(digest, getattr(self, split))) for split in names}


@dataclass(frozen=True)
class Bounds:
    """The largest SHA-256 of a patient's name in the test and in the validation split; empty if neither has one.

    A model stores these bounds. They tell for any name, in any folder, whether the patient was held out.
    """

    test: str
    validation: str

    @classmethod
    def of(cls, splits: Mapping[str, SplitName]) -> Bounds:
        """The bounds of the splits by patient that `split_of_patients` makes."""
        last = {
            held_out: max((_sha256(name) for name, split in splits.items() if split == held_out), default="")
            for held_out in _HELD_OUT
        }
        return cls(last["test"], max(last.values()))

    def count(self, names: Iterable[str]) -> tuple[int, int]:
        """The number of distinct ``names`` in the test and in the validation split."""
        hashes = {_sha256(name) for name in names}
        test = sum(value <= self.test for value in hashes)
        return test, sum(value <= self.validation for value in hashes) - test


_HELD_OUT: tuple[SplitName, ...] = ("test", "validation")


def _sha256(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def digest(name: str) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a case's name.

    A model stores this instead of the name, which could identify the patient.
    """
    return _sha256(name)[:16]


def split_by_hash(cases: Sequence[Case], test: int, validation: int, calibration: int = 0) -> Split:
    """Split cases by the SHA-256 of their patients' names.

    The patients with the smallest values are the test split, the next ones the validation split and the calibration
    split, and the rest the training split. A patient's split depends on the names alone, not on the order of files or
    on a seed.

    Args:
        cases: the cases.
        test: number of patients in the test split.
        validation: number of patients in the validation split.
        calibration: number of patients in the calibration split.

    Raises:
        InputError: no patient would be left to train on.
    """
    splits = split_of_patients([case.patient for case in cases], test, validation, calibration)
    names = get_args(SplitName)
    return Split(**{name: tuple(case.name for case in cases if splits[case.patient] == name) for name in names})


def split_of_patients(
    patients: Sequence[str], test: int, validation: int, calibration: int = 0
) -> dict[str, SplitName]:
    """Patient -> split, as `split_by_hash` assigns it.

    Raises:
        InputError: no patient would be left to train on.
    """
    ordered = sorted(set(patients), key=_sha256)
    if min(test, validation, calibration) < 0 or len(ordered) <= test + validation + calibration:
        parts = [f"{test} for testing", f"{validation} for validation"]
        parts += [f"{calibration} for calibration"] if calibration else []
        raise InputError(
            None,
            f"{len(ordered)} patients",
            f"more than {', '.join(parts[:-1])} and {parts[-1]}",
            "lower what the configuration holds out: data.test_cases, validation_cases and calibration_cases, or "
            "test_images and validation_images",
        )
    held_out: tuple[tuple[SplitName, int], ...] = (
        ("test", test),
        ("validation", validation),
        ("calibration", calibration),
    )
    sides = [name for name, count in held_out for _ in range(count)]
    return {name: sides[i] if i < len(sides) else "train" for i, name in enumerate(ordered)}
