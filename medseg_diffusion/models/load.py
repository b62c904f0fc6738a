"""Loads a segmenter by its name or folder."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from medseg_diffusion.device import choose_device, tune
from medseg_diffusion.errors import UsageError
from medseg_diffusion.methods.ensemble import Fusion, Uncertainty

from .pixel_segmenter import PixelSegmenter
from .segmentation import EnsembleOptions, SegmentationModel
from .segmenter import MaskSegmenter
from .store import SavedModel, load_model_files

DEFAULT_SEGMENTER = "brain-tissue-t1"


# many: one parameter for each option of an ensemble
def load_segmenter(
    name_or_path: str | Path | SavedModel = DEFAULT_SEGMENTER,
    device: str = "auto",
    *,
    ensemble: int | None = None,
    steps: int | None = None,
    sampler: str | None = None,
    fusion: Fusion = "mean",
    uncertainty: Uncertainty = "entropy",
    keep_largest: bool | None = None,
    fast: bool = False,
    max_memory: float | None = None,
    compile: bool = False,
    tissues: bool = False,
) -> SegmentationModel:
    """Load a segmenter once for many scans.

    Args:
        name_or_path: Model folder, run folder or installed name, or a model that was read before.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        ensemble: Members per scan; None takes the model's default.
        steps: Steps of the sampler; None takes the model's default.
        sampler: "ddpm", "ddim", "dpm++", "euler" or "heun"; None takes the model's default.
        fusion: "mean", "majority" or "staple".
        uncertainty: "entropy", "mutual-information" or "variance" (`Ensemble.uncertainty`).
        keep_largest: Keep only the largest connected part of the foreground; None takes the model's default.
        fast: One step and one mask, as far as the model has both.
        max_memory: Most memory of the process in GB, by an estimate; None for no limit.
        compile: Compile the network for every size of its input; masks differ by rounding.
        tissues: Tissues instead of the model's classes: the probability of a tissue is the sum of those of its classes.

    Raises:
        ModelError: A model that is missing, unusable or not a segmenter.
        UsageError: An unknown device, sampler, fusion or uncertainty, a number below 1, options that the model does
            not have, or tissues of a model whose card does not group its classes.
    """
    for name, number in (("ensemble", ensemble), ("steps", steps)):
        if number is not None and number < 1:
            raise UsageError(f"{name}={number}: expected 1 or more")
    for name, value, known in (("fusion", fusion, Fusion), ("uncertainty", uncertainty, Uncertainty)):
        if value not in get_args(known):
            raise UsageError(f"{name} {value!r} is unknown; use {', '.join(get_args(known))}")
    chosen = choose_device(device)
    tune(chosen)
    saved = load_model_files(name_or_path)
    options = EnsembleOptions(
        ensemble=ensemble,
        steps=steps,
        sampler=sampler,
        fusion=fusion,
        uncertainty=uncertainty,
        keep_largest=keep_largest,
        fast=fast,
        tissues=tissues,
    )
    pixels = saved.card.get("method") == "label-efficient"
    if pixels and compile:
        raise UsageError(f"{saved.path}: classifies pixels, which is not compiled: leave --compile out")
    model = PixelSegmenter(saved, chosen, options) if pixels else MaskSegmenter(saved, chosen, options, compile)
    model.max_memory = max_memory
    return model
