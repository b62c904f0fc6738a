"""docs/hooks.py, which mkdocs loads when it builds the site."""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from types import ModuleType

from .docs import DOCS


@cache
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def _page(name: str) -> str:
    return hooks().GENERATED[name]()


def generated(text: str) -> str:
    """A page with what is generated in it."""
    return re.sub(r"<!-- generated: (\w+) -->", lambda match: _page(match[1]), text)
