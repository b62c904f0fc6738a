"""`medseg models export`: copy a model for others, with a complete card and optionally at half the size."""

from __future__ import annotations

from pathlib import Path

import torch

from medseg_diffusion.errors import ModelError
from medseg_diffusion.files import require_new_folder
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
    """Copy a model to the new folder ``output``, whose name is the title of the card; return ``output``.

    Args:
        model: Model folder, run folder or installed name.
        output: A new folder.
        half: Store the weights in float16, rounded to 11 bits. Reported scores should then be those of the copy.
        command: Command that trained the model.
        data: Credit and terms of its training data.
        notes: Intended use and limits of the model.
        licence: Licence of the weights.

    Raises:
        ModelError: No usable model, or an imported model.
        UsageError: An output that exists.
    """
    require_new_folder(output)
    saved = load_model_files(model)
    if template_of(saved.card) is None:
        raise ModelError(f"{saved.path}: an imported {saved.card['task']}; share the file that it was imported from")
    card = {**saved.card, **({"licence": licence} if licence else {})}
    readme = render_card(card, name=output.resolve().name, command=command, data=data, notes=notes)
    save_model(output, card, saved.weights, readme, torch.float16 if half else torch.float32)
    return output
