"""Files for visitors of the repository: they parse, name nobody who does not exist, and agree with the project."""

from __future__ import annotations

import re
import tomllib

import yaml

from tests.helpers.docs import ROOT


def test_the_citation() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"cff-version", "message", "title", "authors"} <= set(citation)  # what the format asks for
    assert citation["title"] == project["name"]
    assert citation["license"] == project["license"].partition(" AND ")[0], "of the code; the wheel also has models"
    assert citation["authors"] == [{"name": "The medseg-diffusion contributors"}]


def test_the_public_workflow_does_what_our_own_does_and_says_that_it_is_untried() -> None:
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert text.startswith("# UNTRIED")
    jobs = yaml.safe_load(text)["jobs"]
    commands = [step["run"] for step in jobs["linux"]["steps"] if "run" in step]
    assert ".ci/run" in commands
    assert jobs["others"]["strategy"]["matrix"]["system"] == ["macos-latest", "windows-latest"]
    others = " ".join(step.get("run", "") for step in jobs["others"]["steps"])
    assert "pip install" in others and "pytest" in others


def test_targets_of_make_that_are_named_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    texts = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / ".ci" / "run", *(ROOT / "docs").rglob("*.md")]
    named = {
        target
        for path in texts
        for target in re.findall(r"(?:^|`)make (?:--no-print-directory )?([a-z-]+)", path.read_text(), re.MULTILINE)
    }
    assert {"demo", "test", "docs"} <= named
    assert [target for target in sorted(named) if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []


def test_issue_templates_ask_for_what_a_maintainer_needs() -> None:
    folder = ROOT / ".github" / "ISSUE_TEMPLATE"
    bug = yaml.safe_load((folder / "bug.yml").read_text())
    needed = {field["id"] for field in bug["body"] if field.get("validations", {}).get("required")}
    assert needed == {"command", "output", "expected", "info"}
    assert "patient data" in bug["body"][0]["attributes"]["value"]
    for path in folder.glob("*.yml"):
        assert yaml.safe_load(path.read_text())
