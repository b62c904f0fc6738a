"""Find an anomaly: a map of how unlike healthy scans every voxel is, and what lies above a calibrated threshold.

    python examples/anomaly_map.py [FOLDER]

The scan is synthetic: a head as FLAIR shows it, made from the tissue maps that nilearn carries, with a bright lesion
(pip install 'medseg-diffusion[demo]').
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from nilearn.datasets import load_mni152_brain_mask, load_mni152_gm_template, load_mni152_wm_template
from scipy import ndimage

from medseg_diffusion import evaluate_arrays, load_model

SLICES = slice(44, 52)


def head_with_lesion() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A slab of a FLAIR-like head of 2 mm, the mask of its lesion, and its affine."""
    brain = load_mni152_brain_mask(resolution=2)
    inside = np.asarray(brain.dataobj) > 0
    grey, white = (load(resolution=2).get_fdata() for load in (load_mni152_gm_template, load_mni152_wm_template))
    scalp = ndimage.binary_dilation(inside, iterations=6) & ~ndimage.binary_dilation(inside, iterations=3)
    image = 70 * grey + 60 * white + 15 * (inside - grey - white).clip(0) + 55 * scalp
    distance = np.sqrt(sum((axis - at) ** 2 for axis, at in zip(np.indices(inside.shape), (32, 62, 48), strict=True)))
    lesion = distance < 6
    image = ndimage.gaussian_filter(image + 45 * lesion, 0.5) + np.random.default_rng(0).normal(0, 2, image.shape)
    return image[:, :, SLICES].clip(0), lesion[:, :, SLICES], brain.affine


def main(folder: Path) -> None:
    """Write the map, the mask and a picture; print the score of the scan."""
    folder.mkdir(parents=True, exist_ok=True)
    image, lesion, affine = head_with_lesion()
    found = load_model("flair-anomaly").anomaly(image, affine=affine)
    print(f"score of the scan: {found.scan_score:.3f}, higher than {found.healthy_percentile} % of healthy scans")
    print(f"above the threshold: {found.volume_ml:.1f} ml; the lesion has {lesion.sum() * 0.008:.1f} ml")
    print(f"Dice: {evaluate_arrays(found.mask, lesion, (2, 2, 2))[1].dice:.3f}")
    found.save(folder / "anomaly.nii.gz")
    found.save(folder / "anomaly_mask.nii.gz", "mask")
    _, axes = plt.subplots(1, 4, figsize=(12, 4), layout="constrained")
    shown = {"scan": image, "lesion": lesion, "score": found.score, "mask": found.mask}
    for axis, (name, array) in zip(axes, shown.items(), strict=True):
        axis.imshow(np.rot90(array[:, :, 4]), cmap="magma" if name == "score" else "gray")
        axis.set(title=name, xticks=[], yticks=[])
    plt.savefig(folder / "anomaly.png", dpi=100)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "example-output"))
