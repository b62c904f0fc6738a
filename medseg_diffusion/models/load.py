"""A model's name or folder to the object that it is."""

from __future__ import annotations

from pathlib import Path

from medseg_diffusion.device import choose_device, tune
from medseg_diffusion.methods.ensemble import Fusion, Uncertainty

from .pixel_segmenter import PixelSegmenter
from .segmentation import EnsembleOptions, SegmentationModel
from .segmenter import MaskSegmenter
from .store import load_model_files

DEFAULT_SEGMENTER = "brain-tissue-t1"


def load_segmenter(
    name_or_path: str | Path = DEFAULT_SEGMENTER,
    device: str = "auto",
    ensemble: int | None = None,
    steps: int | None = None,
    sampler: str | None = None,
    fusion: Fusion = "mean",
    uncertainty: Uncertainty = "entropy",
) -> SegmentationModel:
    """Loads a segmenter once for many scans.

    Args:
        name_or_path: model folder, run folder or installed name.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        ensemble: members per scan; None, like ``steps`` and ``sampler``, takes the model's default.
        steps: denoiser calls per sample.
        sampler: "ddpm", "ddim" or "dpm++".
        fusion: "mean", "majority" or "staple".
        uncertainty: "entropy", "mutual-information" or "variance" (`Ensemble.uncertainty`).

    Raises:
        ModelError: a model that is missing, unusable or no segmenter.
        UsageError: an unknown device or sampler, or options that the model does not have.
    """
    chosen = choose_device(device)
    tune(chosen)
    saved = load_model_files(name_or_path)
    options = EnsembleOptions(ensemble, steps, sampler, fusion, uncertainty)
    if saved.card.get("method") == "label-efficient":
        return PixelSegmenter(saved, chosen, options)
    return MaskSegmenter(saved, chosen, options)
