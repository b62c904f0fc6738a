"""Draws the members of several models on one scan: the reference, five members and the final mask, one model a row.

    python benchmarks/studies/member_pictures.py OUT.png SCAN REFERENCE MODEL... [--axis 1] [--names NAME...]

The slice is the one across --axis in which the reference is largest.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray

from medseg_diffusion.diffusion.noise import derive_seed
from medseg_diffusion.models.load import load_segmenter
from medseg_diffusion.volumes.io import read_labels, read_volume
from medseg_diffusion.volumes.paths import is_image

MEMBERS = 5
COLOURS = ("#ffb000", "#00b4d8", "#e05780")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("scan", type=Path)
    parser.add_argument("reference", type=Path)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--axis", type=int, default=1)
    parser.add_argument("--names", nargs="*", default=[])
    options = parser.parse_args()
    scan, reference = read_volume(options.scan, channels=None), read_labels(options.reference).data[0].numpy()
    position = int((reference > 0).sum(tuple({0, 1, 2} - {options.axis})).argmax())

    def across(array: NDArray[np.generic]) -> NDArray[np.generic]:
        plane: NDArray[np.generic] = np.asarray(array.take(position, options.axis))
        return plane.T if is_image(options.scan) else np.rot90(plane)  # the second axis of image files points down

    image = across(scan.data.mean(0).numpy())
    titles = ["reference", *(f"member {i + 1}" for i in range(MEMBERS)), "final mask"]
    names = options.names or [Path(model).name for model in options.models]
    height, width = image.shape
    figure, axes = plt.subplots(
        len(names), len(titles), figsize=(1.2 * len(titles), 1.2 * len(names) * height / width + 0.3), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for row, model_name, name in zip(axes, options.models, names, strict=True):
        model = load_segmenter(model_name, "cpu")
        found = model.segment(scan, derive_seed(0, options.scan.name))
        masks: list[NDArray[np.generic] | None] = [reference, *[None] * MEMBERS, found.labels.numpy()]
        if model.samples_masks:
            masks[1:-1] = model.aggregation.members_on_scan(found).numpy()[:MEMBERS]
        for panel, mask in zip(row, masks, strict=True):
            if mask is None:
                panel.axis("off")
                continue
            panel.imshow(image, cmap="gray")
            for value, colour in zip(range(1, reference.max() + 1), COLOURS, strict=False):
                if (across(mask) == value).any():
                    panel.contour(across(mask) == value, [0.5], colors=colour, linewidths=1.1)
            panel.set(xticks=[], yticks=[])
        row[0].set_ylabel(name, fontsize=7)
    for panel, title in zip(axes[0], titles, strict=True):
        panel.set_title(title, fontsize=7)
    figure.savefig(options.out, dpi=140)


if __name__ == "__main__":
    main()
