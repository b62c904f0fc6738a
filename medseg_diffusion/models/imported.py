"""Published networks in memory, and the networks of models on images that were trained here."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from torch import nn

from medseg_diffusion import build
from medseg_diffusion.config.imported import AutoencoderConfig, ClassifierConfig, DenoiserConfig
from medseg_diffusion.config.shared import Section
from medseg_diffusion.diffusion.denoiser import NetworkDenoiser
from medseg_diffusion.errors import ModelError
from medseg_diffusion.networks.autoencoder import KLAutoencoder
from medseg_diffusion.networks.noisy_classifier import NoisyClassifier
from medseg_diffusion.networks.unet import UNet

from .generator import restore_autoencoder, restore_classifier, restore_generator
from .restore import ready, typed_config, usable
from .store import SavedModel

IMPORTED: dict[str, type[Section]] = {
    "denoiser": DenoiserConfig,
    "classifier": ClassifierConfig,
    "autoencoder": AutoencoderConfig,
}


def restore_network(saved: SavedModel) -> nn.Module:
    """The network of an imported model, or of a generator, autoencoder or noisy classifier that was trained here.

    Returns:
        `NetworkDenoiser`, `NoisyClassifier`, `KLAutoencoder` or `VQAutoencoder`, in evaluation mode on the CPU.

    Raises:
        ModelError: A model of another kind, or an unusable one.
    """
    kind = saved.card.get("task")
    trained: dict[str, Callable[[], nn.Module]] = {
        "image": lambda: restore_generator(saved).task.denoiser,
        "image-autoencoder": lambda: restore_autoencoder(saved)[0],
        "image-classifier": lambda: restore_classifier(saved)[0],
    }
    if kind in trained:
        return trained[kind]()
    if kind not in IMPORTED:
        raise ModelError(f"{saved.path}: a model for {kind!r}, expected {', '.join((*trained, *IMPORTED))}")
    schema = IMPORTED[kind]
    config = typed_config(saved, schema)
    with usable(saved, schema):
        module = _built(config)
        # Only the network of a denoiser is stored.
        ready(module.network if isinstance(module, NetworkDenoiser) else module, saved.weights)
    return module.eval()


def _built(config: Section) -> nn.Module:
    if isinstance(config, DenoiserConfig):
        network = UNet(**config.network.model_dump())
        schedule = build.noise_schedule(config.schedule)
        return NetworkDenoiser(network, schedule, config.target, config.learned_variance)
    if isinstance(config, ClassifierConfig):
        return NoisyClassifier(**config.network.model_dump())
    return KLAutoencoder(**cast(AutoencoderConfig, config).network.model_dump())
