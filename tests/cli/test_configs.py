"""`medseg configs` lists and shows the presets."""

from __future__ import annotations

import json

from typer.testing import CliRunner

from medseg_diffusion.config.load import load_config, presets
from tests.helpers.cli import SCRIPT, error_lines, medseg


def test_every_preset_says_what_it_is_for_and_which_command_takes_it() -> None:
    rows = json.loads(medseg("configs", "list", "--json").stdout)
    assert sorted(row["name"] for row in rows) == sorted(presets())
    for row in rows:
        config = load_config(row["name"])
        assert row["description"] == " ".join(config.description.split()) and row["description"].endswith(".")
        assert 30 < len(row["description"]) < 400, row["name"]
        assert len({other["name"] for other in rows if other["description"] == row["description"]}) == 1, row["name"]
    lines = medseg("configs", "list").stdout.splitlines()
    commands = [line for line in lines if not line.startswith(" ")]
    assert commands == [f"medseg train-{kind}" for kind in ("anomaly", "generator", "pixel-classifier", "segmenter")]
    assert [line.strip() for line in lines if line.startswith("  ") and line[2] != " "] == [row["name"] for row in rows]


def test_names_of_presets_are_whole_in_descriptions() -> None:
    """A name that is broken at a hyphen can neither be copied nor found by grep."""
    said = CliRunner(env={"COLUMNS": "80"}).invoke(SCRIPT.load(), ["configs", "list"]).stdout
    assert "the training of adm-tiny-imagenet, logit-normal" in " ".join(said.split())


def test_configs_show() -> None:
    assert medseg("configs", "show", sorted(presets())[0]).exit_code == 0


def test_unknown_preset_names_the_nearest() -> None:
    name = sorted(presets())[0]
    result = medseg("configs", "show", name + "x")
    assert result.exit_code == 2
    (line,) = error_lines(result)
    assert name in line
