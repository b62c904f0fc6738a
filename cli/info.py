"""`medseg info`."""

from __future__ import annotations

from typing import Any

import typer

from ._options import AsJson
from ._shared import print_json


def info(as_json: AsJson = False) -> None:
    """Print versions, devices and models, even if some of them are missing or broken."""
    from medseg_diffusion.workflows.info import info as run

    report = run()
    if as_json:
        print_json(report)
        return
    for section, content in report.items():
        if not isinstance(content, dict):
            typer.echo(f"{section}: {_text(content)}")
            continue
        typer.echo(f"{section}:")
        for key, value in content.items():
            typer.echo(f"  {key}: {_text(value)}")


def _text(value: Any) -> str:
    items = value if isinstance(value, list) else [value]
    return ", ".join("-" if item is None else str(item) for item in items) or "-"
