"""Ensembles of sampled masks: their mean, their fusion to one segmentation, and their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Fusion = Literal["mean", "majority", "staple"]
Uncertainty = Literal["entropy", "mutual-information", "variance"]
FAINTEST = 1e-12
"""Probabilities are at least this value before their logarithm is taken."""


@dataclass(frozen=True, eq=False)
class Ensemble:
    """N sampled masks of one image, added batch by batch.

    The members' probabilities are not stored. Only their labels need memory that grows with N.

    Attributes:
        mean: (K, *S) mean of the members' class probabilities.
        squares: (K, *S) sum over members of the squared deviations from the mean.
        member_entropy: (*S) mean over members of their own entropy, in nats.
        labels: (N, *S) most probable class of every member.
    """

    mean: Tensor
    squares: Tensor
    member_entropy: Tensor
    labels: Tensor

    @classmethod
    def of(cls, members: Tensor) -> Ensemble:
        """The ensemble of members (N, K, *S), N >= 1."""
        mean = members.mean(0)
        kind = torch.uint8 if members.shape[1] <= 256 else torch.int32
        entropies = -torch.special.xlogy(members, members).sum(1)
        return cls(mean, (members - mean).square().sum(0), entropies.mean(0), members.argmax(1).to(kind))

    def __len__(self) -> int:
        return len(self.labels)

    def add(self, members: Tensor) -> Ensemble:
        """This ensemble and further members (N', K, *S), by the pairwise update of Chan et al. (1983)."""
        other = Ensemble.of(members)
        n, m = len(self), len(other)
        delta, share = other.mean - self.mean, m / (n + m)
        return Ensemble(
            self.mean + share * delta,
            self.squares + other.squares + n * share * delta.square(),
            self.member_entropy + share * (other.member_entropy - self.member_entropy),
            torch.cat([self.labels, other.labels]),
        )

    @classmethod
    def joined(cls, slabs: Sequence[Ensemble]) -> Ensemble:
        """Concatenate ensembles of the same members, in neighbouring slabs of an image, along the last axis."""
        if len(slabs) == 1:
            return slabs[0]
        return cls(
            *(
                torch.cat([getattr(slab, name) for slab in slabs], -1)
                for name in ("mean", "squares", "member_entropy", "labels")
            )
        )

    def within(self, mask: Tensor) -> Ensemble:
        """The ensemble with background of probability 1 outside ``mask``, bool (*S)."""
        mean = self.mean * mask
        mean[0] += (~mask).to(mean.dtype)
        return replace(
            self,
            mean=mean,
            squares=self.squares * mask,
            member_entropy=self.member_entropy * mask,
            labels=self.labels * mask,
        )

    def uncertainty(self, kind: Uncertainty) -> Tensor:
        """A map (*S) of the uncertainty.

        Args:
            kind: "entropy" is the `entropy` of the mean, from 0 (certain) to 1 (all classes equal).
                "mutual-information" is the part of it that comes from disagreement, H(mean) - mean H, on the same
                scale; soft boundaries that all members share do not contribute. "variance" is the variance over members
                of the foreground's probability, 0 to 0.25.
        """
        if kind == "variance":
            return self.squares[0] / len(self)
        total = entropy(self.mean)
        if kind == "entropy":
            return total
        return (total - self.member_entropy / math.log(len(self.mean))).clamp(min=0)

    @property
    def disagreement(self) -> float:
        """The image's uncertainty: the mean of the largest tenth of its mutual information (Baranchuk et al. 2022)."""
        values = self.uncertainty("mutual-information").flatten()
        return float(values.topk(max(1, len(values) // 10)).values.mean())

    def pairwise_dice(self) -> Tensor:
        """The Dice of each class above background, averaged over pairs of members, (K - 1,) float64.

        Pairs in which neither member has the class are left out. The result is NaN for a class without pairs, and for
        an ensemble of one member.
        """
        n, classes = len(self), len(self.mean)
        flat = self.labels.flatten(1)
        flat = flat[:, (flat > 0).any(0)]
        means = []
        pairs = torch.ones(n, n, dtype=torch.bool).triu(1)
        for value in range(1, classes):
            one = (flat == value).double()
            size = one.sum(1)
            dice = 2 * (one @ one.T) / (size[:, None] + size)
            means.append(dice[pairs].nanmean())
        return torch.stack(means)

    def volumes_ml(self, voxel_mm3: float) -> Tensor:
        """Volume of each class in each member, (N, K) in ml; ``voxel_mm3`` is the volume of a voxel."""
        counts = [torch.bincount(member.flatten().long(), minlength=len(self.mean)) for member in self.labels]
        return torch.stack(counts).double() * voxel_mm3 / 1000

    def fuse(self, how: Fusion = "mean") -> Tensor:
        """Class scores (K, *S), which sum to 1 over K at every position.

        Args:
            how: "mean" averages the probabilities. "majority" is the share of members whose most probable class it is.
                "staple" (Warfield et al. 2004) weights the members' labels by their estimated performance, with
                SimpleITK's multi-label EM. Members of one model are exchangeable, so it differs little from the
                majority. Positions that it leaves undecided take the class of the mean.
        """
        classes = len(self.mean)
        if how == "mean" or len(self) == 1:
            return self.mean
        if how == "majority":
            return torch.stack([(self.labels == value).float().mean(0) for value in range(classes)])
        fused = staple(self.labels, classes).to(self.mean.device)
        fused = torch.where(fused == classes, self.mean.argmax(0), fused)
        return F.one_hot(fused, classes).movedim(-1, 0).float()


def staple(labels: Tensor, classes: int) -> Tensor:
    """Fuse the labels (N, *S) of N raters by STAPLE.

    Only the bounding box of all foreground is used, with a margin of 2 positions. With much certain background, every
    rater's specificity is close to 1 and says nothing about the rater.

    Returns:
        Labels (*S) int64. Undecided positions have the value ``classes``.
    """
    # Imported here, because most segmentations do not need SimpleITK.
    import SimpleITK as sitk

    marked = (labels > 0).any(0).nonzero()
    result = torch.zeros(labels.shape[1:], dtype=torch.int64)
    if len(marked) == 0:
        return result
    box = tuple(
        slice(max(0, int(low) - 2), int(high) + 3)
        for low, high in zip(marked.amin(0), marked.amax(0), strict=True)
    )  # fmt: skip
    images = [sitk.GetImageFromArray(rater[box].cpu().numpy().astype(np.uint16)) for rater in labels]
    fused = sitk.GetArrayFromImage(sitk.MultiLabelSTAPLE(images, classes))
    result[box] = torch.from_numpy(fused).long()
    return result


def temperature_scaled(probabilities: Tensor, temperature: float) -> Tensor:
    """Temperature scaling of probabilities (K, *S): p^(1/T), normalised. The most probable class stays the same."""
    if temperature == 1:
        return probabilities
    return (probabilities.clamp(min=FAINTEST).log() / temperature).softmax(0)


def largest_part(labels: Tensor) -> Tensor:
    """The largest part of the foreground (``labels`` (*S) above 0) that is connected by faces; bool (*S)."""
    from skimage.measure import label

    parts = label(labels.cpu().numpy() > 0, connectivity=1)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return torch.from_numpy((parts == sizes.argmax()) & (parts > 0))


def entropy(probabilities: Tensor) -> Tensor:
    """Predictive entropy (*S) of class probabilities (K, *S), divided by log K: 0 is certain, 1 all classes equal."""
    return -torch.special.xlogy(probabilities, probabilities).sum(0) / math.log(len(probabilities))
