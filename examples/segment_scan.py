"""Segment a scan: load a model once, get a mask with the scan's geometry, compare it with a reference.

    python examples/segment_scan.py [FOLDER]

The scan is the ICBM152 T1 template that nilearn carries, at 2 mm (pip install 'medseg-diffusion[demo]').
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
from nilearn.datasets import load_mni152_gm_template, load_mni152_template, load_mni152_wm_template

from medseg_diffusion import evaluate_arrays, load_model


def template_and_tissues() -> tuple[nib.Nifti1Image, np.ndarray]:
    """The scan, and its reference: 1 CSF, 2 grey matter, 3 white matter, where the brain is."""
    scan = load_mni152_template(resolution=2)
    grey, white = (load(resolution=2).get_fdata() for load in (load_mni152_gm_template, load_mni152_wm_template))
    tissue = np.stack([1 - grey - white, grey, white]).argmax(0) + 1
    return scan, np.where(scan.get_fdata() > 0, tissue, 0).astype(np.uint8)


def main(folder: Path) -> None:
    """Write the mask, its uncertainty and a picture; print volumes and Dice."""
    folder.mkdir(parents=True, exist_ok=True)
    scan, reference = template_and_tissues()

    model = load_model("brain-tissue-t1", fast=True)
    segmented = model.segment(scan, maps=["uncertainty"], on_progress=lambda what, share: print(f"{share:4.0%} {what}"))
    for name, volume in segmented.volumes_ml.items():
        print(f"{name}: {volume:.0f} ml")
    segmented.save(folder / "mask.nii.gz")
    segmented.save(folder / "uncertainty.nii.gz", "uncertainty")

    compared = {2: "grey matter", 3: "white matter"}  # 2 mm are too coarse for the thin CSF around the brain
    for metrics in evaluate_arrays(segmented.labels, reference, scan.header.get_zooms(), compared).values():
        print(f"{metrics.name}: Dice {metrics.dice:.3f}, HD95 {metrics.hd95_mm:.1f} mm")

    k = scan.shape[2] // 2
    shown = {"scan": scan.get_fdata(), "mask": segmented.labels, "uncertainty": segmented.uncertainty}
    _, axes = plt.subplots(1, 3, figsize=(9, 4), layout="constrained")
    for axis, (title, volume) in zip(axes, shown.items(), strict=True):
        axis.imshow(np.rot90(volume[:, :, k]), cmap="gray" if title == "scan" else "viridis")
        axis.set(title=title, xticks=[], yticks=[])
    plt.savefig(folder / "segmented.png", dpi=100)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "example-output"))
