"""Features of scans from a trained segmenter, as an alternative to networks that were trained on photographs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from medseg_diffusion.errors import ModelError, UsageError
from medseg_diffusion.metrics.generation import Features
from medseg_diffusion.networks.extractors import Extractor
from medseg_diffusion.volumes.volume import Volume

from .load import load_segmenter
from .segmenter import MaskSegmenter
from .store import SavedModel


class EncoderFeatures(Extractor):
    """uint8 images (B, *S, C) to features: the means over space of the deepest layer of a segmenter's network.

    A segmenter of volumes sees whole volumes, one of slices sees slices. Intensities are scaled as in its training; the
    voxel size is not changed. A mask diffusion model sees noise, the same for all images, in place of a mask, at the
    noisiest of its times.

    Args:
        model: Segmenter: model folder, run folder or installed name, or a model that was read before.
        device: Device of the computation.

    Raises:
        ModelError: No usable model, or a segmenter without such a layer: a pixel classifier or an imported network.
    """

    def __init__(self, model: str | Path | SavedModel, device: torch.device | str = "cpu") -> None:
        loaded = load_segmenter(model, str(device), fast=True)
        if not isinstance(loaded, MaskSegmenter) or (deepest := _deepest(loaded.model.network)) is None:
            raise ModelError(f"{model}: has no encoder whose features could be compared; use another segmenter")
        self.segmenter = loaded
        saved = loaded.saved
        super().__init__(f"{saved.name} ({saved.sha256[:8]})", "none", saved.weights.values(), loaded.dims)
        self._scaling = replace(
            loaded.preprocessing, orientation=None, spacing_mm=None, size=None, crop_foreground=False, crop_centre=None
        )
        deepest.register_forward_hook(self._keep)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """Features of images of the segmenter's channels.

        Raises:
            UsageError: Images of another number of channels or axes.
        """
        segmenter = self.segmenter
        if images.ndim - 2 != self.dims or images.shape[-1] != segmenter.channels:
            kind = "volumes" if self.dims == 3 else "images"
            raise UsageError(
                f"{self.name}: takes {kind} of {segmenter.channels} channels, and these have {images.shape[-1]} and "
                f"{images.ndim - 2} axes; use another --extractor"
            )
        batch = torch.stack(list(self._scaled(images))).to(segmenter.device)
        segmenter.model.probabilities(batch, [[0]] * len(batch), segmenter.way.sampler, segmenter.times)
        pooled = self._last.flatten(2).mean(dim=2).float().cpu()
        nothing = pooled.new_empty(len(pooled), 0)
        return Features(pooled, nothing, nothing)

    def _scaled(self, images: Tensor) -> Iterator[Tensor]:
        """(C, *S) each, with the intensities of the segmenter's training."""
        for image in images.movedim(-1, 1).float():
            volume = Volume(image if self.dims == 3 else image[..., None], np.eye(4))
            scaled, _ = self._scaling.apply(volume)
            yield scaled if self.dims == 3 else scaled[..., 0]

    def _keep(self, _module: nn.Module, _inputs: object, output: Tensor) -> None:
        self._last = output


def _deepest(network: nn.Module) -> nn.Module | None:
    """The last block at the lowest resolution of a network of this package."""
    blocks = (getattr(module, "middle", None) for module in network.modules())
    return next((one[-1] for one in blocks if isinstance(one, nn.ModuleList)), None)
