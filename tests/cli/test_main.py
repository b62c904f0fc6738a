"""The installed `medseg` command: its entry point, help, version and wrong usage."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import pytest
import typer
from typer.core import TyperGroup
from typer.testing import CliRunner

from tests.helpers.cli import SCRIPT, medseg
from tests.helpers.commands import MEDSEG

COMMANDS = (
    "segment",
    "train-segmenter",
    "train-generator",
    "sample",
    "evaluate-generator",
    "train-pixel-classifier",
    "train-anomaly",
    "anomaly",
    "calibrate-anomaly",
    "calibrate-segmenter",
    "synthesize-anomalies",
    "benchmark-segmenter",
    "evaluate",
    "report",
    "check",
    "configs",
    "models",
    "info",
)


def test_help_lists_the_commands() -> None:
    result = medseg("--help")
    assert result.exit_code == 0
    for command in COMMANDS:
        assert command in result.output
    places = [result.output.index(group) for group in ("Use a model", "Measure and report", "Train and calibrate")]
    assert places == sorted(places) and result.output.index(" segment ") < places[1] < result.output.index(" evaluate ")


@pytest.mark.parametrize("command", [*COMMANDS, "configs list", "configs show", "models list", "models show"])
def test_every_command_has_help(command: str) -> None:
    assert medseg(*command.split(), "--help").exit_code == 0


def commands(group: TyperGroup, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The words of each command, and the command."""
    for name, command in group.commands.items():
        if isinstance(command, TyperGroup):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


def test_help_shows_all_of_every_text() -> None:
    """Rich takes words in brackets such as [@REVISION] for markup, and drops them."""
    every = dict(commands(cast(TyperGroup, typer.main.get_command(SCRIPT.load()))))
    assert len(every) > 20
    for path, command in every.items():
        shown = CliRunner(env={"COLUMNS": "1000", "NO_COLOR": "1", "TERM": "dumb"}).invoke(SCRIPT.load(), [*path, "-h"])
        for parameter in command.params:
            text = getattr(parameter, "help", None) or ""
            assert " ".join(text.split()) in " ".join(shown.output.split()), (path, parameter.name)


def test_version() -> None:
    assert medseg("--version").output.strip() == f"medseg {version('medseg-diffusion')}"


@pytest.mark.parametrize(
    "arguments",
    [
        ["segment", "scan.nii.gz", "--no-such-option"],
        ["segment"],
        ["segment", "scan.nii.gz", "--ensemble", "0"],
        ["segment", "scan.nii.gz", "--sampler", "pndm"],
        ["segment", "scan.nii.gz", "--device", "gpu"],
        ["segment", "scan.nii.gz", "--shard", "3/2"],
        ["train-segmenter", "preset"],
        ["no-such-command"],
    ],
)
def test_wrong_usage_exits_2(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scan.nii.gz").touch()
    monkeypatch.chdir(tmp_path)
    assert medseg(*arguments).exit_code == 2


@pytest.mark.parametrize("arguments", [["segment", ""], ["segment", "scan.nii.gz", "-o", ""], ["check", ""]])
def test_an_empty_argument_is_not_the_current_folder(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`medseg segment "$SCAN"` with an unset variable took all scans of the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scan.nii.gz").write_bytes(b"no scan")
    result = medseg(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("medseg: error: an argument is empty"), result.output


def test_the_entry_point_is_a_typer_app() -> None:
    assert isinstance(SCRIPT.load(), typer.Typer)


@pytest.mark.skipif(os.name != "posix", reason="pipes of a shell")
def test_a_reader_that_has_gone_gets_no_message() -> None:
    command = f"{shlex.quote(MEDSEG)} configs list | true"  # which has ended before the first line
    done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
