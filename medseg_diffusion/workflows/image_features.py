"""Features and scores of sampled and real images: of whole images, or of the slices of volumes in three planes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from medseg_diffusion.errors import UsageError
from medseg_diffusion.metrics.diversity import WINDOW, ms_ssim_diversity
from medseg_diffusion.metrics.generation import PLANES, Features, Scores, SliceFeatures, scores, slice_scores
from medseg_diffusion.models.encoder_features import EncoderFeatures
from medseg_diffusion.networks.extractors import Extractor, extractor, is_known

Pixels = npt.NDArray[np.uint8]
"""Images (N, H, W, C) or volumes (N, I, J, K, C)."""
CHUNK = 64
"""Images whose features are computed at a time; volumes one by one."""
SLICES = 9
"""Slices of a volume in each plane, evenly spaced in the middle half, with the middle one among them."""


def feature_extractor(
    name: str = "auto", device: torch.device | str = "cpu", inception: Path | None = None, download: bool = False
) -> Extractor:
    """The extractor with a name (`medseg_diffusion.networks.extractors.extractor`), or the encoder of a segmenter.

    Raises:
        ModelError: No usable extractor or model.
        UsageError: Weights of Inception for another extractor.
    """
    if is_known(name):
        return extractor(name, device, inception, download)
    if inception is not None:
        raise UsageError(f"--inception is of the extractor inception, not of {name}")
    return EncoderFeatures(name, device)


def features_of(
    images: Pixels, extract: Extractor, on_progress: Callable[[int, int], None]
) -> Features | SliceFeatures:
    """The features of images or volumes; an extractor of images sees the slices of volumes.

    ``on_progress`` is called with the images, slices or volumes done, and all.
    """
    if images.ndim == 4 or extract.dims == 3:
        return _features(images, extract, on_progress)
    planes = {}
    for i, (axis, name) in enumerate(enumerate(PLANES, 1)):
        slices = images.take(slice_positions(images.shape[axis]), axis)
        stacked = np.moveaxis(slices, axis, 1)  # (N, SLICES, H, W, C)
        done, total = i * len(images) * SLICES, len(PLANES) * len(images) * SLICES
        on_slice = partial(_tell, on_progress, done, total)
        planes[name] = _features(stacked.reshape(-1, *stacked.shape[2:]), extract, on_slice)
    return SliceFeatures(planes, SLICES)


def slice_positions(side: int) -> list[int]:
    """The positions of `SLICES` slices along an axis of ``side`` voxels; the one in the middle is side // 2."""
    return [int(side * (0.25 + 0.5 * (k + 0.5) / SLICES)) for k in range(SLICES)]


def scores_of(samples: Features | SliceFeatures, reference: Features | SliceFeatures) -> Scores:
    """All scores of samples against reference images, whose features are of one extractor."""
    if isinstance(samples, SliceFeatures):
        assert isinstance(reference, SliceFeatures)
        return slice_scores(samples, reference)
    assert isinstance(reference, Features)
    return scores(samples, reference)


def with_diversity(scored: Scores, images: Pixels) -> Scores:
    """The scores, with the structural similarity of the volumes to each other; not of images or of tiny volumes."""
    if images.ndim == 4 or min(images.shape[1:4]) < WINDOW:
        return scored
    return replace(scored, ms_ssim=ms_ssim_diversity(torch.from_numpy(np.asarray(images)).movedim(-1, 1)))


def _features(images: Pixels, extract: Extractor, on_progress: Callable[[int, int], None]) -> Features:
    parts, chunk = [], CHUNK if images.ndim == 4 else 1
    for first in range(0, len(images), chunk):
        parts.append(extract(torch.from_numpy(np.array(images[first : first + chunk]))))
        on_progress(min(first + chunk, len(images)), len(images))
    joined = [torch.cat([getattr(part, name) for part in parts]) for name in ("pooled", "spatial", "logits")]
    return Features(*joined)


def _tell(on_progress: Callable[[int, int], None], before: int, total: int, done: int, _part: int) -> None:
    on_progress(before + done, total)
