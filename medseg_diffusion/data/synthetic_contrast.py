"""The contrast of synthetic brain scans: a random intensity for each anatomical structure.

Most scans are like T1. The others have arbitrary contrast.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .brain_classes import PAIRS
from .label_maps import LABELS
from .random_fields import Draw

Range = tuple[float, float]

_SOFT = torch.tensor([label in (507, 509, 511, 514, 516) for label in LABELS])

# Ranges of the mean intensity in T1-like scans, relative to cerebral white matter. In _BETWEEN the range is a fraction
# of the way from grey matter to white matter.
_GREY, _CSF = (0.55, 0.85), (0.03, 0.45)
_BETWEEN: dict[tuple[int, ...], Range] = {
    (3, 42): (0.0, 0.0),
    (8, 47): (-0.1, 0.15),
    (17, 53, 18, 54): (-0.05, 0.15),
    (11, 50, 12, 51, 26, 58): (-0.05, 0.3),
    (10, 49): (0.2, 0.7),
    (13, 52): (0.4, 1.0),
    (28, 60): (0.5, 1.0),
    (16,): (0.7, 1.1),
    (7, 46): (0.8, 1.1),
    (25, 57, 77): (-0.3, 0.8),
}
_OTHER: dict[tuple[int, ...], Range] = {
    (136, 137, 163, 164, 31, 63): (0.2, 0.8),
    (30, 62): (0.1, 0.9),
    (507,): (0.25, 1.1),
    (511,): (0.3, 1.8),
    (515,): (0.02, 0.5),
    (516,): (0.2, 1.6),
    (85, 512, 530): (0.6, 1.1),
}


def structure_intensities(draw: Draw, t1_share: float) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the intensity of every label, each (len(LABELS),). Air is 0.

    Args:
        draw: source of the random numbers.
        t1_share: probability of a T1-like contrast.
    """
    means = draw.uniform(0.0, 1.0, len(LABELS))
    if draw.chance(t1_share):
        grey, fluid = float(draw.uniform(*_GREY)), float(draw.uniform(*_CSF))
        for group, (low, high) in _BETWEEN.items():
            share = float(draw.uniform(low, high))
            means[[LABELS.index(label) for label in group]] = grey + share * (1 - grey)
        means[[LABELS.index(label) for label in (2, 41, 251, 252, 253, 254, 255)]] = 1.0
        means[[LABELS.index(label) for label in (24, 4, 5, 14, 15, 43, 44, 72)]] = fluid
        for group, (low, high) in _OTHER.items():
            means[[LABELS.index(label) for label in group]] = float(draw.uniform(low, high))
        if draw.chance(0.5):  # fat near a receiver coil is often 2 to 3 times as bright as the brain
            for fat in (507, 511, 516):
                if draw.chance(0.5):
                    means[LABELS.index(fat)] = float(draw.uniform(1.2, 2.5))
        deviations = draw.uniform(0.01, 0.06, len(LABELS))
    else:
        # Left and right structures have the same contrast.
        for pair in PAIRS:
            means[[LABELS.index(label) for label in pair]] = float(means[LABELS.index(pair[0])])
        means[[LABELS.index(label) for label in (4, 5, 14, 15, 43, 44)]] = float(means[LABELS.index(24)])
        deviations = draw.uniform(0.01, 0.1, len(LABELS))
    means[LABELS.index(0)] = deviations[LABELS.index(0)] = 0.0
    return means, deviations


def in_pieces(image: Tensor, labels: Tensor, means: Tensor, draw: Draw, spacing: float) -> Tensor:
    """``image`` (I, J, K) with the soft tissue outside the brain cut into sharp pieces of random intensities.

    The label maps have one label for tongue, muscle, fat, marrow and glands. Some pieces are as bright as a tissue of
    the brain: a model learns from them that intensity alone does not identify the brain.
    """
    window, count = image.shape, 8
    piece = torch.zeros(window, dtype=torch.int64, device=image.device)
    for _ in range(3):  # three random cuts give eight pieces
        field = draw.field(window, spacing, draw.uniform(6, 30).item())
        piece = 2 * piece + (field > draw.uniform(-0.7, 0.7).item()).long()
    brain = means[[LABELS.index(label) for label in (2, 3, 24)]][[draw.integer(3) for _ in range(count)]]
    like_brain = draw.uniform(0, 1, count) < 0.4
    # Numbers are drawn on the CPU; those of `means` are on the device.
    shade, other, spread = (
        draw.uniform(*ends, count).to(image.device) for ends in ((0.9, 1.1), (0.03, 1.5), (0, 0.08))
    )
    levels = torch.where(like_brain.to(image.device), brain * shade, other)
    soft = _SOFT.to(image.device)[labels] & (draw.field(window, spacing, 40.0) > draw.uniform(-2.0, 0.3).item())
    return torch.where(soft, levels[piece] + spread[piece] * draw.normal(window), image)
