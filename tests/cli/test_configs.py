"""`medseg configs` lists and shows the presets."""

from __future__ import annotations

import json

from tests.helpers.cli import error_lines, medseg


def test_configs_list_and_show() -> None:
    names = json.loads(medseg("configs", "list", "--json").stdout)
    assert names == medseg("configs", "list").stdout.split() and names
    assert medseg("configs", "show", names[0]).exit_code == 0


def test_unknown_preset_names_the_nearest() -> None:
    name = medseg("configs", "list").stdout.split()[0]
    result = medseg("configs", "show", name + "x")
    assert result.exit_code == 2
    (line,) = error_lines(result)
    assert name in line
