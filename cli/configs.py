"""`medseg configs`: the presets that ship with the package."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Annotated

import typer

from medseg_diffusion.errors import UsageError

from ._options import AsJson
from ._shared import print_json

app = typer.Typer(help="List and show the presets.", no_args_is_help=True)


@app.command("list")
def list_presets(as_json: AsJson = False) -> None:
    """List the presets."""
    from medseg_diffusion.config.load import presets

    names = sorted(presets())
    if as_json:
        print_json(names)
    else:
        for name in names:
            typer.echo(name)


@app.command()
def show(name: Annotated[str, typer.Argument(help="Name of a preset.")]) -> None:
    """Print a preset as YAML, to save and change it."""
    from medseg_diffusion.config.load import presets

    available = presets()
    if name not in available:
        near = get_close_matches(name, available, n=1, cutoff=0.0)
        hint = f"; the nearest is {near[0]}" if near else ""
        raise UsageError(f"no preset is called {name!r}{hint}; `medseg configs list` lists them")
    typer.echo(available[name].read_text(encoding="utf-8"), nl=False)
