"""Samples of a model compared with several readers of one case: is the model's spread that of the readers?

The distance of two label maps is 1 - IoU, averaged over the classes that occur in either. It is 0 if both are empty.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from .statistics import Interval, mean_interval

Masks = Sequence[NDArray[np.integer]]
"""Label maps (*S) of one case."""
BINS = 10
"""Number of bins of the frequencies."""
SAMPLES = 16
"""Usual number of samples. The energy distance has a bias that falls with it: different numbers are not comparable."""


# Voxels compared at a time. It limits the arrays of numbers to tens of megabytes, whatever the size of the scan.
_BLOCK = 1 << 18


def distances(first: Masks, second: Masks, classes: int) -> NDArray[np.float64]:
    """(N, M) distances between N and M label maps. ``classes`` includes the background, which does not count."""
    first, second = ([mask.ravel() for mask in masks] for masks in (first, second))
    iou_sum, n_classes = np.zeros((len(first), len(second))), np.zeros((len(first), len(second)))
    for value in range(1, classes):
        overlap, union = np.zeros_like(iou_sum), np.zeros_like(iou_sum)
        for start in range(0, first[0].size, _BLOCK):
            block = slice(start, start + _BLOCK)
            a, b = (np.array([mask[block] == value for mask in masks], np.float64) for masks in (first, second))
            shared = a @ b.T
            overlap += shared
            union += a.sum(1)[:, None] + b.sum(1) - shared
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
    # Imported where used: reports on segmented scans load this module for its types alone.
    from scipy.optimize import linear_sum_assignment

    size = math.lcm(len(samples), len(raters))
    cost = distances(samples, raters, classes)
    cost = np.tile(cost, (size // len(samples), size // len(raters)))
    rows, columns = linear_sum_assignment(cost)
    return float(1 - cost[rows, columns].mean())


@dataclass(frozen=True, eq=False)
class Frequencies:
    """How often samples and readers mark a pixel, over the pixels that either marks. Those of several cases add up.

    A pixel's frequency is the share of label maps that give it a foreground class; every class counts for itself.

    Attributes:
        count: (BINS,) pixels in each bin of the samples' frequency; the bins divide [0, 1].
        sampled: (BINS,) sum of the samples' frequencies.
        read: (BINS,) sum of the readers' frequencies.
    """

    count: NDArray[np.float64]
    sampled: NDArray[np.float64]
    read: NDArray[np.float64]

    @classmethod
    def of(cls, samples: Masks, readers: Masks, classes: int) -> Frequencies:
        """The frequencies of one case."""
        pairs = []
        for value in range(1, classes):
            shares = [np.mean([mask.ravel() == value for mask in masks], axis=0) for masks in (samples, readers)]
            marked = (shares[0] > 0) | (shares[1] > 0)
            pairs.append(np.stack(shares)[:, marked])
        sampled, read = np.concatenate(pairs, axis=1)
        bins = np.minimum((sampled * BINS).astype(np.int64), BINS - 1)
        return cls(
            np.bincount(bins, minlength=BINS).astype(np.float64),
            np.bincount(bins, sampled, BINS).astype(np.float64),
            np.bincount(bins, read, BINS).astype(np.float64),
        )

    def __add__(self, other: Frequencies) -> Frequencies:
        return Frequencies(self.count + other.count, self.sampled + other.sampled, self.read + other.read)

    @property
    def ece(self) -> float:
        """Mean over pixels of |samples' - readers' mean frequency| of their bin; NaN without pixels."""
        total = float(self.count.sum())
        return float(np.abs(self.sampled - self.read).sum() / total) if total else math.nan


@dataclass(frozen=True, eq=False)
class ReaderAgreement:
    """Samples of one case compared with its readers.

    Attributes:
        energy_distance: `generalised_energy_distance`.
        matched_iou: `matched_iou`.
        majority_dice: mean over classes of the Dice of the samples' majority and the readers' majority; 1 if both are
            empty. In a `majority`, a pixel is foreground if at least half of the maps say so.
        frequencies: of samples and readers.
        empty_samples: share of the samples without foreground.
        empty_readers: share of the readers' maps without foreground.
    """

    energy_distance: float
    matched_iou: float
    majority_dice: float
    frequencies: Frequencies
    empty_samples: float
    empty_readers: float

    @classmethod
    def of(cls, samples: Masks, readers: Masks, classes: int) -> ReaderAgreement:
        """Compare label maps; ``classes`` includes the background."""
        samples, readers = _where_marked(samples, readers)
        return cls(
            generalised_energy_distance(samples, readers, classes),
            matched_iou(samples, readers, classes),
            _dice(majority(samples, classes), majority(readers, classes), classes),
            Frequencies.of(samples, readers, classes),
            float(np.mean([not mask.any() for mask in samples])),
            float(np.mean([not mask.any() for mask in readers])),
        )


def _where_marked(samples: Masks, readers: Masks) -> tuple[Masks, Masks]:
    """The maps (V,) in the voxels that any of them marks. All others, most of a scan, enter no number."""
    marked = np.zeros(samples[0].size, bool)
    for mask in (*samples, *readers):
        marked |= mask.ravel() != 0
    return [mask.ravel()[marked] for mask in samples], [mask.ravel()[marked] for mask in readers]


@dataclass(frozen=True, eq=False)
class ReaderSummary:
    """`ReaderAgreement` of several cases: means over patients, and the calibration of the frequencies of all pixels.

    Attributes:
        energy_distance: mean of this number, as the following four.
        matched_iou: see `ReaderAgreement`.
        majority_dice: see `ReaderAgreement`.
        empty_samples: see `ReaderAgreement`.
        empty_readers: see `ReaderAgreement`.
        frequency_ece: `Frequencies.ece` over the pixels of all cases.
    """

    energy_distance: Interval
    matched_iou: Interval
    majority_dice: Interval
    empty_samples: Interval
    empty_readers: Interval
    frequency_ece: float

    @classmethod
    def of(
        cls, agreements: Sequence[ReaderAgreement], patients: Sequence[str] | None = None, seed: int = 0
    ) -> ReaderSummary:
        """Average the cases, at least one; ``patients`` and ``seed`` as in `mean_interval`."""
        frequencies = functools.reduce(operator.add, (agreement.frequencies for agreement in agreements))

        def mean(name: str) -> Interval:
            return mean_interval([getattr(one, name) for one in agreements], patients=patients, seed=seed)

        return cls(
            mean("energy_distance"),
            mean("matched_iou"),
            mean("majority_dice"),
            mean("empty_samples"),
            mean("empty_readers"),
            frequencies.ece,
        )

    def numbers(self) -> dict[str, float]:
        """Name -> mean, for tables and logs."""
        return {
            name: value.mean if isinstance(value, Interval) else value
            for name, value in ((one.name, getattr(self, one.name)) for one in fields(self))
        }


def majority(masks: Masks, classes: int) -> NDArray[np.int64]:
    """One map (*S): foreground where at least half of the maps have any, with the class that most of them have."""
    votes = np.stack([np.mean([mask == value for mask in masks], axis=0) for value in range(1, classes)])
    return np.where(votes.sum(0) >= 0.5, votes.argmax(0) + 1, 0)


def _dice(first: NDArray[np.integer], second: NDArray[np.integer], classes: int) -> float:
    values = []
    for value in range(1, classes):
        a, b = first == value, second == value
        if a.any() or b.any():
            values.append(2 * float((a & b).sum()) / float(a.sum() + b.sum()))
    return float(np.mean(values)) if values else 1.0
