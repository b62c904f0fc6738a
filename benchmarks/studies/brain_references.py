"""Manual references of brain structures as label maps of the built-in model's classes.

    python benchmarks/studies/brain_references.py brain_structures OUT [--scans 1 2 3 4 5]

The references are those of the MICCAI 2012 challenge (Neuromorphometrics, Inc., under academic subscription; images:
OASIS). OUT becomes a folder of the Medical Segmentation Decathlon, which `medseg evaluate`, `benchmark-segmenter` and
`calibrate-segmenter` read. --scans are numbers of scans in the order of their names; without it, all.

What the protocols divide differently is left as it is: choroid plexus is part of the ventricle here and there, the
optic chiasm and remnants of the exterior (42, 43) are outside, vessels (63, 64) are white matter, the basal forebrain
(75, 76) is cortex. CSF of the sulci has no label. The vermis has no side in these references. It goes to the side on
which it lies, by the middle of the labelled cerebral white matter.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt

from medseg_diffusion.data.brain_classes import STRUCTURES

_RIGHT = {
    23: "accumbens",
    31: "amygdala",
    36: "caudate",
    38: "cerebellar cortex",
    40: "cerebellar white matter",
    44: "cerebral white matter",
    47: "hippocampus",
    49: "lateral ventricle",
    51: "lateral ventricle",
    55: "pallidum",
    57: "putamen",
    59: "thalamus",
    61: "ventral diencephalon",
    63: "cerebral white matter",
    76: "cerebral cortex",
}
_OTHERS = {4: "third ventricle", 11: "fourth ventricle", 35: "brainstem", 46: "other CSF"}
_LEFT_NUMBER = {23: 30, 76: 75}  # of every other structure it follows the right one
_VERMIS = (71, 72, 73)
_FIRST_CORTEX = 100


def structures(labels: npt.NDArray[np.integer], affine: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    """Values of the classes `STRUCTURES` for a reference (I, J, K) with its affine, voxel -> RAS mm."""
    value = {name: number for number, name in enumerate(STRUCTURES.names)}
    table = np.zeros(max(int(labels.max()), _FIRST_CORTEX) + 1, np.uint8)
    for number, name in _RIGHT.items():
        table[number], table[_LEFT_NUMBER.get(number, number + 1)] = value[f"right {name}"], value[f"left {name}"]
    for number, name in _OTHERS.items():
        table[number] = value[name]
    table[_FIRST_CORTEX::2], table[_FIRST_CORTEX + 1 :: 2] = (
        value["right cerebral cortex"],
        value["left cerebral cortex"],
    )
    result = table[labels]
    vermis = np.isin(labels, _VERMIS)
    sides = [_right_mm(labels == number, affine) for number in (44, 45)]
    middle = float(np.mean([side.mean() for side in sides]))
    on_the_right = _right_mm(vermis, affine) > middle
    result[vermis] = np.where(on_the_right, value["right cerebellar cortex"], value["left cerebellar cortex"])
    return result


def _right_mm(mask: npt.NDArray[np.bool_], affine: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Position of every voxel of a mask from left to right, in the order of `numpy.argwhere`."""
    return np.argwhere(mask) @ affine[0, :3] + affine[0, 3]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--scans", type=int, nargs="+")
    options = parser.parse_args()
    files = sorted((options.data / "images").glob("*.nii.gz"))
    chosen = files if options.scans is None else [files[number - 1] for number in options.scans]
    for folder in ("imagesTr", "labelsTr"):
        (options.out / folder).mkdir(parents=True)
    for file in chosen:
        shutil.copyfile(file, options.out / "imagesTr" / file.name)
        reference = nib.Nifti1Image.from_filename(options.data / "labels" / file.name)
        labels = structures(np.asarray(reference.dataobj).astype(np.int32), reference.affine)
        nib.save(nib.Nifti1Image(labels, reference.affine), options.out / "labelsTr" / file.name)
    content = {
        "channel_names": {"0": "T1"},
        "labels": {str(number): name for number, name in enumerate(STRUCTURES.names)},
    }
    (options.out / "dataset.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
