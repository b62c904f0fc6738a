"""The Markdown of the repository: its blocks of code, its commands, its links and its anchors.

A block of shell or Python in README.md or docs/ is run by the tests. One that is not has a comment above it:

<!-- not run: REASON -->    is only parsed: it needs hours, a GPU, a package index, or data that is not there
<!-- slow: REASON -->       is run by the slow tests only; the folder of the tests has what it would have made
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
RECORDS = DOCS / "results"
"""Pages that record how their numbers were made: their commands took hours and are only parsed."""


def markdown_files() -> list[Path]:
    """All Markdown files of the repository, without those in hidden folders and the outputs of commands."""
    outputs = {"site", "build", "dist", "runs", "demo-output", "bench-output", "gpu-output"}
    return [
        path
        for path in sorted(ROOT.rglob("*.md"))
        if not any(part.startswith(".") or part in outputs for part in path.relative_to(ROOT).parts)
    ]


def pages() -> list[Path]:
    """README.md and the pages of docs/."""
    return [ROOT / "README.md", *(path for path in markdown_files() if path.is_relative_to(DOCS))]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# ---- code ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A fenced or indented block of code.

    Attributes:
        page: the file.
        line: line of its first line of code, from 1.
        language: bash, python, text, ...; an indented block is bash if it has a command.
        text: the code.
        mark: "not run", "slow" or "".
        reason: the reason in the comment.
    """

    page: Path
    line: int
    language: str
    text: str
    mark: str = ""
    reason: str = ""

    @property
    def place(self) -> str:
        return f"{name_of(self.page)}:{self.line}"


_FENCED = re.compile(r"^(?:<!-- ([a-z ]+): (.+?) -->\n)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?<=\n\n)((?: {4}[^\n]*\n)+)")


def blocks(page: Path) -> list[Block]:
    """The blocks of a page, in their order."""
    text = page.read_text(encoding="utf-8")
    found = [
        Block(page, text.count("\n", 0, match.start(4)) + 1, match[3], match[4], match[1] or "", match[2] or "")
        for match in _FENCED.finditer(text)
    ]
    without = _FENCED.sub(lambda match: "\n" * match[0].count("\n"), text)
    found += [
        Block(
            page,
            without.count("\n", 0, match.start()) + 1,
            "bash" if re.search(r"^ {4}medseg ", match[1], re.MULTILINE) else "text",
            re.sub(r"(?m)^ {4}", "", match[1]),
        )
        for match in _INDENTED.finditer(without)
    ]
    return sorted(found, key=lambda block: block.line)


@dataclass(frozen=True)
class Line:
    """A call of `medseg`: its words, and the file that its output goes to."""

    words: tuple[str, ...]
    output: str | None = None


def lines_of(script: str) -> list[str]:
    """The lines of a script, joined at backslashes, without empty ones and comments."""
    joined = re.sub(r"\s*\\\n\s*", " ", script)
    return [line.strip() for line in joined.splitlines() if line.strip() and not line.strip().startswith("#")]


def calls(line: str) -> Iterator[Line]:
    """The calls of `medseg` in a line of shell, also behind a launcher or an assignment."""
    reader = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    reader.whitespace_split = True
    reader.commenters = "#"
    words = list(reader)
    for start, word in enumerate(words):
        if word == "medseg":
            end = next((i for i in range(start, len(words)) if words[i] and set(words[i]) <= set("|&;<>")), len(words))
            to_file = end + 1 < len(words) and words[end] == ">"
            yield Line(tuple(words[start + 1 : end]), words[end + 1] if to_file else None)


def spans(page: Path) -> list[str]:
    """The commands in the running text, such as `medseg models list`."""
    text = _FENCED.sub("", page.read_text(encoding="utf-8"))
    return re.findall(r"`(medseg [^`]+)`", text)


# ---- links -----------------------------------------------------------------------------------------------------------


def _prose(text: str) -> str:
    """The text without code, in which brackets mean something else."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]+`", "code", text)


def links(text: str) -> list[str]:
    """The targets of links and pictures."""
    prose = _prose(text)
    return re.findall(r"\]\(([^)\s]+)\)", prose) + re.findall(r"^\[[^\]]+\]:\s*(\S+)", prose, re.MULTILINE)


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub and Python-Markdown make it for the headings that are used here."""
    heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading.strip().lower()))


def anchors(text: str) -> set[str]:
    """The anchors of all headings; a second heading of a name gets _1, a third _2."""
    found: set[str] = set()
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    for heading in re.findall(r"^#{1,6} +(.+?)\s*$", prose, re.MULTILINE):
        name, number = slug(heading), 0
        while (anchor := name if not number else f"{name}_{number}") in found:
            number += 1
        found.add(anchor)
    return found
