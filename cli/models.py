"""`medseg models`: the trained models at hand."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ._shared import AsJson, print_json, print_table

app = typer.Typer(help="List and show the trained models; import published ones.", no_args_is_help=True)


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


@app.command("import")
def import_model(
    file: Annotated[Path, typer.Argument(help="Checkpoint: .pt, .pth, .ckpt or .safetensors.")],
    source: Annotated[
        str, typer.Option("--from", help="guided-diffusion, improved-diffusion, latent-diffusion or monai.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="New model folder.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="What shapes do not tell, e.g. num_heads=8 or schedule=cosine; repeatable."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Bring a published checkpoint into a model folder of this package."""
    from medseg_diffusion.config import parse_settings
    from medseg_diffusion.importing import import_model as run

    path, assumed = run(file, source, output, parse_settings(settings or []))  # type: ignore[arg-type]
    if as_json:
        print_json({"model": path, "assumed": assumed})
        return
    typer.echo(str(path))
    for sentence in assumed:
        typer.echo(f"assumed: {sentence}", err=True)
