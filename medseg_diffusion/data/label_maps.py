"""Label maps of the head, from which brain scans are synthesised."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from medseg_diffusion.errors import InputError
from medseg_diffusion.volumes.io import read_labels
from medseg_diffusion.volumes.paths import scan_name

from .brain_classes import PAIRS, TISSUES, BrainClasses

LABELS: tuple[int, ...] = tuple(sorted(TISSUES.class_of))
"""The anatomical labels, ascending."""
TISSUE = torch.tensor([TISSUES.class_of[label] for label in LABELS], dtype=torch.uint8)
"""(len(LABELS),) tissue of each label."""
_OTHER_SIDE = {**dict(PAIRS), **{right: left for left, right in PAIRS}}
MIRRORED = torch.tensor([LABELS.index(_OTHER_SIDE.get(label, label)) for label in LABELS])
"""(len(LABELS),) index of the same structure on the other side; of those without a side, their own."""
ON_THE_RIGHT = torch.tensor([label in dict(PAIRS).values() for label in LABELS])
"""(len(LABELS),) whether a label is of the right side."""


def class_values(classes: BrainClasses) -> Tensor:
    """(len(LABELS),) uint8: the class of each label."""
    return torch.tensor([classes.class_of.get(label, 0) for label in LABELS], dtype=torch.uint8)


@dataclass(frozen=True, eq=False)
class LabelMap:
    """An anatomy in RAS with 1 mm voxels, cropped to its bounding box.

    Attributes:
        name: name of the file.
        index: (I, J, K) uint8, indices into `LABELS`.
        brain: (N, 3) int32, every 50th voxel of the brain.
    """

    name: str
    index: Tensor
    brain: Tensor


def tissues(anatomy: LabelMap) -> Tensor:
    """The tissue of every voxel (I, J, K), uint8: a value of `medseg_diffusion.data.brain_classes.TISSUES`."""
    return TISSUE[anatomy.index.long()]


def load_label_map(file: Path, classes: BrainClasses = TISSUES) -> LabelMap:
    """Read a label map with voxels of 1 mm.

    Raises:
        InputError: an unusable file, another voxel size, a label that is in none of the ``classes``, or no brain.
    """
    volume = read_labels(file).oriented("RAS")
    if not np.allclose(volume.spacing, 1.0, atol=0.01):
        size = " x ".join(f"{side:.3g}" for side in volume.spacing)
        raise InputError(file, f"voxels of {size} mm", "a label map of 1 mm", "resample it with nearest neighbours")
    labels = volume.data[0]
    present = set(torch.unique(labels).tolist())
    unknown = sorted(present - set(classes.class_of))
    if unknown:
        raise InputError(
            file,
            f"labels {unknown}",
            "FreeSurfer labels that belong to a class of the model",
            "map them in medseg_diffusion/data/brain_classes.py",
        )
    if not any(TISSUES.class_of[label] for label in present):
        raise InputError(file, "no voxel of a brain", "a label map of a head", "take it out of the folder")
    table = torch.zeros(max(LABELS) + 1, dtype=torch.uint8)
    table[list(LABELS)] = torch.arange(len(LABELS), dtype=torch.uint8)
    positions = torch.nonzero(labels)
    first, last = positions.amin(0).tolist(), positions.amax(0).tolist()
    labels = labels[tuple(slice(a, b + 1) for a, b in zip(first, last, strict=True))]
    index = table[labels.long()]
    return LabelMap(scan_name(file), index, torch.nonzero(TISSUE[index.long()])[::50].int())
