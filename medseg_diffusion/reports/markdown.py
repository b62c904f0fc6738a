"""Short summaries in GitHub-flavoured Markdown, for a pull request."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from importlib.metadata import version

from .page import Cell, Table

_SIGNS = re.compile(r"[\\`*_{}\[\]|~]")
"""What Markdown gives a meaning within a line; a backslash takes it away."""
_REFERENCES = re.compile(r"(?<=[@#])(?=\w)|(?<=www)(?=\.)|(?<=:)(?=//)", re.IGNORECASE)
"""Where GitHub sees a person, an issue or an address. It looks at the finished text, where escaping does not help."""
_WORD_JOINER = "\u2060"  # has no width
_MANY = 50
"""Rows of a table that are written; a summary of more says how many it leaves out."""


def markdown_page(
    title: str, sentences: Sequence[str], tables: Sequence[str], warnings: Sequence[str] = (), command: str = ""
) -> str:
    """A summary: a heading, sentences, tables, what the reader should know, and the command.

    Args:
        title: Plain text, as sentences and warnings; they are escaped.
        sentences: What was compared, and what came out.
        tables: From `markdown_table`.
        warnings: One sentence each.
        command: The command line; empty shows none.
    """
    made = f"medseg-diffusion {version('medseg-diffusion')}"
    parts = [f"### {markdown_text(title)}", " ".join(map(markdown_text, sentences)), *tables]
    parts.append("\n".join(f"- {markdown_text(warning)}" for warning in warnings))
    if command:
        parts.append(f"<details><summary>{made}</summary>\n\n{markdown_code(command)}\n\n</details>")
    else:
        parts.append(f"<sub>{made}</sub>")
    return "\n\n".join(filter(None, parts)) + "\n"


def markdown_table(table: Table) -> str:
    """A `Table` with the notes of its cells in parentheses, and the flags behind the name of a row."""
    numeric = [i for i in range(1, len(table.columns)) if i not in table.text_columns]
    head = [" | ".join(map(markdown_text, table.columns))]
    head.append(" | ".join("---:" if i in numeric else "---" for i in range(len(table.columns))))
    body = []
    for row in table.rows[:_MANY]:
        cells = [_cell(cell) for cell in row.cells]
        if row.flags:
            cells[0] += f" ({markdown_text(', '.join(row.flags))})"
        body.append(" | ".join(cells))
    text = "\n".join(f"| {line} |" for line in (*head, *body))
    left_out = len(table.rows) - _MANY
    return f"{text}\n\n{left_out} more rows are in the page." if left_out > 0 else text


def _cell(cell: Cell) -> str:
    note = markdown_text(cell.note.replace("\n", ", "))
    return markdown_text(cell.text) + (f" ({note})" if note else "")


def markdown_text(text: str) -> str:
    """Text in one line that reads as it stands: nothing in it becomes markup, a link, a mention or a table's border."""
    flat = _REFERENCES.sub(_WORD_JOINER, " ".join(text.split()))
    return escape(_SIGNS.sub(r"\\\g<0>", flat), quote=False).replace("$", "&#36;")


def markdown_code(text: str) -> str:
    """A block of code that its content cannot end."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{' '.join(text.splitlines())}\n{fence}"
