"""Published networks in memory, with the calling convention of the original code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from medseg_diffusion import build
from medseg_diffusion.config.imported import AutoencoderConfig, ClassifierConfig, DenoiserConfig
from medseg_diffusion.config.shared import Section
from medseg_diffusion.diffusion.denoiser import NetworkDenoiser
from medseg_diffusion.errors import ModelError, UsageError
from medseg_diffusion.networks.autoencoder import KLAutoencoder
from medseg_diffusion.networks.noisy_classifier import NoisyClassifier
from medseg_diffusion.networks.unet import UNet

from .generator import restore_autoencoder, restore_classifier, restore_generator
from .restore import ready, typed_config, usable
from .store import SavedModel, load_model_files

IMPORTED: dict[str, type[Section]] = {
    "denoiser": DenoiserConfig,
    "classifier": ClassifierConfig,
    "autoencoder": AutoencoderConfig,
}


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A denoiser, noisy classifier or autoencoder of a model directory.

    Attributes:
        saved: Card and weights as stored.
        module: `NetworkDenoiser`, `NoisyClassifier` or `KLAutoencoder`, in evaluation mode.
    """

    saved: SavedModel
    module: nn.Module

    def network(
        self, x: Tensor, timesteps: Tensor, class_labels: Tensor | None = None, context: Tensor | None = None
    ) -> Tensor:
        """The raw output of the network, with the arguments of the original code.

        ``timesteps`` (B,) count from 0. ``x`` (B, in_channels, *S) includes a concatenated condition. ``context`` is
        (B, L, D). The output keeps the channels of a learned variance.
        """
        if isinstance(self.module, NoisyClassifier):
            return cast(Tensor, self.module(x, timesteps))
        if not isinstance(self.module, NetworkDenoiser):
            raise UsageError(f"{self.saved.path}: an autoencoder has no timesteps; use module.encode and module.decode")
        conditions = {"label": class_labels, "context": context}
        cond = {name: value for name, value in conditions.items() if value is not None}
        return cast(Tensor, self.module.network(x, timesteps, cond))


def load_model(name_or_path: str | Path, device: str | torch.device = "cpu") -> LoadedModel:
    """Load an imported model, or a generator, autoencoder or noisy classifier that was trained here.

    Raises:
        ModelError: A model that is missing, damaged or a segmenter (`load_segmenter` loads those).
    """
    saved = load_model_files(name_or_path)
    kind = saved.card.get("task")
    trained: dict[str, Callable[[], nn.Module]] = {
        "image": lambda: restore_generator(saved).task.denoiser,
        "image-autoencoder": lambda: restore_autoencoder(saved)[0],
        "image-classifier": lambda: restore_classifier(saved)[0],
    }
    if kind in trained:
        return LoadedModel(saved, trained[kind]().to(device))
    if kind not in IMPORTED:
        raise ModelError(f"{saved.path}: a model for {kind!r}, expected {', '.join(IMPORTED)}; segment with it instead")
    schema = IMPORTED[kind]
    config = typed_config(saved, schema)
    with usable(saved, schema):
        module = _built(config)
        # Only the network of a denoiser is stored.
        ready(module.network if isinstance(module, NetworkDenoiser) else module, saved.weights)
    return LoadedModel(saved, module.to(device).eval())


def _built(config: Section) -> nn.Module:
    if isinstance(config, DenoiserConfig):
        network = UNet(**config.network.model_dump())
        schedule = build.noise_schedule(config.schedule)
        return NetworkDenoiser(network, schedule, config.target, config.learned_variance)
    if isinstance(config, ClassifierConfig):
        return NoisyClassifier(**config.network.model_dump())
    return KLAutoencoder(**cast(AutoencoderConfig, config).network.model_dump())
