"""The difference between two rows of a benchmark on the same patients, with a bootstrap interval.

    python benchmarks/studies/paired_difference.py FIRST/cases.csv SECOND/cases.csv \
        [--column NAME] [--first KEY=VALUE...]

FIRST minus SECOND, averaged by patient. --first and --second choose rows of a file by their columns, such as steps=20.
Patients are resampled together with both of their values.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

from medseg_diffusion.metrics.statistics import mean_interval


def values(file: Path, column: str, chosen: Sequence[str]) -> dict[tuple[str, str], tuple[str, float]]:
    """(case, class) -> patient and value of the rows whose columns have the chosen values."""
    wanted = dict(entry.split("=", 1) for entry in chosen)
    found: dict[tuple[str, str], tuple[str, float]] = {}
    with file.open(newline="") as content:
        for row in csv.DictReader(content):
            if all(row[key] == value for key, value in wanted.items()):
                key = row["case"], row["class"]
                if key in found:
                    raise SystemExit(f"{file}: case {key[0]} occurs in several rows; choose one of them by its columns")
                found[key] = row["patient"], float(row[column])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs=2, type=Path, metavar="CASES.csv")
    parser.add_argument("--column", default="energy_distance")
    parser.add_argument("--first", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--second", nargs="*", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    first = values(options.files[0], options.column, options.first)
    second = values(options.files[1], options.column, options.second)
    if not first or set(first) != set(second):
        raise SystemExit(f"{len(first)} and {len(second)} rows, not of the same cases; nothing can be paired")
    differences = [first[key][1] - second[key][1] for key in first]
    patients = [first[key][0] for key in first]
    print(f"{options.column}: {mean_interval(differences, patients=patients)} over {len(set(patients))} patients")


if __name__ == "__main__":
    main()
