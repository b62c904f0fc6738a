"""Random tensors, schedules and targets, and networks whose answer is known."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medseg_diffusion.diffusion.prediction import Target
from medseg_diffusion.diffusion.schedule import cosine, linear, rectified_flow, scaled_linear, sigmoid

LINEAR = linear(1000)
FLOW = rectified_flow(1000)
SCHEDULES = {
    "linear": LINEAR,
    "cosine": cosine(1000),
    "scaled": scaled_linear(1000),
    "sigmoid": sigmoid(1000),
    "rectified-flow": FLOW,
}
TARGETS: list[Target] = ["eps", "x0", "v", "flow"]


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def levels(seed: int, *shape: int) -> Tensor:
    """8-bit levels mapped to [-1, 1]."""
    whole = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed))
    return whole.double() / 127.5 - 1


class Emits(nn.Module):
    """A network with one free output."""

    def __init__(self, out: Tensor) -> None:
        super().__init__()
        self.out = nn.Parameter(out)

    def forward(self, x: Tensor, timesteps: Tensor, cond: object = None) -> Tensor:
        return self.out


class Constant(nn.Module):
    """A network that answers with a fixed tensor and remembers how it was called."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer
        self.calls: list[tuple[Tensor, object]] = []
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, timesteps: Tensor, cond: object = None) -> Tensor:
        self.calls.append((timesteps, cond))
        self.seen.append(x)
        return self.answer
