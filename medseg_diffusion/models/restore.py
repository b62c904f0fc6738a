"""Restores configurations from model cards, and networks from stored weights; any misfit is a `ModelError`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar, cast

from pydantic import BaseModel
from torch import Tensor, nn

from medseg_diffusion.config.anomaly import AnomalyConfig
from medseg_diffusion.config.generator import GeneratorConfig, ImageAutoencoderConfig, NoisyClassifierConfig
from medseg_diffusion.config.imported import AutoencoderConfig, ClassifierConfig, DenoiserConfig
from medseg_diffusion.config.load import parse_config
from medseg_diffusion.config.pixel_classifier import PixelClassifierConfig
from medseg_diffusion.config.segmenter import SegmenterConfig
from medseg_diffusion.errors import ModelError, UsageError

from .store import SavedModel

Config = TypeVar("Config", bound=BaseModel)

KINDS: dict[type[BaseModel], tuple[str, str]] = {
    SegmenterConfig: ("a segmenter", "train-segmenter"),
    PixelClassifierConfig: ("a pixel classifier", "train-pixel-classifier"),
    GeneratorConfig: ("a generator", "train-generator"),
    ImageAutoencoderConfig: ("an autoencoder", "train-generator"),
    NoisyClassifierConfig: ("a noisy classifier", "train-generator"),
    AnomalyConfig: ("an anomaly model", "train-anomaly"),
    DenoiserConfig: ("an imported denoiser", "models import"),
    ClassifierConfig: ("an imported classifier", "models import"),
    AutoencoderConfig: ("an imported autoencoder", "models import"),
}
"""Type of configuration -> name of the kind of model, and the command that makes it."""


def typed_config(saved: SavedModel, kind: type[Config]) -> Config:
    """The configuration in a model's card.

    Raises:
        ModelError: The card describes another kind of model, or one of another version.
    """
    what, command = KINDS[kind]
    with usable(saved, kind):
        content = saved.card["config"]
        if "method" not in kind.model_fields:  # the configuration of an imported model has no method
            return kind.model_validate(content)
        config = parse_config(content, str(saved.path / "model.json"))
    if not isinstance(config, kind):
        raise ModelError(f"{saved.path}: holds method {config.method}, not {what}; use a model made by {command}")
    return config


@contextmanager
def usable(saved: SavedModel, kind: type[BaseModel]) -> Iterator[None]:
    """Inside the block, an error from a missing or misfitting entry of card or weights becomes a `ModelError`."""
    what, command = KINDS[kind]
    try:
        yield
    # Pydantic's errors are ValueErrors.
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, UsageError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"{saved.path}: not {what} of this version ({reason}); use a model made by {command}"
        ) from error


def ready(module: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """Load weights into ``module``, switch it to evaluation mode and return it.

    Raises:
        RuntimeError: The weights do not fit.
    """
    module.load_state_dict(cast("dict[str, Tensor]", weights))
    return module.eval()
