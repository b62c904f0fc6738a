"""The tissue of each anatomical label, for the brain-tissue models.

Labels are FreeSurfer's. Labels from 500 on are extra-cerebral structures in the label maps of Billot et al. 2023
(SynthSeg, Medical Image Analysis 86).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

TISSUES = ("background", "CSF", "grey matter", "white matter")

_LABELS: dict[int, tuple[int, ...]] = {
    # Background: air, optic chiasm (85), spinal cord (512), every other extra-cerebral label.
    0: (0, 85, 165, 502, 506, 507, 508, 509, 511, 512, 514, 515, 516, 530),
    # CSF around the brain, ventricles, cavum (72), choroid plexus (31, 63; 136, 137, 163, 164 in these maps), and the
    # perivascular spaces that FreeSurfer calls vessels (30, 62).
    1: (24, 4, 5, 14, 15, 43, 44, 72, 31, 63, 136, 137, 163, 164, 30, 62),
    # Cortex, cerebellar cortex, thalamus, caudate, putamen, pallidum, hippocampus, amygdala, accumbens.
    2: (3, 42, 8, 47, 10, 49, 11, 50, 12, 51, 13, 52, 17, 53, 18, 54, 26, 58),
    # Cerebral, cerebellar, brainstem, ventral diencephalon, callosum, white-matter hypointensities (25, 57, 77).
    3: (2, 41, 7, 46, 16, 28, 60, 251, 252, 253, 254, 255, 25, 57, 77),
}
TISSUE_OF: dict[int, int] = {label: tissue for tissue, labels in _LABELS.items() for label in labels}


def to_tissue(labels: npt.NDArray[np.integer]) -> npt.NDArray[np.uint8]:
    """Convert anatomical labels of any shape to tissue values 0 to 3 (indices of `TISSUES`).

    It is meant for references: FreeSurfer segmentations of real scans, against which a brain-tissue model is evaluated.

    Raises:
        ValueError: a label without a tissue.
    """
    values = np.unique(labels)
    if unknown := [int(value) for value in values if int(value) not in TISSUE_OF]:
        raise ValueError(f"labels {unknown} have no tissue; add them to medseg_diffusion.data.tissue")
    table = np.zeros(int(values.max()) + 1, dtype=np.uint8)
    for value in values:
        table[value] = TISSUE_OF[int(value)]
    return table[labels]
