"""Whole heads of 2 mm with labelled structures, synthesised from label maps: data for generators of volumes.

    python benchmarks/studies/synthetic_heads.py brain_labelmaps OUT [--per-map 30] [--seed 0]
    medseg train-generator ldm-heads-small --data OUT -o runs/heads

OUT becomes a labelled folder (imagesTr, labelsTr, dataset.json, patients.csv), in which a patient is an anatomy. All
heads are like T1, whole, and of the resolution of the grid; anatomies are deformed as for the training of segmenters.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from medseg_diffusion.data.brain_classes import STRUCTURES
from medseg_diffusion.data.label_maps import load_label_map
from medseg_diffusion.data.synthetic_brains import SynthesisConfig, synthetic_scan
from medseg_diffusion.diffusion.noise import derive_seed

SPACING_MM = 2.0
WHOLE_T1 = SynthesisConfig(t1_share=1.0, strip=0.0, crop=0.0, spacing=(SPACING_MM, SPACING_MM), noise=0.03)


def main() -> None:
    """Make the heads of every label map and the files that describe them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("label_maps", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--per-map", type=int, default=30, help="heads of each anatomy; default: 30")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folders = [arguments.out / name for name in ("imagesTr", "labelsTr")]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    rows = []
    files = sorted(arguments.label_maps.glob("*.nii.gz"))
    for done, file in enumerate(files, 1):
        anatomy = load_label_map(file, STRUCTURES)
        for number in range(arguments.per_map):
            name = f"{anatomy.name}-{number:03d}"
            generator = torch.Generator().manual_seed(derive_seed(arguments.seed, name))
            image, label, affine = synthetic_scan(anatomy, generator, WHOLE_T1, STRUCTURES, SPACING_MM)
            arrays = (image.round().clamp(0, 32767).numpy().astype(np.int16), label.numpy())
            for folder, array in zip(folders, arrays, strict=True):
                nib.save(nib.Nifti1Image(array, affine), folder / f"{name}.nii.gz")
            rows.append((name, anatomy.name))
        print(f"{done} of {len(files)} label maps", flush=True)
    labels = {str(value): name for value, name in enumerate(STRUCTURES.names)}
    about = {"labels": labels, "numTraining": len(rows), "file_ending": ".nii.gz", "modality": {"0": "T1"}}
    (arguments.out / "dataset.json").write_text(json.dumps(about, indent=2) + "\n")
    with (arguments.out / "patients.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("case", "patient"), *rows])


if __name__ == "__main__":
    main()
