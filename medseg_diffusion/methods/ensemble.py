"""Ensembles of sampled masks: their mean, their fusion to one segmentation, and their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Fusion = Literal["mean", "majority", "staple"]
Uncertainty = Literal["entropy", "mutual-information", "variance"]
FAINTEST = 1e-12
"""Probabilities are at least this value before their logarithm is taken."""
_AT_ONCE = 2**22  # positions that are compared at once
_IN_CACHE = 2**15  # positions whose classes are compared while they are in the caches of a CPU


@dataclass(frozen=True, eq=False)
class Ensemble:
    """N sampled masks of one image, added batch by batch.

    The members' probabilities are not stored. Only their labels need memory that grows with N.

    Attributes:
        mean: (K, *S) mean of the members' class probabilities.
        labels: (N, *S) most probable class of every member.
        squares: (*S) sum over members of the squared deviations of the background's probability from its mean; None for
            one member, which does not deviate.
        member_entropy: (*S) mean over members of their own entropy, in nats; None for one member: that of the mean.
    """

    mean: Tensor
    labels: Tensor
    squares: Tensor | None = None
    member_entropy: Tensor | None = None

    @classmethod
    def of(cls, members: Tensor) -> Ensemble:
        """The ensemble of members (N, K, *S), N >= 1."""
        labels = torch.stack([most_probable(member) for member in members])
        if len(members) == 1:
            return cls(members[0], labels)
        mean = members.mean(0)
        squares = (members[:, 0] - mean[0]).square().sum(0)
        return cls(mean, labels, squares, torch.stack([_nats(member) for member in members]).mean(0))

    def __len__(self) -> int:
        return len(self.labels)

    def add(self, members: Tensor) -> Ensemble:
        """This ensemble and further members (N', K, *S)."""
        return self.and_others(Ensemble.of(members))

    def and_others(self, other: Ensemble) -> Ensemble:
        """This ensemble and the members of another, by the pairwise update of Chan et al. (1983)."""
        n, m = len(self), len(other)
        delta, share = other.mean - self.mean, m / (n + m)
        squares = n * share * delta[0].square()
        for one in (self.squares, other.squares):
            squares = squares if one is None else squares + one
        own, others = (_nats(e.mean) if e.member_entropy is None else e.member_entropy for e in (self, other))
        return Ensemble(
            self.mean + share * delta,
            torch.cat([self.labels, other.labels]),
            squares,
            own + share * (others - own),
        )

    @classmethod
    def joined(cls, slabs: Iterable[Ensemble], axis: int = -1) -> Ensemble:
        """Concatenate ensembles of the same members, in neighbouring slabs of an image, along an axis of the image."""
        parts = list(slabs)
        if len(parts) == 1:
            return parts[0]
        dims = parts[0].labels.ndim - 1
        names = [
            name for name in ("mean", "labels", "squares", "member_entropy") if getattr(parts[0], name) is not None
        ]
        return cls(**{name: torch.cat([getattr(part, name) for part in parts], axis % dims - dims) for name in names})

    def within(self, mask: Tensor) -> Ensemble:
        """The ensemble with background of probability 1 outside ``mask``, bool (*S)."""
        mean = self.mean * mask
        mean[0] += (~mask).to(mean.dtype)
        return replace(
            self,
            mean=mean,
            labels=self.labels * mask,
            squares=None if self.squares is None else self.squares * mask,
            member_entropy=None if self.member_entropy is None else self.member_entropy * mask,
        )

    def uncertainty(self, kind: Uncertainty) -> Tensor:
        """A map (*S) of the uncertainty.

        Args:
            kind: "entropy" is the `entropy` of the mean, from 0 (certain) to 1 (all classes equal).
                "mutual-information" is the part of it that comes from disagreement, H(mean) - mean H, on the same
                scale; soft boundaries that all members share do not contribute. "variance" is the variance over members
                of the foreground's probability, 0 to 0.25. The two are 0 for one member.
        """
        if kind == "entropy":
            return entropy(self.mean)
        if self.squares is None or self.member_entropy is None:
            return torch.zeros_like(self.mean[0])
        if kind == "variance":
            return self.squares / len(self)
        return (entropy(self.mean) - self.member_entropy / math.log(len(self.mean))).clamp(min=0)

    def members(self, variance: bool = False) -> Members:
        """What is left without the probabilities, on the CPU; ``variance`` asks for that map."""
        several = len(self) > 1
        return Members(
            len(self.mean),
            self.labels.cpu(),
            most_probable(self.mean).cpu() if several else self.labels[0].cpu(),
            self.uncertainty("mutual-information").cpu() if several else None,
            self.uncertainty("variance").cpu() if several and variance else None,
        )

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
        fused = torch.where(fused == classes, most_probable(self.mean), fused)
        return torch.stack([(fused == value).float() for value in range(classes)])


@dataclass(frozen=True, eq=False)
class Members:
    """An ensemble without its probabilities: what is kept of a whole image, whatever the number of classes.

    Attributes:
        classes: number of classes, K.
        labels: (N, *S) most probable class of every member.
        best: (*S) most probable class of their mean.
        mutual_information: (*S) float, see `Ensemble.uncertainty`; None for one member.
        variance: (*S) float, or None if it was not asked for.
    """

    classes: int
    labels: Tensor
    best: Tensor
    mutual_information: Tensor | None = None
    variance: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def placed(self, whole: Members | None, first: int, axis: int, length: int) -> Members:
        """The members of a whole image after this slab of it was put in.

        Args:
            whole: what earlier slabs returned; None for the first slab.
            first: the slab's first plane along ``axis``.
            axis: axis of the image along which the slabs follow each other.
            length: planes of the image.
        """
        if self.best.shape[axis] == length:
            return self
        names = [
            name for name in ("labels", "best", "mutual_information", "variance") if getattr(self, name) is not None
        ]
        if whole is None:
            whole = Members(
                self.classes, **{name: _room(getattr(self, name), self.best.ndim, axis, length) for name in names}
            )
        for name in names:
            slab, to = getattr(self, name), getattr(whole, name)
            to.narrow(axis - self.best.ndim, first, self.best.shape[axis]).copy_(slab)
        return whole

    def within(self, mask: Tensor) -> Members:
        """The members with certain background outside ``mask``, bool (*S)."""
        return replace(
            self,
            labels=self.labels * mask,
            best=self.best * mask,
            mutual_information=None if self.mutual_information is None else self.mutual_information * mask,
            variance=None if self.variance is None else self.variance * mask,
        )

    def uncertainty(self, kind: Literal["mutual-information", "variance"]) -> Tensor:
        """The map (*S), see `Ensemble.uncertainty`."""
        values = self.variance if kind == "variance" else self.mutual_information
        return torch.zeros(self.best.shape) if values is None else values

    @property
    def disagreement(self) -> float:
        """The image's uncertainty: the mean of the largest tenth of its mutual information (Baranchuk et al. 2022)."""
        values = in_order(self.uncertainty("mutual-information")[None])[0].numpy()
        count = max(1, len(values) // 10)
        # torch's topk needs four times the memory, because it also returns where they lie.
        return float(np.partition(values, len(values) - count)[-count:].mean(dtype=np.float64))

    def pairwise_dice(self) -> Tensor:
        """The Dice of each class above background, averaged over pairs of members, (K - 1,) float64.

        Pairs in which neither member has the class are left out. The result is NaN for a class without pairs, and for
        an ensemble of one member.
        """
        n = len(self)
        both, size = torch.zeros(self.classes, n, n).double(), torch.zeros(self.classes, n).double()
        for part in in_order(self.labels).split(_AT_ONCE, 1):
            part = part[:, (part > 0).any(0)]
            for value in range(1, self.classes):
                one = (part == value).double()
                both[value] += one @ one.T
                size[value] += one.sum(1)
        pairs = torch.ones(n, n, dtype=torch.bool).triu(1)
        dice = 2 * both / (size[:, :, None] + size[:, None])
        return torch.stack([one[pairs].nanmean() for one in dice[1:]])

    def volumes_ml(self, voxel_mm3: float) -> Tensor:
        """Volume of each class in each member, (N, K) in ml; ``voxel_mm3`` is the volume of a voxel."""
        counts = [torch.bincount(member, minlength=self.classes) for member in in_order(self.labels)]
        return torch.stack(counts).double() * voxel_mm3 / 1000


def in_order(images: Tensor) -> Tensor:
    """Images (N, *S) as (N, voxels), in any order of the voxels that needs no copy."""
    order = sorted(range(1, images.ndim), key=lambda axis: -images.stride()[axis])
    return images.permute(0, *order).flatten(1)


def _room(slab: Tensor, dims: int, axis: int, length: int) -> Tensor:
    """Zeros for a whole image of ``dims`` axes, whose slabs along ``axis`` are contiguous in memory."""
    axis -= dims
    shape = list(slab.shape)
    del shape[axis]
    return slab.new_zeros(*shape[: slab.ndim - dims], length, *shape[slab.ndim - dims :]).movedim(
        slab.ndim - dims, axis
    )


def most_probable(scores: Tensor) -> Tensor:
    """The class with the largest score, the first of equal ones, of scores (K, *S); uint8, or int32 above 256 classes.

    On a CPU, torch's argmax over the first axis takes 18 times as long.
    """
    kind = torch.uint8 if len(scores) <= 256 else torch.int32
    if scores.device.type != "cpu":
        return scores.argmax(0).to(kind)
    array = scores.detach().numpy()
    order = sorted(range(1, array.ndim), key=lambda axis: -array.strides[axis])  # as it lies in memory
    array = array.transpose(0, *order)
    result = np.zeros(array.shape[1:], np.uint8 if kind == torch.uint8 else np.int32)
    planes = max(1, _IN_CACHE // math.prod(array.shape[2:]))
    for first in range(0, len(result), planes):
        part, labels = array[:, first : first + planes], result[first : first + planes]
        best = part[0].copy()
        for value in range(1, len(part)):
            larger = part[value] > best
            np.maximum(labels, larger * labels.dtype.type(value), out=labels)
            np.maximum(best, part[value], out=best)
    return torch.from_numpy(result.transpose(np.argsort(order)))


def staple(labels: Tensor, classes: int) -> Tensor:
    """Fuse the labels (N, *S) of N raters by STAPLE.

    Only the bounding box of all foreground is used, with a margin of 2 positions. With much certain background, every
    rater's specificity is close to 1 and says nothing about the rater.

    Returns:
        Labels (*S) int32. Undecided positions have the value ``classes``.
    """
    # Imported here, because most segmentations do not need SimpleITK.
    import SimpleITK as sitk

    result = torch.zeros(labels.shape[1:], dtype=torch.int32)
    box = _box((labels > 0).any(0), margin=2)
    if box is None:
        return result
    images = [sitk.GetImageFromArray(rater[box].cpu().numpy().astype(np.uint16)) for rater in labels]
    fused = sitk.GetArrayFromImage(sitk.MultiLabelSTAPLE(images, classes))
    result[box] = torch.from_numpy(fused.astype(np.int32))
    return result


def temperature_scaled(probabilities: Tensor, temperature: float) -> Tensor:
    """Temperature scaling of probabilities (K, *S): p^(1/T), normalised. The most probable class stays the same."""
    if temperature == 1:
        return probabilities
    return (probabilities.clamp(min=FAINTEST).log() / temperature).softmax(0)


def largest_part(labels: Tensor) -> Tensor:
    """The largest part of the foreground (``labels`` (*S) above 0) that is connected by faces; bool (*S)."""
    from scipy import ndimage

    result = torch.zeros(labels.shape, dtype=torch.bool)
    box = _box(labels > 0)
    if box is None:
        return result
    parts, _ = ndimage.label(labels[box].cpu().numpy() > 0)
    numbers = torch.from_numpy(parts)
    sizes = torch.bincount(numbers.flatten())
    sizes[0] = 0
    result[box] = numbers == sizes.argmax()
    return result


def _box(mask: Tensor, margin: int = 0) -> tuple[slice, ...] | None:
    """The bounding box of a mask, with a margin; None for an empty mask."""
    box = []
    for axis in range(mask.ndim):
        marked = mask.movedim(axis, 0).flatten(1).any(1).nonzero().flatten()
        if len(marked) == 0:
            return None
        box.append(slice(max(0, int(marked[0]) - margin), int(marked[-1]) + 1 + margin))
    return tuple(box)


def entropy(probabilities: Tensor) -> Tensor:
    """Predictive entropy (*S) of class probabilities (K, *S), divided by log K: 0 is certain, 1 all classes equal."""
    return _nats(probabilities) / math.log(len(probabilities))


def _nats(probabilities: Tensor) -> Tensor:
    return -torch.special.xlogy(probabilities, probabilities).sum(0)
