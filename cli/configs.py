"""`medseg configs`: the presets that ship with the package."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from difflib import get_close_matches
from itertools import groupby
from textwrap import fill, indent
from typing import Annotated

import typer

from medseg_diffusion.errors import UsageError

from ._options import AsJson
from ._shared import print_json

app = typer.Typer(help="List and show the presets.", no_args_is_help=True)


@app.command("list")
def list_presets(as_json: AsJson = False) -> None:
    """List the presets, and what each is for, by the command that takes them."""
    from medseg_diffusion.config.load import described_presets

    presets = described_presets()
    if as_json:
        print_json([asdict(preset) for preset in presets])
        return
    width = shutil.get_terminal_size().columns
    for command, group in groupby(presets, key=lambda preset: preset.command):
        typer.echo(f"medseg {command}")
        for preset in group:
            typer.echo(f"  {preset.name}")
            # A name such as adm-tiny-imagenet that is broken at its hyphen could not be copied or found.
            text = fill(preset.description, width - 4, break_on_hyphens=False)
            typer.echo(indent(text, " " * 4))


@app.command()
def show(name: Annotated[str, typer.Argument(help="Name of a preset.")]) -> None:
    """Print a preset as YAML, to be saved and changed."""
    from medseg_diffusion.config.load import presets

    available = presets()
    if name not in available:
        near = get_close_matches(name, available, n=1, cutoff=0.0)
        hint = f"; the nearest is {near[0]}" if near else ""
        raise UsageError(f"no preset is called {name!r}{hint}; `medseg configs list` lists them")
    typer.echo(available[name].read_text(encoding="utf-8"), nl=False)
