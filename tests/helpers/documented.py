"""The tables of docs/reference/files.md, to be compared with what the commands write.

A table's first column names columns of a CSV, or keys of a JSON file with dots between levels and [] for the items of a
list, such as `scans[].seconds`. `<class>` stands for any name. A key that is documented without any key below it may
hold anything.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "files.md"


def documented(heading: str) -> list[str]:
    """The names in the first columns of all tables under a heading of the page."""
    sections = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    (section,) = [one for one in sections if one.partition("\n")[0].strip() == heading]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])]


def names_in(path: Path) -> set[str]:
    """The columns of a CSV file, or the keys of a JSON file that hold no further keys."""
    if path.suffix in (".csv", ".tsv"):
        with path.open(newline="", encoding="utf-8") as file:
            return set(next(csv.reader(file, delimiter="," if path.suffix == ".csv" else "\t")))
    return set(_leaves(json.loads(path.read_text(encoding="utf-8"))))


def assert_documented(heading: str, *written: Path) -> None:
    """Files of one kind hold only what is documented, and together all that is documented.

    Several files cover what depends on options.
    """
    names = documented(heading)
    assert names, f"{heading}: no table in {PAGE}"
    assert len(set(names)) == len(names), f"{heading}: a name stands in the page twice"
    patterns = {name: re.compile(re.sub("<[^>]*>", ".+", re.escape(name))) for name in names}
    lowest = [name for name in names if not any(other.startswith((f"{name}.", f"{name}[]")) for other in names)]
    found = set().union(*map(names_in, written))
    undocumented = {
        name
        for name in found
        if not any(pattern.fullmatch(name) for pattern in patterns.values())
        and not any(patterns[one].fullmatch(parent) for one in lowest for parent in _parents(name))
    }
    assert not undocumented, f"{heading}: written, but not in the page: {sorted(undocumented)}"
    all_levels = found.union(*map(_parents, found))
    missing = [name for name in names if not any(patterns[name].fullmatch(one) for one in all_levels)]
    assert not missing, f"{heading}: in the page, but not written: {missing}"


def _leaves(value: Any, name: str = "") -> Iterator[str]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        for item in value:
            yield from _leaves(item, f"{name}[]")
    else:
        yield name


def _parents(name: str) -> set[str]:
    """The keys above a key."""
    return {name[: match.start()] for match in re.finditer(r"\.|\[\]", name)} - {""}
