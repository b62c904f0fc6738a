"""Exponential moving average of a model's parameters."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from .sharding import local


class EMA:
    """A shadow copy whose parameters follow those of ``model`` after every optimiser step.

    The decay warms up as min(decay, (1 + n) / (10 + n)), so that the start does not dominate short runs.

    Attributes:
        module: the averaged model, in evaluation mode and without gradients.
        whole: the same, to be validated and stored. If ``module`` is sharded, it is a copy in the main process, which
            is of the last resume file.
        updates: number of updates so far, n, those of skipped steps included.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"the decay must lie in [0, 1), got {decay}")
        self.decay = decay
        self.updates = 0
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.whole = self.module

    @torch.no_grad()
    def update(self, model: nn.Module, taken: Tensor | None = None) -> None:
        """Moves the average towards the current fp32 parameters of ``model``, and copies its buffers.

        Args:
            model: the model.
            taken: bool scalar on the device, whether the step was taken: the average does not move in a skipped step.
                None is true.
        """
        self.updates += 1
        weight = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        shadow, current = local(list(self.module.parameters())), local(list(model.parameters()))
        if shadow:
            device = shadow[0].device
            share = torch.full((), weight, device=device) * (1.0 if taken is None else taken)
            (_lerp_in_one_pass if device.type == "cpu" else _lerp_in_few_kernels)(shadow, current, share)
        if mine := list(self.module.buffers()):
            torch._foreach_copy_(mine, list(model.buffers()))


def _lerp_in_one_pass(shadow: list[Tensor], current: list[Tensor], share: Tensor) -> None:
    """Moves each shadow by a ``share``, a scalar tensor, of its distance. On a GPU it is one kernel per tensor."""
    torch._foreach_lerp_(shadow, current, [share] * len(shadow))


def _lerp_in_few_kernels(shadow: list[Tensor], current: list[Tensor], share: Tensor) -> None:
    """The same in a few kernels for all tensors. On a CPU three passes over the memory take four times as long."""
    distance = torch._foreach_sub(current, shadow)
    torch._foreach_mul_(distance, share)
    torch._foreach_add_(shadow, distance)
