"""`medseg models` lists and shows the installed models."""

from __future__ import annotations

import json

import pytest
import yaml

from medseg_diffusion.models.store import load_card
from tests.helpers.cli import error_lines, medseg


def test_models_list_and_show() -> None:
    models = json.loads(medseg("models", "list", "--json").stdout)
    assert models
    assert medseg("models", "list").exit_code == 0
    for model in models:
        text = medseg("models", "show", model["name"]).stdout
        assert text.startswith(f"# {model['name']}\n") and len(text.splitlines()) < 120
        assert "pipe" not in text and "weight_decay" not in text, "a card, not the configuration"


@pytest.mark.parametrize(("option", "read"), [("--json", json.loads), ("--config", yaml.safe_load)])
def test_all_entries_are_shown_on_demand(option: str, read) -> None:
    assert read(medseg("models", "show", "hippocampus-t1", option).stdout) == load_card("hippocampus-t1")


def test_the_same_entries_are_not_printed_twice() -> None:
    result = medseg("models", "show", "hippocampus-t1", "--config", "--json")
    assert result.exit_code == 2 and len(error_lines(result)) == 1
