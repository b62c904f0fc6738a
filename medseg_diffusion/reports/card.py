"""The model card (README.md of a model directory), written from model.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def model_card(card: Mapping[str, Any], name: str = "", command: str = "", data: str = "", notes: str = "") -> str:
    """Markdown for a segmenter's model.json, with the ``command``, ``data`` (credit, terms) and ``notes`` given."""
    return _render("model_card.md.j2", card=card, name=name, command=command, data=data, notes=notes)


def generator_card(card: Mapping[str, Any], name: str = "", command: str = "", data: str = "", notes: str = "") -> str:
    """Markdown for the model.json of a generator, an autoencoder or a noisy classifier; arguments as `model_card`."""
    return _render("generator_card.md.j2", card=card, name=name, command=command, data=data, notes=notes)


def pixel_classifier_card(
    card: Mapping[str, Any], name: str = "", command: str = "", data: str = "", notes: str = ""
) -> str:
    """Markdown for the model.json of pixel classifiers; arguments as `model_card`."""
    return _render("pixel_classifier_card.md.j2", card=card, name=name, command=command, data=data, notes=notes)


def anomaly_card(card: Mapping[str, Any], name: str = "", command: str = "", data: str = "", notes: str = "") -> str:
    """Markdown for the model.json of an anomaly model; arguments as `model_card`."""
    return _render("anomaly_card.md.j2", card=card, name=name, command=command, data=data, notes=notes)


def _render(template: str, **values: object) -> str:
    environment = Environment(
        loader=PackageLoader("medseg_diffusion.reports"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # Markdown, not HTML
    )
    environment.filters["exp"] = math.exp
    return environment.get_template(template).render(**values)
