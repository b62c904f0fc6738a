"""The card of a model: the entries of model.json that all models share, and the README.md made from them."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from pydantic import BaseModel

TEMPLATES = {
    "mask": "model_card.md.j2",
    "label-efficient": "pixel_classifier_card.md.j2",
    "anomaly": "anomaly_card.md.j2",
    "image": "generator_card.md.j2",
    "image-autoencoder": "generator_card.md.j2",
    "image-classifier": "generator_card.md.j2",
}
"""Template of README.md by method, or else by task."""
ABOUT = ("intended_use", "limits", "data", "noise", "command")
"""Texts of a card's entry "about", in Markdown: what people have to say about a model, because training cannot.

``data`` is the credit and the terms of the training data; ``noise`` says what the noise is worth where the training did
not measure it; ``command`` trained the model.
"""

SECTIONS = ("Intended use", "Model", "Metrics", "Training data", "Licence", "Limits")
"""Headings of every card."""
OPEN = ("Not stated", "Not described", "Not measured", "None are stored", "See the training data")
"""How the answers begin that a card gives until somebody writes them."""


def common_entries(
    config: BaseModel,
    *,
    task: str,
    method: str,
    dims: int,
    channels: Sequence[str],
    labels: Mapping[int, str],
    training: Mapping[str, Any],
    metrics: Mapping[str, Any],
) -> dict[str, Any]:
    """The entries in the card of every trained model.

    Args:
        config: Configuration of the training.
        task: Kind of model: mask, image, image-autoencoder, image-classifier or anomaly.
        method: Name of the published method.
        dims: 2 or 3.
        channels: Names of the input's channels.
        labels: Label value -> class name.
        training: Seed, step and data of the training.
        metrics: Split -> named numbers.
    """
    return {
        "task": task,
        "method": method,
        "dims": dims,
        "labels": {str(value): name for value, name in labels.items()},
        "channels": list(channels),
        "config": config.model_dump(mode="json"),
        "training": dict(training),
        "metrics": dict(metrics),
        "licence": "see the training data",
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of the software, for the card of a model."""
    packages = ("medseg-diffusion", "torch", "monai")
    return {**{name: version(name) for name in packages}, "python": platform.python_version()}


def template_of(card: Mapping[str, Any]) -> str | None:
    """Name of the template of a card; None for an imported model, whose training is unknown."""
    return TEMPLATES.get(card["method"]) or TEMPLATES.get(card["task"])


def texts_of(card: Mapping[str, Any]) -> dict[str, str]:
    """The texts `ABOUT` of a card; those that it lacks are empty."""
    about = card.get("about")
    return {name: str(about.get(name, "")) if isinstance(about, Mapping) else "" for name in ABOUT}


def render_card(card: Mapping[str, Any], name: str = "") -> str:
    """Render the model card in Markdown.

    Args:
        card: The content of model.json, with the texts `ABOUT` in its entry "about" as far as they are known.
        name: Title; if it is empty, the kind of model.

    Raises:
        KeyError: An imported model (`template_of`).
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    template = template_of(card)
    if template is None:
        raise KeyError(card["task"])
    environment = Environment(
        loader=PackageLoader("medseg_diffusion.reports"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # Markdown, not HTML
    )
    environment.filters["exp"] = math.exp
    return environment.get_template(template).render(card={**card, "about": texts_of(card)}, name=name)
