"""The installed `medseg` command, called as a user would."""

from __future__ import annotations

from importlib.metadata import entry_points

from typer.testing import CliRunner, Result

(SCRIPT,) = entry_points(group="console_scripts", name="medseg")
WIDE = {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}


def medseg(*arguments: object) -> Result:
    return CliRunner(env=WIDE).invoke(SCRIPT.load(), [str(argument) for argument in arguments])


def error_lines(result: Result) -> list[str]:
    return result.stderr.strip().splitlines()
