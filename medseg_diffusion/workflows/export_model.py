"""A trained model made ready to hand on: a smaller copy with a card that says where it comes from."""

from __future__ import annotations

from pathlib import Path

import torch

from medseg_diffusion.errors import ModelError, UsageError
from medseg_diffusion.models.card import render_card, template_of
from medseg_diffusion.models.store import load_model_files, save_model


def export_model(
    model: str | Path,
    output: Path,
    *,
    half: bool = False,
    command: str = "",
    data: str = "",
    notes: str = "",
    licence: str = "",
) -> Path:
    """Copies a model to the new folder ``output``, whose name is the title of its card; returns ``output``.

    Args:
        model: model folder, run folder or installed name.
        output: a new folder.
        half: store the weights in float16, rounded to 11 bits. Score the copy, not the original.
        command: how the model was trained.
        data: credit and terms of its training data.
        notes: what it is for and what it is not.
        licence: of the weights.

    Raises:
        ModelError: no usable model, or one that was imported and not trained here.
        UsageError: an output that exists.
    """
    if output.exists():
        raise UsageError(f"{output}: exists; choose a new folder")
    saved = load_model_files(model)
    if template_of(saved.card) is None:
        raise ModelError(f"{saved.path}: a {saved.card['task']} that was imported; hand on the file that it came from")
    card = {**saved.card, **({"licence": licence} if licence else {})}
    readme = render_card(card, name=output.resolve().name, command=command, data=data, notes=notes)
    save_model(output, card, saved.weights, readme, torch.float16 if half else torch.float32)
    return output
