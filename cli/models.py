"""`medseg models`: the installed models."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ._options import AsJson
from ._shared import print_json, print_table

app = typer.Typer(help="List, show and export trained models, and import published weights.", no_args_is_help=True)


@app.command("list")
def list_models(as_json: AsJson = False) -> None:
    """List the installed models, which `-m` takes by name."""
    from medseg_diffusion.models import store as checkpoint

    rows = [asdict(model) for model in checkpoint.list_models()]
    if as_json:
        print_json(rows)
    else:
        print_table(rows)


@app.command()
def show(model: Annotated[str, typer.Argument(help="Name or folder of a model.")], as_json: AsJson = False) -> None:
    """Print the card of a model: its training, its input and its scores."""
    from medseg_diffusion.models.store import load_card

    card = load_card(model)
    if as_json:
        print_json(card)
    else:
        import yaml

        typer.echo(yaml.safe_dump(card, sort_keys=False, allow_unicode=True), nl=False)


@app.command("export")
def export_model(
    model: Annotated[str, typer.Argument(help="Name or folder of a model.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="New model folder; its name is the card's title.")],
    half: Annotated[bool, typer.Option("--half", help="Round the weights to float16, for half the size.")] = False,
    command: Annotated[str, typer.Option(help="Command that trained the model, for the card.")] = "",
    data: Annotated[str, typer.Option(help="Credit and terms of the training data, for the card.")] = "",
    notes: Annotated[str, typer.Option(help="Intended use and limits of the model, for the card.")] = "",
    licence: Annotated[str, typer.Option(help="Licence of the weights; default: that of the model.")] = "",
    as_json: AsJson = False,
) -> None:
    """Copy a model for others, with a complete card and optionally at half the size."""
    from medseg_diffusion.workflows.export_model import export_model as run

    path = run(model, output, half=half, command=command, data=data, notes=notes, licence=licence)
    if as_json:
        print_json({"model": path})
    else:
        typer.echo(str(path))


@app.command("import")
def import_model(
    file: Annotated[Path, typer.Argument(help="Checkpoint: .pt, .pth, .ckpt or .safetensors.")],
    source: Annotated[
        str,
        typer.Option("--from", help="Source: guided-diffusion, improved-diffusion, latent-diffusion or monai."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="New model folder.")],
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Setting that the file does not contain, such as num_heads=8 or schedule=cosine; repeatable.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Convert a published checkpoint into a model folder."""
    from medseg_diffusion.config.load import parse_settings
    from medseg_diffusion.workflows.import_model import import_model as run

    path, assumed = run(file, source, output, parse_settings(settings or []))  # type: ignore[arg-type]
    if as_json:
        print_json({"model": path, "assumed": assumed})
        return
    typer.echo(str(path))
    for sentence in assumed:
        typer.echo(f"assumed: {sentence}", err=True)
