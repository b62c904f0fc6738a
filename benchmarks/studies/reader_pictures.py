"""Draws what readers and samples say about images: outlines of every reader, of eight samples, and the frequency map.

    python benchmarks/studies/reader_pictures.py OUT.png --data DIR MODEL... [--cases NAME...] [--crop 64]

One row a case for each model: the image, each reader's outline, the outlines of the first eight samples, and the share
of 16 samples that mark each pixel. Without --cases they are test patients whose readers disagree by different amounts.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from medseg_diffusion.data.cases import Case, digest, find_cases, middle_cases
from medseg_diffusion.diffusion.noise import derive_seed
from medseg_diffusion.models.load import load_segmenter
from medseg_diffusion.models.segmentation import SegmentationModel
from medseg_diffusion.volumes.io import read_labels, read_volume

SAMPLES, SHOWN = 16, 8
READER, SAMPLE = "#ffb000", "#00b4d8"


def masks_of(model: SegmentationModel, case: Case) -> NDArray[np.bool_]:
    """The samples (N, H, W)."""
    segmentation = model.segment(read_volume(case.image), derive_seed(0, case.name))
    return model.aggregation.members_on_scan(segmentation).numpy()[..., 0].swapaxes(1, 2) > 0


def chosen(model: SegmentationModel, data: Path, count: int) -> list[Case]:
    """Test cases in the order of the readers' disagreement, evenly spread."""
    held_out = model.saved.card["training"]["held_out"]["test"]
    cases = middle_cases([case for case in find_cases(data).cases if digest(case.name) in held_out])

    def disagreement(case: Case) -> float:
        sizes = [int((read_labels(path).data > 0).sum()) for path in case.labels]
        return float(np.std(sizes) / (1 + np.mean(sizes)))

    ordered = sorted(cases, key=disagreement)
    return [ordered[round(share * (len(ordered) - 1))] for share in np.linspace(0.1, 0.9, count)]


def draw(panel: Axes, image: NDArray[np.floating], mask: NDArray[np.bool_] | None = None, colour: str = READER) -> None:
    panel.imshow(image, cmap="gray", vmin=0, vmax=255)
    if mask is not None and mask.any():
        panel.contour(mask, [0.5], colors=colour, linewidths=1.2)
    elif mask is not None:
        panel.text(0.5, 0.04, "empty", color=colour, ha="center", fontsize=7, transform=panel.transAxes)


def row(panels: Sequence[Axes], case: Case, model: SegmentationModel, crop: int, readers: int) -> None:
    image = read_volume(case.image).data[0, ..., 0].numpy().T
    first = [(side - crop) // 2 for side in image.shape]
    part = tuple(slice(start, start + crop) for start in first)
    samples = masks_of(model, case)
    draw(panels[0], image[part])
    for panel, path in zip(panels[1 : 1 + readers], case.labels, strict=False):
        draw(panel, image[part], read_labels(path).data[0, ..., 0].numpy().T[part] > 0)
    for panel, sample in zip(panels[1 + readers : 1 + readers + SHOWN], samples, strict=False):
        draw(panel, image[part], sample[part], SAMPLE)
    panels[-1].imshow(samples.mean(0)[part], cmap="magma", vmin=0, vmax=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cases", nargs="*", default=[])
    parser.add_argument("--count", type=int, default=4)
    parser.add_argument("--crop", type=int, default=64)
    options = parser.parse_args()
    models = [load_segmenter(name, "cpu", ensemble=SAMPLES) for name in options.models]
    named = {case.name: case for case in find_cases(options.data).cases}
    cases = [named[name] for name in options.cases] or chosen(models[0], options.data, options.count)
    readers = max(len(case.labels) for case in cases)
    titles = [
        "image",
        *(f"reader {i + 1}" for i in range(readers)),
        *(f"sample {i + 1}" for i in range(SHOWN)),
        "share",
    ]
    size = (1.05 * len(titles), 1.12 * len(cases) * len(models) + 0.3)
    figure, axes = plt.subplots(
        len(cases) * len(models), len(titles), figsize=size, squeeze=False, layout="constrained"
    )
    for i, (case, model) in enumerate((case, model) for case in cases for model in models):
        row(axes[i], case, model, options.crop, readers)
        if len(models) > 1:
            axes[i, 0].set_ylabel(model.saved.name, fontsize=6)
    for panel in axes.flat:
        panel.set(xticks=[], yticks=[])
    for panel, title in zip(axes[0], titles, strict=True):
        panel.set_title(title, fontsize=7)
    figure.savefig(options.out, dpi=140)


if __name__ == "__main__":
    main()
