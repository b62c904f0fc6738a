"""Members of an ensemble."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def member(labels: Tensor, num_classes: int = 2, certainty: float = 0.9) -> Tensor:
    one_hot = F.one_hot(labels, num_classes).movedim(-1, 0).float()
    return certainty * one_hot + (1 - certainty) / (num_classes - 1) * (1 - one_hot)
