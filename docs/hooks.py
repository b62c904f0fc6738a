"""What mkdocs does not do by itself: pages from the code, links that leave docs/, and equations without a network.

Some pages of the reference hold a line `<!-- generated: NAME -->`, which is replaced when the site is built. They are
never out of date, and there is nothing to regenerate by hand. `tests/docs` checks them without mkdocs, so mkdocs and
latex2mathml are imported where they are used.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "benchmarks/README.md": "explanation/benchmarks.md",
    **{
        f"medseg_diffusion/pretrained/{card.parent.name}/README.md": f"reference/models/{card.parent.name}.md"
        for card in sorted((ROOT / "medseg_diffusion" / "pretrained").glob("*/README.md"))
    },
}
"""Markdown files outside docs/ that are pages of the site, by their path in the repository."""

# ---- links -----------------------------------------------------------------------------------------------------------

_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s#]*)(#[^)\s]*)?\)")


def with_site_links(text: str, path: str, address: str | None = None) -> str:
    """The links of a file of the repository (its ``path``) as links between pages of the site.

    A link to a file that is no page becomes a link into the repository at ``address``, or text if no address is known.
    """
    here = PUBLISHED.get(path, path.removeprefix("docs/"))

    def link(match: re.Match[str]) -> str:
        image, name, target, anchor = match[1], match[2], match[3], match[4] or ""
        if not target or re.match(r"[a-z]+:", target):
            return match[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
        page = target.removeprefix("docs/") if target.startswith("docs/") else PUBLISHED.get(target)
        if page is not None and (ROOT / target).is_file():
            return f"{image}[{name}]({posixpath.relpath(page, posixpath.dirname(here) or '.')}{anchor})"
        return f"[{name}]({address.rstrip('/')}/{target}{anchor})" if address else name

    code: list[str] = []

    def put_aside(match: re.Match[str]) -> str:
        code.append(match[0])
        return f"\0{len(code) - 1}\0"

    text = re.sub(r"^```.*?^```|`[^`\n]+`", put_aside, text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"\0(\d+)\0", lambda match: code[int(match[1])], _LINK.sub(link, text))


# ---- commands --------------------------------------------------------------------------------------------------------


def commands() -> Iterator[tuple[str, str, Any]]:
    """Name, heading of the group and command of everything that `medseg` can do, in the order of its help."""
    import typer
    from medseg_cli.main import app

    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        if inner := getattr(command, "commands", None):
            yield from ((f"{name} {one}", command.rich_help_panel, inner[one]) for one in inner)
        else:
            yield name, command.rich_help_panel, command


def commands_page() -> str:
    """One section for each command: its sentence, its usage, and a table of its arguments and options."""
    lines, panel = [], None
    for name, heading, command in commands():
        if heading != panel:
            lines += [f"## {heading}", ""]
            panel = heading
        arguments, options = [], []
        with command.context_class(command, info_name=f"medseg {name}") as context:
            usage = re.sub(r"\{(\S+?)(\.\.\.)?\}\.\.\.", r"\1...", " ".join(command.collect_usage_pieces(context)))
            for parameter in command.get_params(context):
                if (record := parameter.get_help_record(context)) and "--help" not in record[0]:
                    (options if parameter.param_type_name == "option" else arguments).append(record)
        lines += [
            f"### medseg {name}",
            "",
            *_paragraphs(command.help),
            "",
            "```text",
            f"medseg {name} {usage}",
            "```",
            "",
        ]
        for title, rows in (("argument", arguments), ("option", options)):
            if rows:
                lines += [f"| {title} | |", "|---|---|"]
                lines += [f"| `{_cell(_names(names))}` | {_text(text)} |" for names, text in rows]
                lines += [""]
    return "\n".join(lines)


def _paragraphs(text: str | None) -> list[str]:
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", text or "")]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")


_TYPES = {"<int range>": "N", "<int>": "N", "<float range>": "X", "<float>": "X", "<str>": "TEXT", "<path>": "PATH"}


def _names(names: str) -> str:
    """The names of an option with the kind of its value, as the help of other programs writes it."""
    names = re.sub(r"(\.\.\.)? <list\[\w+\]>", "...", names)
    return " ".join(_TYPES.get(word, word) for word in re.split(r" (?![^<]*>)", names))


def _text(text: str) -> str:
    """Running text in which * and < are themselves."""
    return _cell(text).replace("*", r"\*").replace("<", "&lt;")


# ---- configuration ---------------------------------------------------------------------------------------------------


def configuration_page() -> str:
    """One section for each kind of configuration and each of their sections: keys, types and defaults."""
    from medseg_diffusion.config.load import _SCHEMAS

    lines: list[str] = []
    kinds: dict[Any, list[str]] = {}
    for method, schema in _SCHEMAS.items():
        kinds.setdefault(schema, []).append(method)
    sections: list[Any] = []
    for schema, methods in kinds.items():
        names = ", ".join(f"`{method}`" for method in methods)
        lines += [f"## {schema.__name__}", "", f"`method`: {names}.", "", *_described(schema)]
        _collect(schema, sections)
    for section in sections:
        if section not in kinds:
            lines += [f"## {section.__name__}", "", *_described(section)]
    return "\n".join(lines)


def _described(model: Any) -> list[str]:
    import inspect

    text = _paragraphs(inspect.cleandoc(model.__doc__ or ""))
    rows = [
        f"| `{name}` | {_type(field)} | {_default(field)} |"
        for name, field in model.model_fields.items()
        if name != "method"
    ]
    text = [re.sub(r"``([^`]+)``", r"`\1`", line) for line in text]
    return [*"\n\n".join(text).split("\n"), "", "| key | value | default |", "|---|---|---|", *rows, ""]


def _collect(model: Any, sections: list[Any]) -> None:
    for field in model.model_fields.values():
        for part in _models_in(field.annotation):
            if part not in sections:
                sections.append(part)
                _collect(part, sections)


def _models_in(annotation: Any) -> Iterator[Any]:
    if hasattr(annotation, "model_fields"):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)


def _type(field: Any) -> str:
    """The type of a key in words that YAML's users know, with its bounds."""
    limits = [text for one in field.metadata if (text := _limit(one))]
    return _cell(", ".join([_name(field.annotation), *limits]))


