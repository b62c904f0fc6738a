"""What the noise of a mask diffusion model is worth: its network sees something else in place of x_t.

A network that does not use x_t gives the same masks with any replacement. It is a feed-forward network then, whatever
the method's name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

Replacement = Literal["fresh", "shared", "zeros"]
"""What replaces x_t.

"fresh" is new noise for every sample and step, "shared" is one draw for all samples and steps, and "zeros" is the mean
of the noise: for labels, of which the network sees one-hot channels in [-1, 1], all classes alike.
"""


@contextmanager
def without_x_t(network: nn.Module, replacement: Replacement, labels: bool = False, seed: int = 0) -> Iterator[None]:
    """Replace the first argument of every call of ``network`` while the context lasts.

    Fresh noise is drawn call by call, so that a single result depends on the batches, but not its distribution.

    Args:
        network: called with x_t (B, C, *S) first.
        replacement: what it sees instead: standard normal noise, or random classes if ``labels``.
        labels: whether x_t holds one-hot labels in [-1, 1], as in categorical diffusion.
        seed: seed of the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    shared: dict[tuple[int, ...], Tensor] = {}

    def noise(shape: tuple[int, ...]) -> Tensor:
        if not labels:
            return torch.randn(shape, generator=generator)
        classes = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator)
        return 2 * nn.functional.one_hot(classes, shape[1]).movedim(-1, 1).float() - 1

    def replaced(x: Tensor) -> Tensor:
        if replacement == "zeros":
            return torch.zeros_like(x)
        if replacement == "fresh":
            return noise(tuple(x.shape)).to(x)
        one = (1, *x.shape[1:])
        if one not in shared:
            shared[one] = noise(one)
        return shared[one].to(x).expand_as(x)

    def hook(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (replaced(arguments[0]), *arguments[1:])

    handle = network.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
