"""Train a segmenter on a list of files, from a preset with a few changes, and segment a scan that it has not seen.

    python examples/train_segmenter.py [FOLDER]

The scans are synthetic: a bright ellipsoid in noise. Half a minute of training is a demonstration, not a result.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nibabel as nib
import numpy as np

from medseg_diffusion import evaluate_arrays, load_model, train_segmenter

CHANGES = {
    "data.labels": ["ellipsoid"], "data.codes": {}, "data.window": [16, 16, 16],
    "data.test_cases": 2, "data.validation_cases": 2, "data.calibration_cases": 0,
    "network.channels": 16, "network.channel_mult": [1, 2], "network.num_res_blocks": 1,
    "training.max_steps": 150, "training.validate_every": 75, "training.ema_decay": 0.95, "training.warmup_steps": 10,
}  # fmt: skip


def write_case(folder: Path, seed: int) -> tuple[Path, Path]:
    """A scan of 24 x 24 x 24 voxels of 2 mm, and its labels."""
    random = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.arange(24)] * 3, indexing="ij"), -1)
    centre, radii = random.uniform(9, 15, 3), random.uniform(3, 6, 3)
    label = ((((grid - centre) / radii) ** 2).sum(-1) < 1).astype(np.uint8)
    image = (100 + 60 * label + random.normal(0, 25, label.shape)).astype(np.float32)
    paths = folder / f"case{seed:02d}.nii.gz", folder / f"case{seed:02d}_label.nii.gz"
    for path, array in zip(paths, (image, label), strict=True):
        nib.save(nib.Nifti1Image(array, np.diag([2, 2, 2, 1])), path)
    return paths


def main(folder: Path) -> None:
    """Write the scans, train on all but the last, and score the last."""
    folder.mkdir(parents=True, exist_ok=True)
    *cases, (scan, label) = [write_case(folder, seed) for seed in range(13)]
    trained = train_segmenter(
        "ensemdiff-hippocampus-small", cases, folder / "run", overrides=CHANGES,
        on_progress=lambda what, share: print(f"\r{share:4.0%} {what:99}", end=""),
    )  # fmt: skip

    segmented = load_model(trained).segment(scan)
    found = evaluate_arrays(segmented.labels, label, labels=segmented.classes)
    print(
        f"\nnot seen in training: Dice {found[1].dice:.3f}; members agree with {segmented.agreement['ellipsoid']:.3f}"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "example-output"))
