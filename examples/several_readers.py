"""Sample the masks of several readers, and measure how much they disagree.

    python examples/several_readers.py [FOLDER]

The model learned from CT slices of lung nodules that four radiologists outlined. The two slices here are synthetic: a
clear nodule, and a faint one with a soft edge.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from medseg_diffusion import load_model


def slice_with_nodule(contrast: float, edge: float) -> np.ndarray:
    """A slice of 128 x 128 pixels: lung, a vessel, and a nodule of radius 9 whose edge is ``edge`` pixels wide."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[:128, :128]
    nodule = contrast / (1 + np.exp((np.hypot(x - 66, y - 62) - 9) / edge))
    vessel = 60 * np.exp(-((x - y - 30) ** 2) / 8)
    return np.maximum(nodule, vessel) + random.normal(12, 5, (128, 128))


def main(folder: Path) -> None:
    """Write a picture of scans, sampled masks and their mean; print the numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    model = load_model("lung-nodule-ct", ensemble=8, steps=10, uncertainty="mutual-information")
    _, axes = plt.subplots(2, 6, figsize=(12, 4), layout="constrained")
    for row, (title, contrast, edge) in zip(axes, (("clear", 160, 0.7), ("faint", 45, 4.0)), strict=True):
        image = slice_with_nodule(contrast, edge)
        found = model.segment(image, spacing_mm=(0.7, 0.7), maps=["members", "uncertainty"])
        areas = [mask.sum() * 0.7**2 for mask in found.members]
        print(f"{title}: areas of {min(areas):.0f} to {max(areas):.0f} mm2, {sum(a == 0 for a in areas)} empty masks")
        print(
            f"  agreement (mean Dice of pairs) {found.agreement['nodule']:.2f}, disagreement {found.disagreement:.3f}"
        )
        shown = [image, *found.members[:3, ..., 0], found.members.mean(0)[..., 0], found.uncertainty[..., 0]]
        titles = [title, "sample 1", "sample 2", "sample 3", "mean", "disagreement"]
        for axis, array, name in zip(row, shown, titles, strict=True):
            axis.imshow(array[32:96, 32:96], cmap="viridis" if name == "disagreement" else "gray")
            axis.set(title=name, xticks=[], yticks=[])
    plt.savefig(folder / "readers.png", dpi=100)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "example-output"))
