"""`medseg models export`: a model for others, with a complete card, as a folder, one zip file or a repository."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from medseg_diffusion.errors import ModelError, UsageError
from medseg_diffusion.files import require_new_file, require_new_folder
from medseg_diffusion.models.card import ABOUT, render_card, template_of, texts_of
from medseg_diffusion.models.packed import pack
from medseg_diffusion.models.store import SavedModel, copy_model, load_model_files, save_model

from .hub import repository_of, upload


def export_model(
    model: str | Path,
    output: str | Path,
    *,
    half: bool = False,
    about: Mapping[str, str] | None = None,
    licence: str = "",
) -> str:
    """Copy a model to ``output``, whose name is the title of the card; return ``output``.

    Args:
        model: Model folder, run folder or installed name.
        output: A new folder, a new file that ends in .zip, or hf:OWNER/NAME, a repository of the Hugging Face hub. A
            repository that does not exist becomes a private one.
        half: Store the weights in float16, rounded to 11 bits. Reported scores should then be those of the copy.
            Otherwise the file of weights is copied as it is.
        about: Texts `ABOUT` that replace those of the model's card.
        licence: Licence of the weights; empty for that of the model.

    Raises:
        ModelError: No usable model, or an imported model; a hub that cannot be reached or refuses.
        UsageError: An output that exists, or an unknown text.
    """
    about = {name: text for name, text in (about or {}).items() if text}
    if unknown := sorted(set(about) - set(ABOUT)):
        raise UsageError(f"a card has no text {unknown[0]!r}; it has {', '.join(ABOUT)}")
    repository = repository_of(output)
    if Path(output).suffix.lower() == ".onnx":
        raise UsageError(f"{output}: an ONNX file is written with --onnx")
    as_folder = repository is None and Path(output).suffix.lower() != ".zip"
    if as_folder:
        require_new_folder(Path(output))
    elif repository is None:
        require_new_file(Path(output))
    saved = load_model_files(model)
    card = {**saved.card, "about": {**texts_of(saved.card), **about}}
    if licence:
        card["licence"] = licence
    path = Path(repository or output).resolve()
    name = path.name if as_folder or repository else path.stem
    readme = rendered_card(saved, card, name)
    if as_folder:
        _write(saved, Path(output), card, readme, half)
        return str(output)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / name
        _write(saved, folder, card, readme, half)
        if repository is None:
            pack(folder, Path(output))
        else:
            upload(folder, repository)
    return str(output)


def rendered_card(saved: SavedModel, card: Mapping[str, Any], name: str) -> str:
    """The README.md of a copy of a model that has another card.

    Raises:
        ModelError: An imported model, or a card without entries that the text needs.
    """
    from jinja2 import UndefinedError

    try:
        if template_of(card) is None:
            raise ModelError(f"{saved.path}: an imported {card['task']}; share the file that it was imported from")
        return render_card(card, name)
    except (UndefinedError, KeyError, TypeError, AttributeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(
            f"{saved.path / 'model.json'}: no complete card of this version ({reason}); use a model of this version"
        ) from error


def _write(saved: SavedModel, folder: Path, card: Mapping[str, Any], readme: str, half: bool) -> None:
    if half:
        save_model(folder, card, saved.weights, readme, torch.float16)
    else:
        copy_model(saved.path, folder, card, readme)
