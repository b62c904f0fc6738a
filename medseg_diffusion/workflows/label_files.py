"""Names and colours of the classes beside the masks of a call: a file for the folder of all masks, or for one mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medseg_diffusion.data.class_names import names_in_table
from medseg_diffusion.errors import UsageError
from medseg_diffusion.files import write_files
from medseg_diffusion.reports.theme import class_colours
from medseg_diffusion.volumes.label_table import Label, LabelTable, printable_name, to_tsv
from medseg_diffusion.volumes.outputs import Outputs

from .results_table import table_folder

NAME = "dseg.tsv"
"""Name of the table that holds for all masks in its folder (BIDS)."""


def label_table(names: Mapping[int, str]) -> LabelTable:
    """The names of classes by value, with the colours that pictures and pages give them."""
    colours = class_colours(names)
    return {value: Label(name, colours[value]) for value, name in names.items()}


class LabelFiles:
    """The classes of a call's masks, and the table of them.

    Masks in one folder share the table `NAME` there, where also the table of volumes stands. A single scan has one of
    its own, since other scans of the folder may be segmented by other calls. Masks in several folders have none: NIfTI
    files hold the names themselves, and so do DICOM segmentations, which have numbers of their own.

    Args:
        names: Class value -> name, without background.
        masks: The masks of all scans of the call.
        folder: The folder given with -o, or None.

    Raises:
        UsageError: The folder has a table of other classes, by which its masks would be misread.
    """

    def __init__(self, names: Mapping[int, str], masks: Sequence[Path], folder: Path | None) -> None:
        self.names, self.table = dict(names), label_table(names)
        dicom = any(mask.suffix.lower() == ".dcm" for mask in masks)
        shared = None if dicom else table_folder(masks, folder)
        self._shared = None if shared is None else shared / NAME
        self._single, self._written = len(masks) == 1 and not dicom, False
        if self._shared is not None and self._shared.exists():
            if not self._holds_for(self._shared):
                raise UsageError(f"{self._shared}: names other classes; move it, or give -o another folder")
            self._written = True  # by an earlier call, perhaps in other colours

    def write(self, own: Path) -> Outputs:
        """Write the table, unless it is there; ``own`` is the file of a single scan. Only this one is returned."""
        path = own if self._single else self._shared
        if path is not None and not self._written:
            write_files(path.parent, {path.name: to_tsv(self.table)})
            self._written = True
        return {"label-table": own} if self._single else {}

    def _holds_for(self, table: Path) -> bool:
        try:
            return names_in_table(table) == {value: printable_name(name) for value, name in self.names.items()}
        except (OSError, ValueError, AttributeError):  # no table
            return False


def as_segments(labels: npt.NDArray[Any], names: Mapping[int, str]) -> npt.NDArray[Any]:
    """Labels as numbers of DICOM segments: n for the n-th of the classes."""
    return _replaced(labels, {value: number for number, value in enumerate(sorted(names), 1)})


def from_segments(segments: npt.NDArray[Any], names: Mapping[int, str]) -> npt.NDArray[Any]:
    """The labels of DICOM segments, see `as_segments`."""
    return _replaced(segments, dict(enumerate(sorted(names), 1)))


def _replaced(labels: npt.NDArray[Any], numbers: Mapping[int, int]) -> npt.NDArray[Any]:
    if all(value == number for value, number in numbers.items()):
        return labels
    table = np.zeros(max([*numbers, int(labels.max())]) + 1, labels.dtype)
    for value, number in numbers.items():
        table[value] = number
    return table[labels]