_NAMES = {"int": "integer", "float": "number", "str": "text", "bool": "true or false", "NoneType": "null"}


def _name(annotation: Any) -> str:
    import types
    import typing

    origin, parts = typing.get_origin(annotation), get_args(annotation)
    if hasattr(annotation, "model_fields"):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    if origin is typing.Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_name(part) for part in parts)
    if origin is typing.Annotated:
        limits = [text for one in parts[1:] if (text := _limit(one))]
        return " ".join([_name(parts[0]), *limits])
    if origin in (tuple, list):
        if len(parts) == 2 and parts[1] is Ellipsis:
            return f"list of {_name(parts[0])}"
        return f"[{', '.join(_name(part) for part in parts)}]"
    if origin in (dict, Mapping) or getattr(origin, "__name__", "") == "Mapping":
        return f"names with {_name(parts[1])}"
    name = getattr(annotation, "__name__", str(annotation))
    return _NAMES.get(name, name)


def _limit(bound: Any) -> str:
    signs = {"gt": "above", "ge": "from", "lt": "below", "le": "up to"}
    return ", ".join(
        f"{word} {value:g}" for sign, word in signs.items() if (value := getattr(bound, sign, None)) is not None
    )


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if hasattr(type(value), "model_fields"):
        return "as below"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"`[{', '.join(str(one) for one in value)}]`"
    return f"`{value}`" if value != "" else '`""`'


# ---- Python ----------------------------------------------------------------------------------------------------------

_GROUPS = {
    "Models in memory": ("api.models.", "api.results."),
    "Metrics of arrays": ("api.evaluation.",),
    "Commands as functions": ("workflows.", "training.", "volumes.sources.", "models.anomaly.", "models.image_source."),
    "Scans and masks": ("volumes.",),
    "Models and presets by name": ("models.store.", "config.load."),
    "Errors": ("errors.",),
    "Configurations": ("config.",),
    "What the functions return": ("",),
}
"""Heading -> how the modules begin whose public names stand below it; the first group that fits a name has it."""


def public_names() -> dict[str, list[str]]:
    """Heading -> public names of the package, functions before classes."""
    import medseg_diffusion

    groups: dict[str, list[str]] = {title: [] for title in _GROUPS}
    for name, home in medseg_diffusion._HOME_OF.items():
        fitting = (title for title, homes in _GROUPS.items() if any(f"{home}.".startswith(one) for one in homes))
        groups[next(fitting)].append(name)
    return {title: sorted(names, key=lambda name: (name[0].isupper(), name)) for title, names in groups.items()}


def api_page() -> str:
    """One section for each group of public names, filled by mkdocstrings from their docstrings."""
    lines = []
    for title, names in public_names().items():
        lines += [f"## {title}", ""]
        if title == "Configurations":
            lines += ["Their keys are those of the YAML files: [Configuration](configuration.md).", ""]
        for name in names:
            lines += [f"::: medseg_diffusion.{name}", ""]
            if title == "Configurations":
                lines[-1:] = ["    options: {members: false, show_bases: false}", ""]
    return "\n".join(lines)


# ---- mkdocs ----------------------------------------------------------------------------------------------------------

GENERATED = {"commands": commands_page, "configuration": configuration_page, "api": api_page}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are files of the repository outside docs/."""
    from mkdocs.structure.files import File

    for path, page in PUBLISHED.items():
        text = with_site_links((ROOT / path).read_text(encoding="utf-8"), path, config.repo_url)
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in what is generated, and mend links that leave docs/."""
    if page.file.generated_by:
        return markdown
    markdown = with_site_links(markdown, f"docs/{page.file.src_uri}", config.repo_url)
    return re.sub(r"<!-- generated: (\w+) -->", lambda match: GENERATED[match[1]](), markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn equations into MathML, which browsers show without a script.

    A bar in the code of a table is written with a backslash, for GitHub; Python-Markdown leaves it there.
    """
    equation = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)
    html = equation.sub(lambda match: mathml(match[2], match[1] == "div"), html)
    return re.sub(r"<td>.*?</td>", lambda cell: cell[0].replace(r"\|", "|"), html, flags=re.DOTALL)


def mathml(tex: str, block: bool) -> str:
    r"""MathML of an equation in \(...\) or \[...\]; a \tag{N} stands at its right."""
    from html import unescape

    from latex2mathml.converter import convert

    tex = unescape(tex).strip()
    tex = re.sub(r"^\\[(\[]|\\[)\]]$", "", tex).strip()
    number = re.search(r"\\tag\{(\w+)\}", tex)
    if number:
        tex = tex.replace(number[0], "")
    equation = convert(tex, display="block" if block else "inline")
    if not block:
        return equation
    tag = f'<span class="equation-number">({number[1]})</span>' if number else ""
    return f'<div class="equation">{equation}{tag}</div>'
