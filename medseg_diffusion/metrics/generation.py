"""Scores of generated against real images, from their features: FID, sFID, KID, Inception Score, precision and recall.

Volumes are scored by their slices in three planes (`SliceFeatures`). `memorisation` tells whether samples are copies of
training images.

The definitions are those of guided diffusion's evaluator. The extractor decides what the features are, so a score has
to be reported with the name of its extractor. All arithmetic is in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

SPLIT = 5_000
"""Images in each part of the Inception Score."""
NEIGHBOUR = 3
"""Precision and recall: a ball reaches to the third nearest neighbour of its centre."""
ROWS = 2_000
"""Precision and recall: rows of the distance matrix that are computed at a time."""
PLANES = ("sagittal", "coronal", "axial")
"""Planes across the first, second and third axis of a RAS volume."""


@dataclass(frozen=True, eq=False)
class Features:
    """An extractor's features of N images: ``pooled`` (N, D), ``spatial`` (N, D') and ``logits`` (N, K).

    ``spatial`` or ``logits`` are (N, 0) if the extractor has none.
    """

    pooled: Tensor
    spatial: Tensor
    logits: Tensor

    def __len__(self) -> int:
        return len(self.pooled)

    def __getitem__(self, index: slice | Tensor) -> Features:
        return Features(self.pooled[index], self.spatial[index], self.logits[index])


@dataclass(frozen=True, eq=False)
class SliceFeatures:
    """Features of N volumes: of ``slices`` slices of each volume in each of the `PLANES`.

    A plane's `Features` hold the slices of the first volume, then those of the second, and so on.
    """

    planes: Mapping[str, Features]
    slices: int

    def __len__(self) -> int:
        return len(self.planes[PLANES[0]]) // self.slices

    def __getitem__(self, index: slice | Tensor) -> SliceFeatures:
        """The features of some of the volumes."""
        rows = torch.arange(len(self) * self.slices).view(len(self), self.slices)[index].flatten()
        return SliceFeatures({name: plane[rows] for name, plane in self.planes.items()}, self.slices)

    @property
    def middle(self) -> Tensor:
        """(N, 3 D), one row for each volume: the pooled features of its middle slice in each plane."""
        parts = [self.planes[name].pooled.unflatten(0, (-1, self.slices))[:, self.slices // 2] for name in PLANES]
        return torch.cat(parts, dim=1)


@dataclass(frozen=True)
class PlaneScores:
    """The scores of the slices of volumes in one plane."""

    fid: float
    kid: float


@dataclass(frozen=True)
class Scores:
    """The scores of ``count`` images against ``reference_count`` real ones.

    ``inception_score`` is None if the extractor has no logits, ``sfid`` if it has no spatial features; both are None
    for volumes. ``planes`` and ``ms_ssim`` (`medseg_diffusion.metrics.diversity`) are of volumes.
    """

    recall: float
    precision: float
    inception_score: float | None
    fid: float
    sfid: float | None
    kid: float
    count: int
    reference_count: int
    planes: Mapping[str, PlaneScores] = field(default_factory=dict)
    ms_ssim: float | None = None


def scores(samples: Features, reference: Features, seed: int = 0) -> Scores:
    """All scores of samples against reference images.

    Precision and recall take at most as many reference images as there are samples, chosen by ``seed``.
    """
    precision, recall = precision_recall(samples.pooled, chosen(reference.pooled, len(samples), seed))
    return Scores(
        recall,
        precision,
        inception_score(samples.logits) if samples.logits.shape[1] else None,
        frechet_distance(samples.pooled, reference.pooled),
        frechet_distance(samples.spatial, reference.spatial) if samples.spatial.shape[1] else None,
        kernel_distance(samples.pooled, reference.pooled),
        len(samples),
        len(reference),
    )


def slice_scores(samples: SliceFeatures, reference: SliceFeatures, seed: int = 0) -> Scores:
    """All scores of volumes by their slices.

    FID and KID compare the slices of a plane, and are averaged over the planes. Precision and recall compare volumes
    (`SliceFeatures.middle`): the nearest neighbours of a slice would be other slices of the same volume.
    """
    precision, recall = precision_recall(samples.middle, chosen(reference.middle, len(samples), seed))
    planes = {}
    for name in PLANES:
        a, b = (side.planes[name].pooled for side in (samples, reference))
        planes[name] = PlaneScores(frechet_distance(a, b), kernel_distance(a, b))
    fid, kid = (sum(getattr(plane, score) for plane in planes.values()) / len(planes) for score in ("fid", "kid"))
    return Scores(recall, precision, None, fid, None, kid, len(samples), len(reference), planes)


@dataclass(frozen=True, eq=False)
class Memorisation:
    """How near samples lie to the training images, compared with real images that were not trained on.

    Attributes:
        closer: Share of all pairs of a sample and an unseen image in which the sample is the closer one to its nearest
            training image; equal distances count half. 0.5 for samples like unseen images, 1 for copies. It is the
            Mann-Whitney statistic of the test for data-copying (Meehan et al. 2020, arXiv 2004.05675, sec. 3).
        closest: Share of the samples that are closer to a training image than every unseen image.
        distances: (N,) distance of each sample from its nearest training image.
        neighbours: (N,) int64, the position of that image.
    """

    closer: float
    closest: float
    distances: Tensor
    neighbours: Tensor


def memorisation(samples: Tensor, training: Tensor, unseen: Tensor) -> Memorisation:
    """Compare samples (N, D) and unseen real images (M, D) by the distance from their nearest training image (T, D)."""
    distances, neighbours = nearest(samples, training)
    others, _ = nearest(unseen, training)
    nearer = (distances[:, None] < others).double() + 0.5 * (distances[:, None] == others).double()
    return Memorisation(float(nearer.mean()), float((distances < others.min()).double().mean()), distances, neighbours)


def nearest(points: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Distance (N,) float64 of each of ``points`` (N, D) from the nearest of ``others`` (M, D), and its position."""
    parts = [_distances(part, others.double()).min(dim=1) for part in points.double().split(ROWS)]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


