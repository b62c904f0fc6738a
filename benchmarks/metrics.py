"""How fast are the metrics of `medseg evaluate`, beside MONAI and surface-distance, and do they agree?

    python benchmarks/metrics.py

Two label maps of 240 x 240 x 155 voxels with 4 classes are compared: nested parts of a tumour, and scattered lesions.
All take turns in one process and thread. MONAI computes HD95, surface Dice, Dice and IoU; surface-distance computes
HD95 and surface Dice; `measure` computes all metrics of `medseg evaluate` but clDice. Brute force over all pairs of
surface voxels is the independent reference. surface-distance weights surface elements by their area and therefore has
other numbers; how much they differ is noted.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from common import Options, Row, installed, main
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.distance import cdist

from medseg_diffusion.metrics.case_metrics import MeasureOptions, measure

SHAPE, SPACING, CLASSES, TOLERANCE_MM = (240, 240, 155), (1.0, 1.0, 1.0), (1, 2, 3, 4), 1.0
COMMON = ("dice", "iou", "hd95_mm", "nsd")
PEER_METRICS = {"MONAI": "Dice, IoU, HD95, NSD", "surface-distance": "HD95, NSD"}
Labels = NDArray[np.uint8]
Numbers = Mapping[int, Mapping[str, float]]


def label_maps() -> tuple[Labels, Labels]:
    """Prediction and reference."""
    axes = np.meshgrid(*(np.linspace(-1, 1, size, dtype=np.float32) for size in SHAPE), indexing="ij", sparse=True)
    head = sum((axis / radius) ** 2 for axis, radius in zip(axes, (0.7, 0.85, 0.85), strict=True)) < 1
    radius = np.sqrt(sum(((axis - c) / 0.35) ** 2 for axis, c in zip(axes, (0.2, 0.1, 0.0), strict=True)))
    tumour, scattered, error = 3 * (1 - radius) + 0.5 * texture(6, 1), texture(5, 2), 0.3 * texture(3, 3)

    def labels(noise: NDArray[np.float32] | float) -> Labels:
        depth = tumour + noise
        result = np.digitize(depth, (0, 1.0, 1.8)).astype(np.uint8)
        result[(result == 0) & (scattered + noise > 1.6)] = 4
        return np.where(head, result, 0).astype(np.uint8)

    return labels(error), labels(0.0)


def texture(scale: float, seed: int) -> NDArray[np.float32]:
    """Smooth noise of mean 0 and standard deviation 1."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(SHAPE, dtype=np.float32), scale)
    return noise / noise.std()


def ours(prediction: Labels, reference: Labels) -> Numbers:
    options = MeasureOptions(TOLERANCE_MM)
    return {
        label: result.metrics for label, result in measure(prediction, reference, CLASSES, SPACING, options).items()
    }


def with_monai(prediction: Labels, reference: Labels) -> Numbers:
    from monai.metrics import compute_dice, compute_hausdorff_distance, compute_iou, compute_surface_dice

    masks = [
        torch.stack([torch.from_numpy(labels == label) for label in (0, *CLASSES)])[None]
        for labels in (prediction, reference)
    ]
    values = {
        "dice": compute_dice(*masks, include_background=False),
        "iou": compute_iou(*masks, include_background=False),
        "hd95_mm": compute_hausdorff_distance(*masks, percentile=95, spacing=SPACING),
        "nsd": compute_surface_dice(*masks, [TOLERANCE_MM] * len(CLASSES), spacing=SPACING),
    }
    return {label: {name: float(value[0, i]) for name, value in values.items()} for i, label in enumerate(CLASSES)}


def with_surface_distance(prediction: Labels, reference: Labels) -> Numbers:
    from surface_distance import (
        compute_robust_hausdorff,
        compute_surface_dice_at_tolerance,
        compute_surface_distances,
    )

    numbers = {}
    for label in CLASSES:
        distances = compute_surface_distances(reference == label, prediction == label, SPACING)
        numbers[label] = {
            "hd95_mm": compute_robust_hausdorff(distances, 95),
            "nsd": compute_surface_dice_at_tolerance(distances, TOLERANCE_MM),
        }
    return numbers


def by_brute_force(prediction: Labels, reference: Labels) -> Numbers:
    """Overlap by counting, and the distance of every surface voxel to all surface voxels of the other mask."""
    numbers = {}
    for label in CLASSES:
        masks = [prediction == label, reference == label]
        first, second = (np.argwhere(mask & ~ndimage.binary_erosion(mask)) * np.asarray(SPACING) for mask in masks)
        there, back = nearest(first, second), nearest(second, first)
        both = np.concatenate([there, back])
        numbers[label] = {
            "dice": 2 * float((masks[0] & masks[1]).sum()) / float(masks[0].sum() + masks[1].sum()),
            "iou": float((masks[0] & masks[1]).sum()) / float((masks[0] | masks[1]).sum()),
            "hd95_mm": float(max(np.percentile(there, 95), np.percentile(back, 95))),
            "nsd": float((both <= TOLERANCE_MM).mean()),
            "assd_mm": float(both.mean()),
        }
    return numbers


def nearest(points: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    parts = np.array_split(points, max(len(points) * len(others) // 20_000_000, 1))
    return np.concatenate([cdist(part, others).min(axis=1) for part in parts])


def rows(options: Options) -> Iterator[Row]:
    warnings.simplefilter("ignore")  # those of the libraries
    torch.set_num_threads(1)
    peers = {"MONAI": ("monai", with_monai), "surface-distance": ("surface_distance", with_surface_distance)}
    functions = {"ours": ours, **{name: run for name, (package, run) in peers.items() if installed(package)}}
    maps = label_maps()
    first, second = (np.ascontiguousarray(labels[100:180, 90:170, 40:115]) for labels in maps)
    for function in functions.values():
        function(first, second)  # imports
    if options.quick:
        maps = first, second
    numbers: dict[str, Numbers] = {}

    def timed(name: str) -> Callable[[], None]:
        def run() -> None:
            numbers[name] = functions[name](*maps)

        return run

    times = options.in_turns({name: timed(name) for name in functions}, warm=0)
    exact = by_brute_force(*maps)
    note = f"ours differs from brute force by {largest_gap(numbers['ours'], exact, (*COMMON, 'assd_mm')):.0e}"
    for name, (_, _) in peers.items():
        gaps = ""
        if name in numbers:
            own = [metric for metric in COMMON if metric in numbers[name][CLASSES[0]]]
            gaps = "; ".join(
                f"{metric} differs by {largest_gap(numbers['ours'], numbers[name], [metric]):.0e}" for metric in own
            )
        size = " x ".join(map(str, maps[0].shape))
        text = f"all metrics of `medseg evaluate` but clDice, {size}, {len(CLASSES)} classes"
        yield Row(
            text,
            f"{name} ({PEER_METRICS[name]})",
            times["ours"],
            times.get(name),
            note="; ".join(filter(None, (note, gaps))),
        )


def largest_gap(first: Numbers, second: Numbers, metrics: Sequence[str]) -> float:
    """The largest difference of these metrics over all classes."""
    return max(abs(first[label][metric] - second[label][metric]) for label in CLASSES for metric in metrics)


if __name__ == "__main__":
    main("metrics", __doc__, rows, repeats=3)
