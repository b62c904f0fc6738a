"""`medseg models`: the trained models at hand."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from ._shared import AsJson, print_json, print_table

app = typer.Typer(help="List and show the trained models.", no_args_is_help=True)


@app.command("list")
def list_models(as_json: AsJson = False) -> None:
    """List the models that `-m` takes by name."""
    from medseg_diffusion import checkpoint

    rows = [asdict(model) for model in checkpoint.list_models()]
    if as_json:
        print_json(rows)
    else:
        print_table(rows)


@app.command()
def show(model: Annotated[str, typer.Argument(help="Name or folder of a model.")], as_json: AsJson = False) -> None:
    """Show how a model was trained, what it expects and how well it did."""
    from medseg_diffusion.checkpoint import load_card

    card = load_card(model)
    if as_json:
        print_json(card)
    else:
        import yaml

        typer.echo(yaml.safe_dump(card, sort_keys=False, allow_unicode=True), nl=False)
