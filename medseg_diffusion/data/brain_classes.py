"""What a model of the brain tells apart: its classes, and the anatomical labels that belong to each.

Labels are FreeSurfer's. Labels from 500 on are extra-cerebral structures in the label maps of Billot et al. 2023
(SynthSeg, Medical Image Analysis 86).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

PAIRS: tuple[tuple[int, int], ...] = (
    *((2, 41), (3, 42), (4, 43), (5, 44), (7, 46), (8, 47), (10, 49), (11, 50), (12, 51), (13, 52), (17, 53), (18, 54)),
    *((25, 57), (26, 58), (28, 60), (30, 62), (31, 63), (136, 163), (137, 164)),
)
"""Labels of the same structure on the (left, right)."""

# Air, optic chiasm (85), spinal cord (512), every other extra-cerebral label.
_OUTSIDE = (0, 85, 165, 502, 506, 507, 508, 509, 511, 512, 514, 515, 516, 530)


@dataclass(frozen=True)
class BrainClasses:
    """Classes of a brain model.

    Attributes:
        labels: name of the class -> its anatomical labels. The n-th name is the class of value n; the first is the
            background.
    """

    labels: Mapping[str, tuple[int, ...]]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.labels)

    @property
    def class_of(self) -> dict[int, int]:
        """Anatomical label -> value of its class."""
        return {label: value for value, labels in enumerate(self.labels.values()) for label in labels}

    def convert(self, labels: npt.NDArray[np.integer]) -> npt.NDArray[np.uint8]:
        """Convert anatomical labels of any shape to values of classes.

        It is meant for references: FreeSurfer segmentations of real scans, against which a model is evaluated.

        Raises:
            ValueError: a label without a class.
        """
        class_of, values = self.class_of, np.unique(labels)
        if unknown := [int(value) for value in values if int(value) not in class_of]:
            raise ValueError(f"labels {unknown} have no class; add them to medseg_diffusion.data.brain_classes")
        table = np.zeros(int(values.max()) + 1, dtype=np.uint8)
        for value in values:
            table[value] = class_of[int(value)]
        return table[labels]


TISSUES = BrainClasses(
    {
        "background": _OUTSIDE,
        # CSF around the brain, ventricles, cavum (72), choroid plexus (31, 63; 136, 137, 163, 164 in these maps), and
        # the perivascular spaces that FreeSurfer calls vessels (30, 62).
        "CSF": (24, 4, 5, 14, 15, 43, 44, 72, 31, 63, 136, 137, 163, 164, 30, 62),
        # Cortex, cerebellar cortex, thalamus, caudate, putamen, pallidum, hippocampus, amygdala, accumbens.
        "grey matter": (3, 42, 8, 47, 10, 49, 11, 50, 12, 51, 13, 52, 17, 53, 18, 54, 26, 58),
        # Cerebral, cerebellar, brainstem, ventral diencephalon, callosum, lesions (25, 57) and hypointensities (77) of
        # white matter.
        "white matter": (2, 41, 7, 46, 16, 28, 60, 251, 252, 253, 254, 255, 25, 57, 77),
    }
)

BRAIN = BrainClasses(
    {"background": _OUTSIDE, "brain": tuple(label for label in TISSUES.class_of if label not in _OUTSIDE)}
)

_SIDED = {
    "cerebral white matter": (2, 25),
    "cerebral cortex": (3,),
    "lateral ventricle": (4, 5, 31, 136, 137),  # with its inferior horn and choroid plexus
    "cerebellar white matter": (7,),
    "cerebellar cortex": (8,),
    "thalamus": (10,),
    "caudate": (11,),
    "putamen": (12,),
    "pallidum": (13,),
    "hippocampus": (17,),
    "amygdala": (18,),
    "accumbens": (26,),
    "ventral diencephalon": (28,),
}
_RIGHT = dict(PAIRS)

STRUCTURES = BrainClasses(
    {
        "background": _OUTSIDE,
        **{f"left {name}": labels for name, labels in _SIDED.items()},
        **{f"right {name}": tuple(_RIGHT[label] for label in labels) for name, labels in _SIDED.items()},
        "brainstem": (16,),
        "third ventricle": (14,),
        "fourth ventricle": (15,),
        "other CSF": (24, 72, 30, 62),
    }
)
"""Structures of each side. Labels that FreeSurfer does not divide by side (77, 251 to 255) have none."""

CLASSES = {"tissues": TISSUES, "structures": STRUCTURES}


def tissues_of(classes: BrainClasses) -> dict[str, list[str]]:
    """Tissue -> names of the classes that belong to it.

    Raises:
        ValueError: a class with labels of several tissues.
    """
    groups: dict[str, list[str]] = {tissue: [] for tissue in TISSUES.names[1:]}
    for name, labels in classes.labels.items():
        tissues = {TISSUES.names[TISSUES.class_of[label]] for label in labels}
        if len(tissues) > 1:
            raise ValueError(f"{name} has labels of {' and '.join(sorted(tissues))}")
        (tissue,) = tissues
        if tissue in groups:  # not the background
            groups[tissue].append(name)
    return groups
