"""patients.csv: which cases of a data folder are of one patient and must stay together."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Collection
from pathlib import Path

from medseg_diffusion.errors import InputError

FILE = "patients.csv"
COLUMNS = ("case", "patient")


def read_patients(file: Path, cases: Collection[str]) -> dict[str, str]:
    """Case -> patient, for every one of ``cases``.

    Rows of other cases are left out, with a warning that counts them.

    Args:
        file: CSV with the columns case and patient.
        cases: names of the cases, without suffix.

    Raises:
        InputError: an unreadable file, a case that it names twice, or one of ``cases`` that it lacks.
    """
    patients = read_columns(file, *COLUMNS)
    if missing := sorted(set(cases) - set(patients)):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(
            file, f"no row for case {missing[0]}{more}", "one row for each case", "add its patient, or drop the case"
        )
    if extra := len(set(patients) - set(cases)):
        warnings.warn(f"{file}: {extra} of {len(patients)} rows are of cases that are not there", stacklevel=2)
    return {case: patients[case] for case in cases}


def read_columns(file: Path, key: str, value: str) -> dict[str, str]:
    """The text in one column of a CSV file by the text in another one, in the order of rows.

    Raises:
        InputError: an unreadable file, a missing column, an empty field, or a key that stands there twice.
    """
    expected, remedy = f"a CSV file with the columns {key} and {value}", "correct the file, or remove it"
    try:
        with file.open(newline="", encoding="utf-8-sig") as opened:
            reader = csv.DictReader(opened)
            if not {key, value} <= set(reader.fieldnames or ()):
                raise InputError(file, f"the columns {', '.join(reader.fieldnames or ()) or 'none'}", expected, remedy)
            rows = [((row[key] or "").strip(), (row[value] or "").strip()) for row in reader]
    except FileNotFoundError as error:
        raise InputError(file, "no such file", expected, "check the path") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(file, f"an unreadable file ({error})", expected, remedy) from error
    values: dict[str, str] = {}
    for name, text in rows:
        if not name or not text:
            raise InputError(file, f"a row without {value if name else key}", "both in every row", remedy)
        if name in values:
            raise InputError(file, f"{key} {name} twice", f"one row for each {key}", "remove one of the rows")
        values[name] = text
    return values


def patients_of(folder: Path, cases: Collection[str]) -> dict[str, str]:
    """`read_patients` of the file in a data folder, or beside a folder of images or masks; empty without one."""
    beside = [folder.parent] if folder.resolve().name in ("images", "imagesTr", "labels", "labelsTr", "masks") else []
    for place in (folder, *beside):
        if (place / FILE).is_file():
            return read_patients(place / FILE, cases)
    return {}
