"""The folders and the size of functions: every module has its room, and what is longer says why."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import medseg_cli
import pytest

import medseg_diffusion

PACKAGE = Path(medseg_diffusion.__file__).parent
SOURCES = sorted([*PACKAGE.rglob("*.py"), *Path(medseg_cli.__file__).parent.glob("*.py")])
ROOT = {"__init__", "errors", "files", "device", "build"}
MOST_LINES, MOST_PARAMETERS = 60, 8
_NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def code_lines(source: str) -> set[int]:
    """The lines that hold more than a comment."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    return lines


def too_large(source: str) -> Iterator[tuple[str, str]]:
    """Name and kind ("long" or "many") of every function that is too large and has no reason above its first line."""
    tree, lines, code = ast.parse(source), source.splitlines(), code_lines(source)
    for node in ast.walk(tree):
        if not isinstance(node, Function):
            continue
        docstring = node.body[0] if ast.get_docstring(node) else None
        documented = set() if docstring is None else set(range(docstring.lineno, (docstring.end_lineno or 0) + 1))
        length = len(code.intersection(range(node.lineno, (node.end_lineno or 0) + 1)) - documented)
        names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        count = len([name for name in names if name not in ("self", "cls")])
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        comment = lines[first - 2].strip() if first > 1 else ""
        reasons = set(re.findall(r"(long|many)(?=[a-z, ]*: \w)", comment)) if comment.startswith("#") else set()
        for kind, exceeds in (("long", length > MOST_LINES), ("many", count > MOST_PARAMETERS)):
            if exceeds and kind not in reasons:
                yield node.name, kind


def test_only_the_five_common_modules_lie_at_the_root() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == ROOT


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_large_functions_say_why(path: Path) -> None:
    assert not list(too_large(path.read_text()))


def test_a_large_function_is_noticed() -> None:
    """The check above can fail."""
    body = "".join(f"    x = {i}\n" for i in range(MOST_LINES))
    assert list(too_large(f"def f():\n{body}")) == [("f", "long")]
    assert not list(too_large(f'# long: a table\ndef f():\n    """Text.\n{"    more" * 9}\n    """\n{body}'))
    parameters = ", ".join(f"p{i}" for i in range(MOST_PARAMETERS + 1))
    assert list(too_large(f"def f({parameters}):\n    pass\n")) == [("f", "many")]
    assert not list(too_large(f"# many: the options of a command\ndef f({parameters}):\n    pass\n"))
    assert not list(too_large(f"def f(self, {parameters[:-4]}):\n    pass\n"))