def chosen(features: Tensor, count: int, seed: int) -> Tensor:
    """At most ``count`` of the rows, drawn by ``seed`` without repetition."""
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    return features[order[:count]]


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """FID of features (N, D) and (M, D): |mean_a - mean_b|^2 + Tr(C_a + C_b - 2 (C_a C_b)^(1/2)).

    Heusel et al. 2017, arXiv 1706.08500, eq. 6; covariances are divided by N - 1. The trace of the root is the sum of
    the roots of the eigenvalues of the symmetric C_a^(1/2) C_b C_a^(1/2). It stays real, which the root of the product
    C_a C_b in published code does not.
    """
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(torch.atleast_2d(cov_a))
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    mixed = torch.linalg.eigvalsh(root @ torch.atleast_2d(cov_b) @ root).clamp(min=0).sqrt().sum()
    traces = torch.atleast_2d(cov_a).trace() + torch.atleast_2d(cov_b).trace()
    return float((a.mean(0) - b.mean(0)).square().sum() + traces - 2 * mixed)


def kernel_distance(a: Tensor, b: Tensor, subset: int = 1_000, repeats: int = 50, seed: int = 0) -> float:
    """KID: the unbiased squared MMD with the kernel (x y / D + 1)^3, averaged over random subsets.

    Binkowski et al. 2018, arXiv 1801.01401. A subset has ``subset`` rows, or all of them if there are fewer.
    """
    a, b = a.double(), b.double()
    size = min(subset, len(a), len(b))
    generator = torch.Generator().manual_seed(seed)
    estimates = []
    for _ in range(repeats if size < max(len(a), len(b)) else 1):
        x, y = (side[torch.randperm(len(side), generator=generator)[:size]] for side in (a, b))
        xx, yy, xy = ((left @ right.T / a.shape[1] + 1) ** 3 for left, right in ((x, x), (y, y), (x, y)))
        own = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (size * (size - 1))
        estimates.append(own - 2 * xy.mean())
    return float(torch.stack(estimates).mean())


def inception_score(logits: Tensor, split: int = SPLIT) -> float:
    """exp(mean KL(p(y|x) | p(y))) of logits (N, K) (Salimans et al. 2016, arXiv 1606.03498).

    It is averaged over splits of min(``split``, N) images in order; an incomplete last split is left out.
    """
    size = min(split, len(logits))
    split_scores = []
    for first in range(0, len(logits) - size + 1, size):
        log_p = logits[first : first + size].double().log_softmax(1)
        log_mean = log_p.logsumexp(0) - torch.log(torch.tensor(float(size)))
        split_scores.append((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp())
    return float(torch.stack(split_scores).mean())


def precision_recall(samples: Tensor, reference: Tensor, neighbour: int = NEIGHBOUR) -> tuple[float, float]:
    """Precision and recall of features (N, D) and (M, D) (Kynkaanniemi et al. 2019, arXiv 1904.06991, eq. 1 and 2).

    Precision is the share of the samples inside a ball around any reference image; recall is the share of the
    reference inside a ball around any sample. The radius of a ball is the distance from its centre to the
    ``neighbour``-th nearest image of the same set.
    """
    samples, reference = samples.double(), reference.double()
    return _inside(samples, reference, neighbour), _inside(reference, samples, neighbour)


def _inside(points: Tensor, centres: Tensor, neighbour: int) -> float:
    # The first neighbour is the centre itself.
    radii = torch.cat([_distances(part, centres).kthvalue(neighbour + 1, dim=1).values for part in centres.split(ROWS)])
    parts = [(_distances(part, centres) <= radii).any(dim=1) for part in points.split(ROWS)]
    return float(torch.cat(parts).double().mean())


def _distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist" if len(a) <= 64 else "use_mm_for_euclid_dist")
