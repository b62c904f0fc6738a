"""`medseg models`: the installed models."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from medseg_diffusion.errors import UsageError

from ._options import AsJson
from ._shared import print_json, print_table, printable

app = typer.Typer(
    help="List, show, install, remove and export trained models, and import published weights.", no_args_is_help=True
)

ModelName = Annotated[str, typer.Argument(help="Name or folder of a model.")]


@app.command("list")
def list_models(as_json: AsJson = False) -> None:
    """List the installed models, which `-m` takes by name."""
    from medseg_diffusion.models import store as checkpoint

    rows = [asdict(model) for model in checkpoint.list_models()]
    if as_json:
        print_json(rows)
    else:
        print_table([{**row, "labels": ", ".join(row["labels"])} for row in rows])


@app.command()
def show(
    model: ModelName,
    config: Annotated[
        bool, typer.Option("--config", help="Print all entries of model.json as YAML, with the whole configuration.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print the card of a model: intended use, input, training data, licence, metrics and limits."""
    from medseg_diffusion.models.store import load_card, load_readme

    if config and as_json:
        raise UsageError("--config and --json print the same entries; leave one out")
    if as_json:
        print_json(load_card(model))
    elif config:
        import yaml

        typer.echo(yaml.safe_dump(load_card(model), sort_keys=False, allow_unicode=True), nl=False)
    else:
        typer.echo(printable(load_readme(model)).rstrip())


@app.command("install")
def install_model(
    source: Annotated[
        str,
        typer.Argument(
            help="Zip or folder of a model, run folder, or hf:OWNER/NAME or hf:OWNER/NAME@REVISION for a download from "
            "the Hugging Face hub."
        ),
    ],
    name: Annotated[
        str | None,
        typer.Option(help="Name of the model for `-m`; default: the name of its folder, or of the folder in the zip."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an installed model of this name.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check a model and put it into MEDSEG_HOME (default ~/.medseg), where commands find it by name."""
    from medseg_diffusion.workflows.install_model import install_model as run

    path = run(source, name, overwrite)
    if as_json:
        print_json({"name": path.name, "model": path})
    else:
        typer.echo(f"{path.name}: installed in {path}")


@app.command("remove")
def remove_model(
    name: Annotated[str, typer.Argument(help="Name of an installed model.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete an installed model from MEDSEG_HOME. Built-in models cannot be deleted."""
    from medseg_diffusion.workflows.install_model import remove_model as run
    from medseg_diffusion.workflows.install_model import require_removable

    path = require_removable(name)
    if not yes and not typer.confirm(f"Delete {path}?"):
        raise UsageError(f"{name}: not deleted")
    typer.echo(f"{name}: removed {run(name)}")


# many: one option for each text of the card and each form of the export
@app.command("export")
def export_model(
    model: ModelName,
    output: Annotated[
        str,
        typer.Option(
            "--output",
            "-o",
            help="New folder, .zip file or .onnx file, or hf:OWNER/NAME to push to the Hugging Face hub. The last "
            "part of the name is the title of the card.",
        ),
    ],
    half: Annotated[bool, typer.Option("--half", help="Round the weights to float16, for half the size.")] = False,
    monai_bundle: Annotated[
        bool, typer.Option("--monai-bundle", help="Write a segmenter as a MONAI bundle, which is a folder.")
    ] = False,
    onnx: Annotated[
        bool, typer.Option("--onnx", help="Write a segmenter that evaluates its network once as an .onnx file.")
    ] = False,
    command: Annotated[str, typer.Option(help="Command that trained the model, for the card.")] = "",
    data: Annotated[str, typer.Option(help="Credit and terms of the training data, for the card.")] = "",
    intended_use: Annotated[str, typer.Option(help="Intended use of the model, for the card.")] = "",
    limits: Annotated[str, typer.Option(help="Limits of the model, for the card.")] = "",
    licence: Annotated[str, typer.Option(help="Licence of the weights; default: that of the model.")] = "",
    as_json: AsJson = False,
) -> None:
    """Write a copy of a model, with a complete card, to share: a folder, a zip, a MONAI bundle, ONNX, or to a hub."""
    texts = {"command": command, "data": data, "intended_use": intended_use, "limits": limits}
    if (monai_bundle or onnx) and (half or licence or any(texts.values()) or (monai_bundle and onnx)):
        raise UsageError("--monai-bundle and --onnx are exported alone; export the model with its card first")
    if monai_bundle:
        from medseg_diffusion.workflows.export_bundle import export_bundle

        path = str(export_bundle(model, Path(output)))
    elif onnx:
        from medseg_diffusion.workflows.export_onnx import export_onnx

        path = str(export_onnx(model, Path(output)))
    else:
        from medseg_diffusion.workflows.export_model import export_model as run

        path = run(model, output, half=half, about=texts, licence=licence)
    if as_json:
        print_json({"model": path})
    else:
        typer.echo(path)


@app.command("import")
def import_model(
    file: Annotated[Path, typer.Argument(help="Checkpoint (.pt, .pth, .ckpt, .safetensors), or folder of a bundle.")],
    source: Annotated[
        str,
        typer.Option(
            "--from", help="Source: guided-diffusion, improved-diffusion, latent-diffusion, monai or monai-bundle."
        ),
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
    """Convert a published checkpoint, or a network of a MONAI bundle, into a model folder."""
    from medseg_diffusion.config.load import parse_settings

    given = parse_settings(settings or [])
    if source == "monai-bundle":
        from medseg_diffusion.workflows.import_bundle import import_bundle

        path, assumed = import_bundle(file, output, given)
    else:
        from medseg_diffusion.workflows.import_model import import_model as run

        path, assumed = run(file, source, output, given)  # type: ignore[arg-type]
    if as_json:
        print_json({"model": path, "assumed": assumed})
        return
    typer.echo(str(path))
    for sentence in assumed:
        typer.echo(f"assumed: {sentence}", err=True)
