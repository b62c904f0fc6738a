"""Seconds of the metrics of `medseg evaluate` beside those of MONAI and surface-distance, and whether they agree.

    python benchmarks/metrics.py [--rounds 3]

Two label maps of 240 x 240 x 155 voxels with 4 classes are compared: nested parts of a tumour, and scattered lesions.
All take turns in one process and thread. MONAI computes HD95, surface Dice, Dice and IoU; surface-distance computes
HD95 and surface Dice; `measure` computes all metrics of `medseg evaluate` but clDice. Brute force over all pairs of
surface voxels is the independent reference. surface-distance weights surface elements by their area and therefore has
other numbers; how much they differ is printed.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.distance import cdist

from medseg_diffusion.metrics.case_metrics import MeasureOptions, measure

SHAPE, SPACING, CLASSES, TOLERANCE_MM = (240, 240, 155), (1.0, 1.0, 1.0), (1, 2, 3, 4), 1.0
COMMON = ("dice", "iou", "hd95_mm", "nsd")
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


def seconds(function: Callable[[Labels, Labels], Numbers], maps: tuple[Labels, Labels]) -> tuple[float, Numbers]:
    """Time of the processor, so that other processes on the machine matter little; and the numbers."""
    started = time.process_time()
    numbers = function(*maps)
    return time.process_time() - started, numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="times that each is called; medians are printed")
    rounds = parser.parse_args().rounds
    warnings.simplefilter("ignore")  # those of the libraries
    torch.set_num_threads(1)
    functions = {"medseg evaluate": ours, "MONAI": with_monai, "surface-distance": with_surface_distance}
    maps = label_maps()
    small = tuple(np.ascontiguousarray(labels[100:180, 90:170, 40:115]) for labels in maps)
    for function in functions.values():
        function(small[0], small[1])  # imports
    times: dict[str, list[float]] = {name: [] for name in functions}
    numbers: dict[str, Numbers] = {}
    for _ in range(rounds):
        for name, function in functions.items():
            taken, numbers[name] = seconds(function, maps)
            times[name].append(taken)
    own = statistics.median(times["medseg evaluate"])
    for name, measured in times.items():
        print(f"{name}: {statistics.median(measured):.2f} s, {statistics.median(measured) / own:.1f} times the first")
    own_numbers, others = numbers.pop("medseg evaluate"), {"brute force": by_brute_force(*maps), **numbers}
    for metric in (*COMMON, "assd_mm"):
        differences = [
            f"from {name} by {max(abs(own_numbers[label][metric] - other[label][metric]) for label in CLASSES):.1e}"
            for name, other in others.items()
            if metric in other[CLASSES[0]]
        ]
        print(f"{metric}: differs {', '.join(differences)}")


if __name__ == "__main__":
    main()
