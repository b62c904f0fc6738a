"""Members of an ensemble to one answer and its uncertainty."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import SimpleITK as sitk
import torch
import torch.nn.functional as F
from skimage.measure import label
from torch import Tensor

Fusion = Literal["mean", "majority", "staple"]


def fuse(members: Tensor, how: Fusion = "mean") -> Tensor:
    """Class scores (K, *S), a distribution over K at every position, of members (N, K, *S).

    "mean" averages the probabilities. "majority" is the share of members whose largest class it is. "staple"
    (Warfield et al. 2004) weighs the members' labels by their estimated performance (SimpleITK's multi-label EM);
    members of one model are exchangeable, so it differs little from the majority. Undecided positions keep the mean.
    """
    mean = members.mean(0)
    if how == "mean" or len(members) == 1:
        return mean
    votes = members.argmax(1)
    if how == "majority":
        return F.one_hot(votes, members.shape[1]).movedim(-1, 1).float().mean(0)
    undecided = members.shape[1]
    images = [sitk.GetImageFromArray(vote.to(torch.uint8).cpu().numpy()) for vote in votes]
    fused = torch.from_numpy(sitk.GetArrayFromImage(sitk.MultiLabelSTAPLE(images, undecided))).to(members.device).long()
    fused = torch.where(fused == undecided, mean.argmax(0), fused)
    return F.one_hot(fused, members.shape[1]).movedim(-1, 0).float()


def largest_part(labels: Tensor) -> Tensor:
    """Where ``labels`` (*S) are the largest connected part (faces) of all foreground together; bool (*S)."""
    parts = label(labels.cpu().numpy() > 0, connectivity=1)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return torch.from_numpy((parts == sizes.argmax()) & (parts > 0))


def entropy(probabilities: Tensor) -> Tensor:
    """Predictive entropy (*S) of class probabilities (K, *S), divided by log K: 0 certain, 1 all classes alike."""
    return -torch.special.xlogy(probabilities, probabilities).sum(0) / math.log(len(probabilities))


def class_volumes_ml(members: Tensor, voxel_mm3: float) -> Tensor:
    """Volume of each class in each member, (N, K) in ml, from members (N, K, *S) on voxels of ``voxel_mm3``."""
    labels = members.argmax(1).flatten(1)
    counts = torch.stack([torch.bincount(member, minlength=members.shape[1]) for member in labels])
    return counts.double() * voxel_mm3 / 1000
