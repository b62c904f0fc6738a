"""What the pages of `medseg segment` and `medseg anomaly` share: the scans of a call, worst first."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from medseg_diffusion.volumes.paths import is_image

from .page import Cell, Row, Table, relative_link
from .summary import format_number
from .viewer import Viewer

OUTLIERS_FROM = 5
"""Fewest scans among which outliers are named."""
FENCE = 3.0
"""Outer fences: with the inner ones (1.5), a third of ten ordinary scans may be flagged."""
_ORDER = ("failed", "above healthy", "empty mask", "unlike training", "members disagree", "outlier", "warning")


def millilitres(volume: float) -> str:
    """Three decimals for small structures, fewer for large ones: about four significant digits."""
    return format_number(volume, 3 if abs(volume) < 10 else 2 if abs(volume) < 100 else 1)


def percent(share: float) -> str:
    """A share in percent with two digits, from 10 % on with three; never with an exponent."""
    value = 100 * share
    if 0 < value < 0.0001:
        return "below 0.0001 %"
    return f"{value:.2g} %" if value < 10 else f"{value:.3g} %"


@dataclass(frozen=True)
class Size:
    """How a page and the command line show the size of a class.

    Attributes:
        quantity: "volume" or "area".
        unit: Its unit.
        per_ml: So many of that unit are one millilitre.
        text: A volume in ml -> its number in that unit.
    """

    quantity: str
    unit: str
    per_ml: float
    text: Callable[[float], str]


VOLUME = Size("volume", "ml", 1.0, millilitres)
AREA = Size("area", "pixels", 1000.0, lambda volume_ml: f"{1000 * volume_ml:.0f}")
"""Of image files, which have no pixel size: a nominal voxel of 1 mm stands for a pixel, and is 0.001 ml."""


def size_of(scan: Path | str) -> Size:
    """How the sizes of a scan's classes are shown: pixels for an image file, millilitres for all others."""
    return AREA if is_image(scan) else VOLUME


@dataclass(frozen=True)
class ScanOfBatch:
    """A scan on a page.

    Attributes:
        name: Its name, distinct within the page.
        status: "done", "skipped" (finished by an earlier call) or "failed".
        flags: Reasons to look at it, in one or two words each.
        remarks: What the reader should know, one sentence each; of a failed scan, its error.
        seconds: Time that it took; 0 if it is not known.
        model: The model that made its results; empty if it is not known.
        files: Kind -> name of a file, and its address relative to the page.
    """

    name: str
    status: str
    flags: Sequence[str] = ()
    remarks: Sequence[str] = ()
    seconds: float = 0.0
    model: str = ""
    files: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def size(self) -> Size:
        """How the sizes of its classes are shown."""
        return size_of(self.files.get("scan", ("", ""))[0])


def common_size(scans: Sequence[ScanOfBatch]) -> Size:
    """That of all scans of a page: `medseg segment --report` refuses image files beside volumes."""
    return scans[0].size if scans else VOLUME


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """The names of files, or their paths below the folder that holds all of them if two have the same name."""
    if len({path.name for path in paths}) == len(paths):
        return [path.name for path in paths]
    whole = [Path(os.path.abspath(path)) for path in paths]
    try:
        common = Path(os.path.commonpath(whole))
    except ValueError:  # on several drives of Windows
        return [str(path) for path in whole]
    return [path.relative_to(common).as_posix() for path in whole]


def linked(files: Mapping[str, Path], page: Path) -> dict[str, tuple[str, str]]:
    """Kind -> name of a file, and its address relative to the folder of a page: both can be moved together."""
    return {kind: (path.name, relative_link(path, page.parent)) for kind, path in files.items()}


def outliers(values: Sequence[float]) -> list[bool]:
    """Which values lie more than `FENCE` times the quartiles' distance beyond the quartiles (Tukey's outer fences).

    None among fewer than `OUTLIERS_FROM` values, or if the quartiles are equal. NaN is none.
    """
    known = [value for value in values if np.isfinite(value)]
    if len(known) < OUTLIERS_FROM:
        return [False] * len(values)
    q1, q3 = np.quantile(known, [0.25, 0.75])
    reach = FENCE * (q3 - q1)
    return [bool(reach > 0 and (value < q1 - reach or value > q3 + reach)) for value in values]


def rank(flags: Iterable[str]) -> tuple[int, int]:
    """Sorts scans: those with the most urgent flag first, of equal ones those with more flags."""
    places = [next((i for i, word in enumerate(_ORDER) if word in flag), len(_ORDER)) for flag in flags]
    return (min(places, default=len(_ORDER) + 1), -len(places))


def overview(
    columns: Sequence[str],
    scans: Sequence[ScanOfBatch],
    numbers: Sequence[Sequence[Cell]],
    viewer: Viewer | None,
    main: str,
) -> Table:
    """The table of all scans, in their order.

    Args:
        columns: Headings of the numbers.
        scans: The scans.
        numbers: The cells of each scan.
        viewer: Shows some of the scans; None leaves it out.
        main: Kind of the file that stands in the column "File".
    """
    shown = () if viewer is None else viewer.names
    remarks = any(scan.remarks for scan in scans)
    rows = []
    for place, (scan, cells) in enumerate(zip(scans, numbers, strict=True), 1):
        _, link = scan.files.get(main, ("", ""))
        row = [Cell(scan.name, link=f"#scan-{place}"), *cells, Cell(main if link else "\u2013", link=link)]
        row += [Cell(" ".join(scan.remarks))] if remarks else []
        rows.append(Row(row, scan.flags, scan.name if scan.name in shown else ""))
    headings = ["Scan", *columns, "File", *(["Remarks"] if remarks else [])]
    texts = (len(headings) - 1,) if remarks else ()
    return Table("Scans", headings, rows, sortable=True, text_columns=texts, stacked=True)


def models_of(scans: Sequence[ScanOfBatch], made: Mapping[str, str]) -> dict[str, str]:
    """How the scans of a page were made: what is known of those of this call, and the models of the finished ones."""
    known = {scan.model for scan in scans if scan.status == "skipped" and scan.model} - {made.get("model", "")}
    earlier = ", ".join(sorted(known))
    if "model" not in made:
        return {"model": earlier or "not known", **made}
    return {**made, **({"finished scans by": earlier} if earlier else {})}


def common_remarks(scans: Sequence[ScanOfBatch]) -> list[str]:
    """The remarks that all computed scans share; on a page with several scans they stand at its beginning."""
    computed = [scan.remarks for scan in scans if scan.status == "done"]
    if len(computed) < 2:
        return []
    return [remark for remark in computed[0] if all(remark in remarks for remarks in computed)]
