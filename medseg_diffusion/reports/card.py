"""The model card (README.md of a model directory), written from model.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def model_card(card: Mapping[str, Any], name: str = "", command: str = "", data: str = "", notes: str = "") -> str:
    """Markdown for the content of model.json, with the ``command``, ``data`` (credit and terms) and ``notes`` given."""
    environment = Environment(
        loader=PackageLoader("medseg_diffusion.reports"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # Markdown, not HTML
    )
    template = environment.get_template("model_card.md.j2")
    return template.render(card=card, name=name, command=command, data=data, notes=notes)
