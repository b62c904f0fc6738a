"""Groups of cases by a column of a table, such as the site or the scanner."""

from __future__ import annotations

import csv
from collections.abc import Collection, Mapping
from pathlib import Path

from medseg_diffusion.errors import InputError

from .patients import read_columns


def read_strata(
    file: Path, column: str, cases: Collection[str], patients: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Case -> value of a column, for every one of ``cases``; rows of other cases are not used.

    Args:
        file: CSV with ``column`` and the column case. If it has no column case, its column patient is used.
        column: The column with the groups.
        cases: Names of the cases, without suffix.
        patients: Case -> patient, for a table of patients.

    Raises:
        InputError: An unreadable file, a missing column, or a case or patient that has no row.
    """
    key = "case"
    if patients and "case" not in _columns(file):
        key = "patient"
    groups = read_columns(file, key, column)
    keys = {case: patients[case] if key == "patient" and patients else case for case in cases}
    if missing := sorted({name for name in keys.values() if name not in groups}):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(
            file,
            f"no row for {key} {missing[0]}{more}",
            f"one row for each {key}",
            f"add its {column}, or drop the case",
        )
    return {case: groups[name] for case, name in keys.items()}


def _columns(file: Path) -> list[str]:
    """The first row of a CSV file; empty if it cannot be read, which is refused later with its reason."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as opened:
            return next(csv.reader(opened), [])
    except (OSError, UnicodeDecodeError, csv.Error):
        return []
