"""Train a small generator on a list of scans, and draw images from it.

    python examples/generate_images.py [FOLDER]

The scans are synthetic: rings of varying size and brightness. Half a minute of training is a demonstration, no result.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nibabel as nib
import numpy as np

from medseg_diffusion import load_model, train_generator

CHANGES = {
    "data.size": 32,
    "data.test_images": 1,
    "data.validation_images": 2,
    "network.channel_mult": [1, 2],
    "network.attention_factors": [],
    "training.batch_size": 8,
    "training.max_steps": 300,
    "training.validate_every": 300,
    "training.warmup_steps": 20,
    "training.ema_decay": 0.98,
}


def write_scan(path: Path, seed: int) -> Path:
    """A scan of 32 x 32 x 8 voxels: in every slice a bright ring around a grey disc."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:32, :32]
    slices = []
    for _ in range(8):
        centre, radius = random.uniform(14, 18, 2), random.uniform(7, 11)
        distance = np.hypot(x - centre[0], y - centre[1])
        ring = np.exp(-((distance - radius) ** 2) / 6)
        slices.append(100 * ring + random.uniform(20, 50) * (distance < radius) + random.normal(0, 2, (32, 32)))
    nib.save(nib.Nifti1Image(np.stack(slices, -1).astype(np.float32), np.eye(4)), path)
    return path


def main(folder: Path) -> None:
    """Write the scans, train, and draw sixteen images."""
    folder.mkdir(parents=True, exist_ok=True)
    scans = [write_scan(folder / f"scan{seed:02d}.nii.gz", seed) for seed in range(40)]
    trained = train_generator(
        "adm-slices-small", scans, folder / "run", overrides=CHANGES,
        on_progress=lambda what, share: print(f"\r{share:4.0%} {what:99}", end=""),
    )  # fmt: skip
    drawn = load_model(trained).sample(16, steps=20, seed=1)
    print(f"\n{drawn.images.shape} drawn: {drawn.save(folder / 'drawn.png')}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "example-output"))
