"""`medseg models` lists and shows the installed models."""

from __future__ import annotations

import json

from tests.helpers.cli import medseg


def test_models_list_and_show() -> None:
    models = json.loads(medseg("models", "list", "--json").stdout)
    assert models
    assert json.loads(medseg("models", "show", models[0]["name"], "--json").stdout)
    assert medseg("models", "list").exit_code == 0
