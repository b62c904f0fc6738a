"""Conversion of published weights to this package's networks.

Each source names its parameters after its own modules. The architecture is inferred from the names and shapes, and our
network of that architecture is built. Its blocks give, for each of our parameters, the published parameters that it is
made from. A file with missing or remaining parameters is refused. Shapes do not show attention heads, the order of
queries, keys and values, and schedules: these are asked for, or assumed and reported.

guided-diffusion     U-Net and noisy classifier of Dhariwal & Nichol 2021
improved-diffusion   U-Net of Nichol & Dhariwal 2021
latent-diffusion     U-Net and KL autoencoder of Rombach et al. 2022
monai                DiffusionModelUNet and AutoencoderKL, also with the names of the package monai-generative
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from medseg_diffusion.errors import ModelError, UsageError

from .checkpoint_file import read_state
from .latent_diffusion import latent_diffusion
from .monai import monai_autoencoder, monai_unet, present_names
from .openai import openai_classifier, openai_unet
from .rules import Foreign, State
from .signatures import few, nearest

__all__ = ["SOURCES", "Foreign", "Source", "convert", "read_state"]

Source = Literal["guided-diffusion", "improved-diffusion", "latent-diffusion", "monai"]
SOURCES: tuple[Source, ...] = ("guided-diffusion", "improved-diffusion", "latent-diffusion", "monai")


def convert(state: State, source: Source, settings: Mapping[str, Any] | None = None) -> Foreign:
    """Convert a published state dict to our network.

    Args:
        state: names and tensors (`read_state`).
        source: the code that the names are from.
        settings: what the shapes do not show: head_channels or num_heads for a network with attention; qkv_order
            (legacy, the default, or new) of guided-diffusion; norm_eps; norm_groups of monai; part (denoiser or
            autoencoder) of latent-diffusion.

    Raises:
        ModelError: names or shapes that the source's networks do not have. It names the nearest known architecture.
        UsageError: an unknown, invalid or missing setting.
    """
    settings = dict(settings or {})
    allowed = {"head_channels", "num_heads", "qkv_order", "norm_eps", "norm_groups", "part"}
    if unknown := sorted(set(settings) - allowed):
        raise UsageError(f"--set {unknown[0]}: unknown here; known: {', '.join(sorted(allowed))}")
    if settings.get("qkv_order", "legacy") not in ("legacy", "new"):
        raise UsageError(f"--set qkv_order={settings['qkv_order']}: use legacy or new")
    for name in ("head_channels", "num_heads", "norm_groups"):
        if name in settings and not (isinstance(settings[name], int) and settings[name] > 0):
            raise UsageError(f"--set {name}={settings[name]}: expected a whole number above 0")
    if not isinstance(settings.get("norm_eps", 1e-5), float):
        raise UsageError(f"--set norm_eps={settings['norm_eps']}: expected a number such as 1e-6")
    try:
        if source == "monai":
            state = present_names(state)
            autoencoder = "encoder.blocks.0.conv.weight" in state
            return monai_autoencoder(state, settings) if autoencoder else monai_unet(state, settings)
        if source == "latent-diffusion":
            return latent_diffusion(state, settings)
        if any(name.startswith("out.2.positional") for name in state):
            return openai_classifier(state, settings)
        return openai_unet(state, settings)
    except KeyError as error:
        raise ModelError(
            f"not a {source} network: it has no {error.args[0]}, but {few(state)}; {nearest(state)}"
        ) from error
    except (ValueError, IndexError, StopIteration) as error:
        # Shapes or settings from which our network cannot be built.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"not a whole {source} network ({reason}): it has {few(state)}; {nearest(state)}") from error
