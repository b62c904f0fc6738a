"""Exponential moving average of a model's parameters."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class EMA:
    """A shadow copy whose parameters follow those of ``model`` after every optimiser step.

    The decay warms up as min(decay, (1 + n) / (10 + n)), so that the start does not dominate short runs.

    Attributes:
        module: the averaged model, in evaluation mode and without gradients.
        updates: number of updates so far, n.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"the decay must lie in [0, 1), got {decay}")
        self.decay = decay
        self.updates = 0
        self.module = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Moves the average towards the current fp32 parameters of ``model``, and copies its buffers."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        shadow: list[Tensor] = list(self.module.parameters())
        torch._foreach_lerp_(shadow, list(model.parameters()), 1 - decay)
        for mine, theirs in zip(self.module.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)
