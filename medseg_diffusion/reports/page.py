"""What all pages share: rendering, tables that sort and filter, and plots that follow the theme.

A page is one HTML file that contains its styles, scripts and pictures and loads nothing else.
"""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from markupsafe import Markup

from medseg_diffusion.errors import quiet_libraries
from medseg_diffusion.metrics.statistics import Interval

from .summary import format_number, versions
from .theme import PREDICTION, PREDICTION_ON_WHITE, REFERENCE, REFERENCE_ON_WHITE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, SOFT, LINE, ACCENT = "#1f2933", "#5b6874", "#dde2e7", "#0b63a5"
VARIABLES: Mapping[str, tuple[str, str]] = {
    "ink": (INK, "#e4e8ec"),
    "soft": (SOFT, "#9aa5b1"),
    "line": (LINE, "#333b44"),
    "accent": (ACCENT, "#6cb6ee"),
    "page": ("#f5f6f8", "#14181c"),
    "card": ("#ffffff", "#1c2126"),
    "warn": ("#fff6e0", "#332a14"),
    "warn-line": ("#e0b252", "#8a6d2c"),
    "reference": (REFERENCE_ON_WHITE, REFERENCE),
    "prediction": (PREDICTION_ON_WHITE, PREDICTION),
}
"""Name of a CSS variable -> its colour in the light and in the dark theme."""


@dataclass(frozen=True)
class Cell:
    """A cell of a `Table`.

    Attributes:
        text: What is shown.
        value: What the column is sorted by; None takes the text. NaN is sorted behind all numbers.
        note: Softer text after it, such as the ends of an interval.
        colour: CSS colour of a dot before it, for the name of a class.
        link: Address of a file, relative to the page.
    """

    text: str
    value: float | str | None = None
    note: str = ""
    colour: str = ""
    link: str = ""


@dataclass(frozen=True)
class Row:
    """A row of a `Table`.

    Attributes:
        cells: One for each column.
        flags: Reasons to look at it, in a few words each, shown in the first cell. Flagged rows can be shown alone.
        case: Name of the case that the page's viewer shows when the first cell is chosen; empty without a viewer.
    """

    cells: Sequence[Cell]
    flags: Sequence[str] = ()
    case: str = ""


@dataclass(frozen=True)
class Table:
    """A table of a page, for the macro ``table`` of macros.html.j2. Text stands in the first column, numbers after it.

    Attributes:
        name: Its name, distinct within the page; read aloud by screen readers.
        columns: Their headings.
        rows: In the order in which they are shown first.
        sortable: A heading sorts the rows when it is chosen; a field filters them.
        sorted_by: The column by which the rows are sorted already, ascending.
        text_columns: Further columns that hold text, by number.
        stacked: The note of a cell stands below its text.
    """

    name: str
    columns: Sequence[str]
    rows: Sequence[Row]
    sortable: bool = False
    sorted_by: int | None = None
    text_columns: Sequence[int] = ()
    stacked: bool = False


def number(value: float | None, digits: int = 3, note: str = "") -> Cell:
    """A cell with a number; a dash for one that does not exist."""
    value = math.nan if value is None else float(value)
    return Cell(format_number(value, digits), value, note)


def interval(mean: Interval, digits: int = 3) -> Cell:
    """A cell with a mean and the ends of its interval."""
    return number(mean.mean, digits, limits(mean, digits))


def interval_with_missing(mean: Interval, digits: int = 3) -> Cell:
    """`interval`, and below the ends how many values the mean lacks, if any."""
    return number(mean.mean, digits, "\n".join(filter(None, (limits(mean, digits), missing(mean)))))


def missing(mean: Interval) -> str:
    """How many values a mean lacks, such as "2 of 9 without"; empty if none."""
    return f"{mean.n_missing} of {mean.n + mean.n_missing} without" if mean.n_missing else ""


