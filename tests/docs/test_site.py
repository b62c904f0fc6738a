"""The site: what is generated in it, links that leave docs/, equations, and the build itself."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from medseg_diffusion.config.load import presets
from tests.helpers.docs import DOCS, ROOT, name_of, pages
from tests.helpers.site import generated, hooks

needs_mkdocs = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("mkdocs", "material", "mkdocstrings", "latex2mathml")),
    reason="needs pip install '.[docs]'",
)


def navigation() -> list[str]:
    """The pages that the navigation names."""

    def files(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        parts = entry.values() if isinstance(entry, dict) else entry
        return [file for part in parts for file in files(part)]  # type: ignore[attr-defined]

    text = re.sub(r"!!python\S*", "", (ROOT / "mkdocs.yml").read_text())
    return files(yaml.safe_load(text)["nav"])


def test_every_page_is_in_the_navigation() -> None:
    on_disk = {page.relative_to(DOCS).as_posix() for page in pages()[1:] if page.name != "README.md"}
    assert sorted(navigation()) == sorted(on_disk | set(hooks().PUBLISHED.values()))


def test_all_commands_and_options_are_described() -> None:
    page = generated((DOCS / "reference" / "commands.md").read_text())
    for name, _, command in hooks().commands():
        assert f"### medseg {name}\n" in page
        for parameter in command.params:
            if (
                not getattr(parameter, "hidden", False)
                and parameter.param_type_name == "option"
                and parameter.name != "help"
            ):
                assert parameter.opts[-1] in page, f"{name} {parameter.opts}"


def test_all_keys_of_all_presets_are_described() -> None:
    page = generated((DOCS / "reference" / "configuration.md").read_text())
    keys: set[str] = set()

    def collect(content: object) -> None:
        if isinstance(content, dict):
            for key, value in content.items():
                keys.add(str(key))
                if key != "codes":  # names of classes
                    collect(value)

    for path in presets().values():
        collect(yaml.safe_load(path.read_text()))
    keys -= {"method", "name"}
    assert [key for key in sorted(keys) if f"| `{key}` |" not in page] == []


def test_links_that_leave_docs() -> None:
    card = "[card](../../medseg_diffusion/pretrained/brain-tissue-t1/README.md)"
    text = f"[a](../../medseg_diffusion/build.py) [b](../index.md#x) {card}"
    found = hooks().with_site_links(text, "docs/how-to/x.md")
    assert found == "a [b](../index.md#x) [card](../reference/models/brain-tissue-t1.md)"
    there = hooks().with_site_links(text, "docs/how-to/x.md", "https://example.org/blob/")
    assert "[a](https://example.org/blob/medseg_diffusion/build.py)" in there
    assert hooks().with_site_links("[x](docs/index.md)", "CHANGELOG.md") == "[x](index.md)"


def test_pages_need_no_network() -> None:
    """Pictures, scripts and styles are files of the repository."""
    for page in pages():
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"!\[[^\]]*\]\(https?:|<script|<link|<iframe", text), name_of(page)
    assert not re.search(r"https?://", re.sub(r"#.*", "", (ROOT / "mkdocs.yml").read_text()))


@needs_mkdocs
def test_equations_become_mathml() -> None:
    found = hooks().mathml(r"\[x_t = \alpha_t x_0 + \sigma_t \varepsilon \tag{1}\]", block=True)
    assert "<math" in found and "(1)" in found and "\\" not in found
    pages_with_equations = [page for page in pages() if "$$" in page.read_text()]
    assert pages_with_equations
    for page in pages_with_equations:
        text = "".join(re.split(r"```.*?```", page.read_text(), flags=re.DOTALL))
        for equation in re.findall(r"\$\$(.+?)\$\$", text, re.DOTALL):
            assert "\\" not in hooks().mathml(equation, block=True), equation


@needs_mkdocs
@pytest.mark.slow
def test_the_site_is_built_without_warnings_and_asks_for_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    built = sorted((tmp_path / "site").rglob("*.html"))
    assert len(built) > len(navigation())
    for page in built:
        html = page.read_text(encoding="utf-8")
        outside = re.findall(r'<(?:script|link|img|iframe|source)[^>]+(?:src|href)="(https?://[^"]+)"', html)
        assert outside == [], page
