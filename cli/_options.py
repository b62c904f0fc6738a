"""Options that several commands share. Values are checked without importing torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from medseg_diffusion.errors import InputError


def valid_device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", value):
        raise typer.BadParameter(f"{value!r} is none of auto, cpu, cuda, cuda:N, mps")
    return value


def existing_scans(context: typer.Context, paths: list[Path]) -> list[Path]:
    """Refuse paths that do not exist, and files that are no scans."""
    from medseg_diffusion.volumes.paths import require_file

    for path in paths if not context.resilient_parsing else ():
        if not path.is_dir():
            require_file(path)
    return paths


def existing_sources(context: typer.Context, paths: list[Path] | None) -> list[Path]:
    """`existing_scans`, also for lists of scans."""
    existing_scans(context, [path for path in paths or () if not (path.suffix.lower() == ".txt" and path.is_file())])
    return paths or []


def named_scans(scans: list[Path] | None, more: list[Path] | None, channels: Sequence[str] = ()) -> list[Path]:
    """The scans given as arguments and with -i; a usage error if there are none."""
    named = [*(scans or ()), *(more or ())]
    if not named and not channels:
        raise typer.BadParameter("name at least one scan", param_hint="SCAN...")
    return named


def parsed_channels(values: list[str] | None) -> tuple[tuple[str, Path], ...]:
    """Parse NAME=FILE of --channel."""
    parts = [value.partition("=") for value in values or ()]
    for name, _, file in parts:
        if not name or not file:
            raise typer.BadParameter(f"{name!r} is not NAME=FILE, for instance t1=a.nii.gz", param_hint="--channel")
    return tuple((name, Path(file)) for name, _, file in parts)


def existing_model(context: typer.Context, name: str | None) -> str | None:
    """Refuse a name that is neither a model folder nor an installed model."""
    from medseg_diffusion.models.store import find_model

    if name is not None and not context.resilient_parsing:
        find_model(name)
    return name


def existing_models(context: typer.Context, names: list[str]) -> list[str]:
    """Refuse names that are neither model folders nor installed models."""
    for name in names:
        existing_model(context, name)
    return names


def existing(expected: str) -> Callable[[typer.Context, Path | None], Path | None]:
    """A callback that refuses a path that does not exist; ``expected`` says what the path should be."""

    def check(context: typer.Context, path: Path | None) -> Path | None:
        if path is not None and not context.resilient_parsing and not path.exists():
            raise InputError(path, "no such file or folder", expected, "check the path")
        return path

    return check


class Sampler(StrEnum):
    """Names of the samplers."""

    DDPM = "ddpm"
    DDIM = "ddim"
    DPM_SOLVER = "dpm++"
    EULER = "euler"
    HEUN = "heun"


Device = Annotated[
    str, typer.Option("--device", help="Device to compute on: auto, cpu, cuda, cuda:N or mps.", callback=valid_device)
]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile",
        help="Compile the network first: takes a minute or more, and then each step is faster; equal up to rounding.",
    ),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Random seed; the same seed gives the same result.")]
Quiet = Annotated[
    bool | None,
    typer.Option(
        "--quiet/--verbose", help="Print only errors, or details and progress line by line.", show_default=False
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
AsJsonLines = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON on stdout; of several scans, one line for each.")
]


STDOUT = Path("-")


def writable_markdown(context: typer.Context, path: Path | None) -> Path | None:
    """Refuse a file that cannot be written, or is named like a scan, before anything is computed."""
    from medseg_diffusion.files import require_replaceable
    from medseg_diffusion.volumes.paths import refuse_scan_name

    if path is not None and path != STDOUT and not context.resilient_parsing:
        require_replaceable(path)
        refuse_scan_name(path)
    return path


def require_one_on_stdout(markdown: Path | None, as_json: bool) -> None:
    """A usage error if both a Markdown summary and JSON would be printed."""
    if markdown == STDOUT and as_json:
        raise typer.BadParameter("prints to stdout, and so does --json; name a file", param_hint="--markdown -")


Markdown = Annotated[
    Path | None,
    typer.Option(
        "--markdown",
        metavar="FILE",
        help="Write a short summary in Markdown, for a pull request; - prints it instead of the table.",
        callback=writable_markdown,
    ),
]

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="A preset (`medseg configs list`) or a YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one key, for instance a.b=3; repeatable."),
]
RunFolder = Annotated[Path, typer.Option("-o", "--output", metavar="RUN", help="Run folder to write.")]
LabelledScans = Annotated[
    Path, typer.Option("--data", help="Folder of labelled scans.", callback=existing("a folder of labelled scans"))
]
Images = Annotated[
    Path,
    typer.Option("--data", help="Folder or zip of images, or folder of scans.", callback=existing("images or scans")),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint in RUN.")]
MaxSteps = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Stop each network after this many training steps; default: the configuration's. The autoencoder of a "
        "latent generator is trained to the end.",
    ),
]


def time_limit_option(remark: str) -> Any:
    """The option --time-limit of a training command, with a sentence on what the minutes hold."""
    text = f"Stop training after MIN minutes; default: no limit. {remark}"
    return typer.Option("--time-limit", min=0.0, metavar="MIN", help=text)


Gpus = Annotated[int, typer.Option(min=1, help="Number of training processes, one per device.")]


def scans_argument(formats: str) -> Any:
    """The argument SCAN of a command that reads ``formats``."""
    return typer.Argument(
        metavar="SCAN",
        help=f"{formats}, DICOM folders or zips, folders of them, BIDS folders, or lists (.txt, one path in"
        " each line).",
        callback=existing_sources,
        show_default=False,
    )


def model_option(default: str) -> Any:
    """The option -m of a command whose built-in model is ``default``."""
    return typer.Option(
        "-m", "--model", help=f"Name or folder of a model; default: {default}.", callback=existing_model
    )


def output_option(result: str) -> Any:
    """The option -o of a command that writes a ``result`` of each scan."""
    return typer.Option(
        "-o", "--output", help=f"Folder to write, or for one scan the file of the {result}; default: next to each scan."
    )


AlsoScans = Annotated[
    list[Path] | None,
    typer.Option("-i", "--input", metavar="SCAN", help="The same as SCAN; repeatable.", callback=existing_sources),
]
Pattern = Annotated[
    str | None,
    typer.Option(
        metavar="GLOB",
        help="Scans below each folder SCAN, for instance '**/*_T1w.nii.gz'. Results have the same subfolders.",
    ),
]
Series = Annotated[
    str | None,
    typer.Option(
        help="Which of several DICOM series: its number, the start of its UID, or a part of its description; default: "
        "the only one of the model's modality."
    ),
]
Channels = Annotated[
    list[str] | None,
    typer.Option(
        "--channel",
        metavar="NAME=FILE",
        help="File of one channel of a scan, by the model's name for it, such as flair=b.nii.gz; instead of SCAN.",
    ),
]
Volumes = Annotated[
    list[Path],
    typer.Argument(
        metavar="SCAN",
        help="NIfTI, NRRD or MetaImage files, DICOM folders, or folders of them.",
        callback=existing_scans,
    ),
]
ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Name or folder of a model.", callback=existing_model)
]
Preview = Annotated[bool, typer.Option("--preview", help="Write a preview of each scan as PNG.")]
RunReport = Annotated[
    Path | None,
    typer.Option(
        "--run-report",
        metavar="FILE",
        help="Write versions, device, model, options, times, memory and the results of all scans to this JSON file; "
        "with --shard each part has its own, such as run.1-of-4.json.",
    ),
]
SkipExisting = Annotated[
    bool, typer.Option("--skip-existing", help="Skip scans that already have a mask, whatever else is asked for.")
]
