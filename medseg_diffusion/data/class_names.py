"""Names of the classes in label maps: from the files beside them, or else from the headers of NIfTI files."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from medseg_diffusion.errors import InputError
from medseg_diffusion.volumes.io import stored_labels
from medseg_diffusion.volumes.outputs import MASKS, SEGMENTATION
from medseg_diffusion.volumes.paths import scan_name

from .cases import label_names


def class_names(masks: Sequence[Path]) -> tuple[dict[int, str], list[str]]:
    """Label value -> class name of label maps, as far as files tell it, and sentences on contradictions.

    The names of a mask are in the first of these files that exists: `NAME_dseg.tsv` beside it, or `dseg.tsv` in its
    folder (BIDS: columns index and name); `NAME_statistics.json` of `medseg segment`; `dataset.json` in its folder or
    the one above (Medical Segmentation Decathlon, nnU-Net). Without any, they are in the mask's own header
    (`volumes.label_table`), which nobody corrects by hand. It counts before statistics, which may be those of an
    earlier mask. If files name a label differently, the first name counts.

    Args:
        masks: The label maps, in order of trust.

    Raises:
        InputError: A file of names that cannot be read.
    """
    names: dict[int, tuple[str, Path]] = {}
    others: dict[tuple[int, str], Path] = {}
    read: set[Path] = set()
    for mask in masks:
        source = next((path for path in _sources(mask) if path.is_file()), mask)
        if source in read:
            continue
        read.add(source)
        for value, name in (_read(source) if source != mask else stored_labels(mask)).items():
            if names.setdefault(value, (name, source))[0] != name:
                others.setdefault((value, name), source)
    remarks = [
        f"Label {value} is {names[value][0]} in {names[value][1]}, but {name} in {source}; the first name is used."
        for (value, name), source in others.items()
    ]
    return {value: name for value, (name, _) in sorted(names.items())}, remarks


def _sources(mask: Path) -> Iterator[Path]:
    """The files that may name the labels of a mask, in order of trust; itself only where statistics are beside it."""
    case = scan_name(mask)
    for ending in (*MASKS, "_dseg"):
        case = case.removesuffix(ending)
    yield mask.with_name(f"{case}_dseg.tsv")
    yield mask.with_name("dseg.tsv")
    statistics = mask.with_name(case + SEGMENTATION["statistics"])
    yield mask if statistics.is_file() and stored_labels(mask) else statistics
    for folder in (mask.parent, mask.absolute().parent.parent):
        yield folder / "dataset.json"


def _read(source: Path) -> Mapping[int, str]:
    expected, remedy = "names of labels", "correct the file, or name the classes with --label VALUE=NAME"
    try:
        if source.suffix == ".tsv":
            return names_in_table(source)
        content = json.loads(source.read_text(encoding="utf-8"))
        if source.name == "dataset.json":
            return {value: name for value, name in label_names(content["labels"]).items() if value}
        return _from_statistics(content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(source, f"an unreadable entry ({error!r})", expected, remedy) from error


def names_in_table(source: Path) -> dict[int, str]:
    """Label value above 0 -> name, by the columns index and name of a table of BIDS.

    Raises:
        OSError, ValueError: No such table.
    """
    try:
        with source.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
    except csv.Error as error:  # no ValueError
        raise ValueError(str(error)) from error
    if not rows or any(row.get("index") is None or row.get("name") is None for row in rows):
        raise ValueError("expected the columns index and name")
    return {int(row["index"]): row["name"].strip() for row in rows if int(row["index"])}


def misnamed(known: Mapping[int, str], stored: Mapping[int, str]) -> tuple[int, int] | None:
    """The first label above 0 of ``stored`` whose name is rather that of another label of ``known``, and that label.

    Names need not be equal: "Anterior" is the "anterior hippocampus". None if the names do not contradict each other.
    """

    def words(name: str) -> set[str]:
        return set(name.lower().replace("_", " ").replace("-", " ").split())

    for value, name in stored.items():
        shared = {label: len(words(name) & words(other)) for label, other in known.items()}
        best = max(shared.values())
        if value and best > shared.get(value, 0):
            return value, next(label for label, count in shared.items() if count == best)
    return None


def _from_statistics(content: Mapping[str, Any]) -> dict[int, str]:
    """The classes of `medseg segment`; files of earlier versions list them in the order of their labels 1, 2, ..."""
    classes = content["classes"].items()
    return {int(entry.get("label", place)): str(name) for place, (name, entry) in enumerate(classes, 1)}
