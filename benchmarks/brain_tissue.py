"""The brain-tissue model on what it never saw: synthetic scans of held-out anatomies, and real elderly heads.

    python benchmarks/brain_tissue.py MODEL --labelmaps brain_labelmaps --heads whole_head/elderly_t1

Prints Dice per tissue on synthetic whole heads (T1-like and of any contrast), and Dice of the brain mask (all three
tissues) against the masks that come with the heads (images/ beside dlmuse_automatic/).
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from medseg_diffusion.data.cases import Case, split_by_hash
from medseg_diffusion.data.synthesis import SynthesisConfig, load_label_map, synthetic_scan
from medseg_diffusion.diffusion.noise import derive_seed
from medseg_diffusion.metrics.overlap import label_overlap
from medseg_diffusion.metrics.statistics import mean_interval
from medseg_diffusion.pipeline import SegmentationModel
from medseg_diffusion.volumes.io import find_scans, read_labels, read_volume, scan_name
from medseg_diffusion.volumes.volume import Volume


def synthetic(model: SegmentationModel, folder: Path, scans: int) -> None:
    """Dice on ``scans`` whole heads of each held-out anatomy, T1-like and of any contrast."""
    cases = [Case(scan_name(file), file, file, scan_name(file)) for file in find_scans(folder)]
    section = model.config.data
    split = split_by_hash(cases, section.test_cases, section.validation_cases)
    labels = [label for label in model.labels if label]
    for title, config in (
        ("T1-like", replace(SynthesisConfig(), t1_share=1.0)),
        ("any contrast", replace(SynthesisConfig(), t1_share=0.0)),
    ):
        dice: dict[int, list[float]] = {label: [] for label in labels}
        for case in cases:
            if case.name not in split.test:
                continue
            anatomy = load_label_map(case.label)
            for i in range(scans):
                generator = torch.Generator().manual_seed(derive_seed("test", title, case.name, i))
                image, tissue, affine = synthetic_scan(anatomy, generator, config)
                found = model.segment(Volume(image[None], affine), derive_seed(case.name, i)).labels
                overlap = label_overlap(found.numpy(), tissue.numpy(), labels)
                for label in labels:
                    dice[label].append(overlap[label].dice)
                print(f"  {case.name} {i}", [round(dice[label][-1], 3) for label in labels], flush=True)
        _print(f"synthetic, {title}", model, dice)


def heads(model: SegmentationModel, folder: Path) -> None:
    """Dice of the brain mask on real heads."""
    dice: list[float] = []
    seconds: list[float] = []
    for file in find_scans(folder / "images"):
        volume = read_volume(file)
        reference = read_labels(folder / "dlmuse_automatic" / file.name).data[0] > 0
        started = time.perf_counter()
        found = model.segment(volume, derive_seed(0, scan_name(file))).labels > 0
        seconds.append(time.perf_counter() - started)
        dice.append(label_overlap(found.numpy(), reference.numpy(), [1])[1].dice)
        print(f"  {file.name} {dice[-1]:.3f} ({seconds[-1]:.0f} s)", flush=True)
    print(f"brain mask on {len(dice)} heads: {mean_interval(dice)}, {np.mean(seconds):.0f} s each")


def _print(title: str, model: SegmentationModel, dice: dict[int, list[float]]) -> None:
    for label, values in dice.items():
        print(f"{title}: {model.labels[label]} {mean_interval(values)}")
    print(f"{title}: mean {np.mean([np.nanmean(values) for values in dice.values()]):.3f}", flush=True)


def main() -> None:
    """Runs what the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--labelmaps", type=Path)
    parser.add_argument("--heads", type=Path)
    parser.add_argument("--scans", type=int, default=2, help="synthetic scans of each anatomy")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--ensemble", type=int)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    model = SegmentationModel(options.model, options.device, options.ensemble, options.steps)
    if options.labelmaps:
        synthetic(model, options.labelmaps, options.scans)
    if options.heads:
        heads(model, options.heads)


if __name__ == "__main__":
    main()
