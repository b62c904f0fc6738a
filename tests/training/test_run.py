"""The files by which a run is resumed, after they were damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from medseg_diffusion.errors import InputError
from medseg_diffusion.training.run import keep_sides, start_run
from tests.helpers.generators import small_config

NOTED = {"seed": 0}


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "no keys with values"),
        (b"text", "no keys with values"),
        (b"a: [", "while parsing a flow node"),
        (b"\0\0\0", "special characters are not allowed"),
        (b"a: \xff", "can't decode byte"),
    ],
)
def test_a_damaged_configuration_is_named_in_one_line(tmp_path: Path, content: bytes, found: str) -> None:
    config = small_config("pixel")
    start_run(tmp_path, config, NOTED, resume=False)
    start_run(tmp_path, config, NOTED, resume=True)
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(InputError, match=rf"config\.yaml: found a damaged file \(.*{found}.*; restore it") as error:
        start_run(tmp_path, config, NOTED, resume=True)
    assert "\n" not in str(error.value)


def test_damaged_sides_are_named(tmp_path: Path) -> None:
    """They are not taken for other data."""
    file = tmp_path / "split.json"
    keep_sides(file, {"test": ["a"]}, "D", resume=False)
    keep_sides(file, {"test": ["a"]}, "D", resume=True)
    file.write_text("")
    with pytest.raises(InputError, match=r"split\.json: found a damaged file \(Expecting value"):
        keep_sides(file, {"test": ["a"]}, "D", resume=True)
