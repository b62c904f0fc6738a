"""Keys that are set although nothing reads them: the run and the model's card would state them as if they counted."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from pydantic import BaseModel

from .anomaly import AnomalyConfig
from .generator import GeneratorConfig
from .segmenter import SegmenterConfig
from .shared import Section

_SECTIONS = {
    "image_encoder": "segdiff",
    "dynamic_encoding": "medsegdiff",
    "semantic_condition": "medsegdiff-v2",
    "anchor_loss": "medsegdiff-v2",
    "mask_autoencoder": "latent-mask",
    "probabilistic_unet": "probabilistic-unet",
    "feed_forward": "baseline",
}
"""Section of a segmenter -> the one method that reads it."""
_DIFFUSION: dict[str, Collection[str]] = {
    "baseline": (),
    "probabilistic-unet": (),
    "categorical": ("schedule", "cross_entropy_weight", "log_snr"),
    "patched": ("schedule", "noise", "target", "learned_variance", "objective"),
}
"""Method -> what it reads of the section diffusion, if that is not all of it."""


def unread_keys(config: BaseModel) -> dict[str, list[str]]:
    """Setting, such as "method: baseline" -> the keys that differ from their defaults and have no effect with it."""
    unread: dict[str, list[str]] = {}
    for key, reason in _unread(config):
        unread.setdefault(reason, []).append(key)
    return unread


def _unread(config: BaseModel) -> Iterator[tuple[str, str]]:
    if isinstance(config, SegmenterConfig):
        yield from _of_segmenter(config)
    elif isinstance(config, GeneratorConfig):
        yield from _of_diffusion(config.method, config.diffusion)
    elif isinstance(config, AnomalyConfig):
        yield from ((f"generator.{key}", f"generator.{reason}") for key, reason in _unread(config.generator))


def _of_segmenter(config: SegmenterConfig) -> Iterator[tuple[str, str]]:
    method = f"method: {config.method}"
    for name, reader in _SECTIONS.items():
        if reader != config.method:
            yield from ((f"{name}.{key}", method) for key in _changed(getattr(config, name)))
    yield from _of_diffusion(config.method, config.diffusion)
    if config.data.source == "brain-labelmaps":
        source = "data.source: brain-labelmaps"
        yield from ((f"augmentation.{key}", source) for key in _changed(config.augmentation))
        yield from ((f"data.{key}", source) for key in ("labels", "merge_labels") if getattr(config.data, key))


def _of_diffusion(method: str, section: Section) -> Iterator[tuple[str, str]]:
    if method in _DIFFUSION:
        unread = (key for key in _changed(section) if key not in _DIFFUSION[method])
        yield from ((f"diffusion.{key}", f"method: {method}") for key in unread)


def _changed(section: Section) -> list[str]:
    """The keys of a section whose values are not their defaults."""
    defaults: dict[str, Any] = dict(type(section)())
    return [key for key, value in section if value != defaults[key]]