def limits(mean: Interval, digits: int = 3) -> str:
    """The ends of an interval, such as "0.81 to 0.92"; empty where there are none."""
    if math.isnan(mean.low):
        return ""
    return f"{format_number(mean.low, digits)} to {format_number(mean.high, digits)}"


def rules_table(rules: Mapping[str, str]) -> Table:
    """What the words of a page mean, and how its numbers are computed: word -> sentences."""
    rows = [Row([Cell(word), Cell(text)]) for word, text in rules.items()]
    return Table("What the numbers mean", ["Word", "Meaning"], rows, text_columns=(1,))


def plural(count: int, singular: str, several: str = "") -> str:
    """A number with its noun, such as "1 case" or "3 cases"."""
    return f"{count:,} {singular if count == 1 else several or singular + 's'}"


def relative_link(file: Path, folder: Path) -> str:
    """Address of a file for a page in a folder; empty if there is no relative way, as between two drives."""
    try:
        path = os.path.relpath(file.absolute(), folder.absolute())
    except ValueError:
        return ""
    return quote(os.fsencode(Path(path).as_posix()))


def render(
    template: str,
    *,
    command: str = "",
    date: str | None = None,
    made: Mapping[str, str] | None = None,
    rules: Table | None = None,
    **values: Any,
) -> str:
    """The text of a page.

    Args:
        template: File in templates/ that extends base.html.j2.
        command: The command line; empty shows none.
        date: Date and time; None takes the present.
        made: How it was made: name -> value, shown at the end with the versions.
        rules: How the numbers are computed, shown there, too; None leaves it out.
        values: Variables of the template. Text is escaped, so that a file name cannot become markup.
    """
    # Imported where used: segmenting without a report does not need it.
    from jinja2 import Environment, PackageLoader, StrictUndefined

    # autoescape=True, not select_autoescape: which decides by the suffix and would leave *.j2 unescaped.
    environment = Environment(
        loader=PackageLoader("medseg_diffusion.reports"),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(theme=VARIABLES)
    environment.filters["number"] = format_number
    when = date if date is not None else datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    numbers = versions()
    page = environment.get_template(template).render(
        date=when,
        version=numbers["medseg-diffusion"],
        versions=", ".join(f"{name} {number}" for name, number in numbers.items()),
        command=command,
        made=dict(made or {}),
        rules=rules,
        **values,
    )
    # Names of files may hold bytes that are no text; a page is UTF-8.
    return page.encode("utf-8", "replace").decode("utf-8")


def svg(figure: Figure, description: str) -> Markup:
    """A figure as an SVG element whose colours follow the page's light or dark theme.

    Args:
        figure: Drawn in the light colours of `theme.VARIABLES`, without a background.
        description: What it shows, for screen readers.
    """
    import matplotlib

    text = io.StringIO()
    # Text stays text, in the page's font. The salt gives the same figure the same names.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "medseg"}), quiet_libraries():
        figure.savefig(
            text, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    element = text.getvalue()
    element = element[element.index("<svg") + len("<svg") :]
    element = re.sub(r' (width|height)="[^"]*pt"', "", element, count=2)  # the page decides on the size
    element = re.sub(r"<style.*?</style>", "", element, flags=re.DOTALL)  # which would hold for the whole page
    used = set(re.findall(r"#([\w-]+)", element))
    element = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", element)
    element = re.sub(r'style="[^"]*"', lambda found: _in_theme(found[0]), element)
    return Markup('<svg role="img" aria-label="{}"').format(description) + Markup(element)


def _in_theme(style: str) -> str:
    """A style attribute of matplotlib with the page's font, and the names of colours in place of the light ones."""
    style = re.sub(r"font-family: [^;\"]*", "font-family: inherit", style)
    style = re.sub(r"(font: [\w ]*?[\d.]+px) [^;\"]*", r"\1 system-ui, sans-serif", style)
    for name, (light, _) in VARIABLES.items():
        style = style.replace(light.lower(), f"var(--{name})")
    return style
