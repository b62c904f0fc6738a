"""Samples of a model compared with several raters of one case: is the model's spread that of the raters?

The distance of two label maps is 1 - IoU, averaged over the classes that occur in either. It is 0 if both are empty.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

Masks = Sequence[NDArray[np.integer]]
"""Label maps (*S) of one case."""


def distances(first: Masks, second: Masks, classes: int) -> NDArray[np.float64]:
    """(N, M) distances between N and M label maps. ``classes`` includes the background, which does not count."""
    iou_sum, n_classes = np.zeros((len(first), len(second))), np.zeros((len(first), len(second)))
    for value in range(1, classes):
        a, b = (np.stack([mask.ravel() == value for mask in masks]).astype(np.float64) for masks in (first, second))
        overlap = a @ b.T
        union = a.sum(1)[:, None] + b.sum(1) - overlap
        present = union > 0
        iou_sum += np.divide(overlap, union, out=np.zeros_like(overlap), where=present)
        n_classes += present
    return 1 - np.divide(iou_sum, n_classes, out=np.ones_like(iou_sum), where=n_classes > 0)


def generalised_energy_distance(samples: Masks, raters: Masks, classes: int) -> float:
    """GED^2 = 2 E d(s, y) - E d(s, s') - E d(y, y'), 0 or more (Kohl et al. 2018, "A probabilistic U-Net", eq. 3).

    The expectations are over all pairs, including a map with itself, as in that paper's evaluation.
    """
    between = distances(samples, raters, classes).mean()
    within = distances(samples, samples, classes).mean() + distances(raters, raters, classes).mean()
    return float(2 * between - within)


def matched_iou(samples: Masks, raters: Masks, classes: int) -> float:
    """Hungarian-matched IoU: 1 - distance, averaged over the best one-to-one assignment of samples to raters.

    Samples and raters are first repeated to the least common multiple of their numbers, so that all maps have the same
    weight (Kohl et al. 2019, "A hierarchical probabilistic U-Net", section 4).
    """
    size = math.lcm(len(samples), len(raters))
    cost = distances(samples, raters, classes)
    cost = np.tile(cost, (size // len(samples), size // len(raters)))
    rows, columns = linear_sum_assignment(cost)
    return float(1 - cost[rows, columns].mean())
