"""Names and colours of the classes beside the masks of a call: a file for the folder of all masks, or for one mask."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
        UsageError: A folder of masks has a table of other classes, by which they would be misread.
    """

    def __init__(self, names: Mapping[int, str], masks: Sequence[Path], folder: Path | None) -> None:
        self.names, self.table = dict(names), label_table(names)
        self._single, self._written = len(masks) == 1, False
        self._dicom = any(mask.suffix.lower() == ".dcm" for mask in masks)
        place = None if self._dicom else table_folder(masks, folder)
        self._shared = None if place is None else place / NAME
        if self.names and not self._dicom and not self._single:
            for each in sorted({mask.parent for mask in masks} | ({place} if place is not None else set())):
                self._refuse_other(each / NAME)

    def write(self, own: Path) -> Outputs:
        """Write the table of a mask before the mask. ``own`` is the file of this mask alone; only this one is returned.

        Several scans have such a file from an earlier call for one of them. It counts before the shared table.

        Raises:
            UsageError: Another call has written a table of other classes since this one began.
        """
        if self._dicom:
            return {}
        if self._shared is not None and not self._written:
            self._refuse_other(self._shared)
            if not self._shared.exists():  # one in other colours stays
                self._write(self._shared)
            self._written = True
        if not self._single and not own.exists():
            return {}
        self._write(own)
        return {"label-table": own}

    def _write(self, path: Path) -> None:
        write_files(path.parent, {path.name: to_tsv(self.table)})

    def _refuse_other(self, table: Path) -> None:
        if not table.exists():
            return
        try:
            stored = names_in_table(table)
        except (OSError, ValueError):
            stored = {}
        if stored != {value: printable_name(name) for value, name in self.names.items()}:
            raise UsageError(
                f"{table}: names other classes than those of this call ({few(self.names.values())}); move it, or give "
                "-o another folder"
            )


def few(names: Iterable[str]) -> str:
    """Names for a message: at most four, or the first three and the number of the others."""
    listed = list(names)
    return ", ".join(listed if len(listed) <= 4 else [*listed[:3], f"{len(listed) - 3} more"])


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
