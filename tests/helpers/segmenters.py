"""The smallest segmenters, untrained, with scans and images for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from PIL import Image

from medseg_diffusion import build
from medseg_diffusion.config.load import parse_config
from medseg_diffusion.config.segmenter import SegmenterConfig
from medseg_diffusion.methods.seen import SEEN
from medseg_diffusion.models.segmenter import MaskSegmenter
from medseg_diffusion.models.store import load_card, load_model_files, replace_card, save_model
from medseg_diffusion.sampling.loop import Sampler
from medseg_diffusion.workflows.scans import ScanResult
from medseg_diffusion.workflows.segment import SegmentOptions, segment

OBLIQUE = np.array([[-0.9, 0.1, 0.0, 40.0], [0.1, 1.1, 0.2, -30.0], [0.0, -0.2, 2.0, 5.0], [0.0, 0.0, 0.0, 1.0]])


def tiny_config(**changes: object) -> SegmenterConfig:
    content = {
        "method": "ensemdiff",
        "data": {"labels": ["bright"], "window": [8, 8, 8]},
        "network": {"channels": 8, "channel_mult": [1, 2]},
        "diffusion": {"head": "logits", "scale": 0.5, "schedule": {"name": "cosine"}},
        "inference": {"steps": 2},
        **changes,
    }
    return parse_config(content, "test")


def make_model(path: Path, config: SegmenterConfig, labels: int = 2) -> Path:
    torch.manual_seed(0)
    model = build.segmenter(config, labels)
    for parameter in model.parameters():  # zero-initialised outputs would hide everything behind them
        torch.nn.init.normal_(parameter, std=0.1)
    card = {
        "method": config.method,
        "labels": {"0": "background", "1": "bright"} | ({"2": "dark"} if labels == 3 else {}),
        "channels": ["T1", "FLAIR", "T2"][: config.data.channels],
        "config": config.model_dump(mode="json"),
    }
    save_model(path, card, model.state_dict(), "# card")
    return path


STRUCTURES = {
    0: "background", 1: "left hippocampus", 2: "right hippocampus", 3: "cerebral cortex", 4: "white matter",
    5: "other CSF",
}  # fmt: skip
TISSUES = {
    "CSF": ["other CSF"],
    "grey matter": ["left hippocampus", "right hippocampus", "cerebral cortex"],
    "white matter": ["white matter"],
}


def structures_model(path: Path, **changes: object) -> Path:
    """A model of five structures, which its card groups into tissues. ``changes`` are entries of the card."""
    config = tiny_config(data={"labels": list(STRUCTURES.values())[1:], "window": [8, 8, 8]})
    saved = load_model_files(make_model(path, config, len(STRUCTURES)))
    card = {**saved.card, "labels": {str(value): name for value, name in STRUCTURES.items()}, "tissues": TISSUES}
    save_model(path, {**card, **changes}, saved.weights, "# card")
    return path


def save(path: Path, data: np.ndarray | None = None, affine: np.ndarray = OBLIQUE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if data is None:
        data = np.random.default_rng(len(path.name)).random((11, 13, 9)).astype(np.float32)
    image = nib.Nifti1Image(data, affine)
    image.set_sform(affine, 1)
    image.set_qform(affine, 2)
    image.header.set_xyzt_units("mm")
    nib.save(image, path)
    return path


def run(scans: list[Path], model: Path, **options: object) -> list[ScanResult]:
    return segment(scans, SegmentOptions(model=str(model), device="cpu", **options))  # type: ignore[arg-type]


def calibrated(model: Path, path: Path, **changes: object) -> Path:
    """A copy of a model with a calibration for its own sampler and steps, and 3 members."""
    saved = load_model_files(model)
    content = {
        "sampler": "dpm++", "steps": 2, "ensemble": 3, "fusion": "mean", "temperature": 2.0, "ece": [0.1, 0.05],
        "agreement": 0.0, "cases": 4, "patients": 4, "volume_errors": [0.0], "level": 0.8,
        **changes,
    }  # fmt: skip
    save_model(path, {**saved.card, "calibration": content}, saved.weights, "# card")
    return path


def with_seen(model: Path, **entry: Any) -> Path:
    """The model with an entry of what its training has seen: of this alone."""
    replace_card(model, {**load_card(model), SEEN: {"scans": 15, **entry}})
    return model


FLAT = {"network": {"dims": 2, "channels": 8, "channel_mult": [1, 2]}, "data": {"window": [8, 8], "channels": 3}}


def save_image(path: Path, mode: str = "RGB") -> Path:
    """An image of 13 x 11 pixels, bright in the upper left corner."""
    path.parent.mkdir(parents=True, exist_ok=True)
    colours = np.random.default_rng(len(path.name)).integers(0, 100, (11, 13, 3), dtype=np.uint8)
    colours[:3, :4] += 150
    Image.fromarray(colours).convert(mode).save(path)
    return path


class Threshold(torch.nn.Module):
    """A segmenter in closed form: the class 1 is certain where the first channel is above a level."""

    def __init__(self, level: float = 0.0) -> None:
        super().__init__()
        self.level = level

    def probabilities(
        self, image: torch.Tensor, seeds: Sequence[Sequence[int]], sampler: Sampler, times: Sequence[int]
    ) -> torch.Tensor:
        """(B, C, *S) intensities to (B, N, 2, *S)."""
        bright = torch.sigmoid(20 * (image[:, 0] - self.level))
        return torch.stack([1 - bright, bright], 1)[:, None].expand(-1, len(seeds[0]), -1, *(-1,) * (image.ndim - 2))


def thresholding(path: Path, level: float = 0.0, **changes: object) -> MaskSegmenter:
    """A `MaskSegmenter` that is real but for its network, a `Threshold`."""
    model = MaskSegmenter(load_model_files(make_model(path, tiny_config(**changes))), torch.device("cpu"))
    model.model = Threshold(level)  # type: ignore[assignment]
    return model
