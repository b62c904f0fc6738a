"""Training examples by number: what the n-th draw is depends on (seed, epoch, example index) alone.

Workers, ranks and interruptions only decide who computes a draw and when, so a resumed run sees exactly what an
uninterrupted one would have seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from medseg_diffusion.diffusion.noise import derive_seed


class Examples(Protocol):
    """A finite collection whose examples may be randomised (augmented, synthesised) by a generator."""

    def __len__(self) -> int: ...

    def example(self, index: int, generator: torch.Generator) -> Mapping[str, Tensor]: ...


class Draws(Dataset[dict[str, Tensor]]):
    """The endless sequence of draws from ``examples``: epochs of shuffled indices, one after the other.

    Each draw carries its own "seed" () int64 for whatever the training step draws for it (time, noise).
    """

    def __init__(self, examples: Examples, seed: int) -> None:
        self.examples = examples
        self.seed = seed

    def __getitem__(self, draw: int) -> dict[str, Tensor]:
        epoch, position = divmod(draw, len(self.examples))
        index = _order(self.seed, epoch, len(self.examples))[position]
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "example", epoch, index))
        example = dict(self.examples.example(index, generator))
        example["seed"] = torch.tensor(derive_seed(self.seed, "step", epoch, index))
        return example


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(derive_seed(seed, "epoch", epoch))
    return [int(i) for i in torch.randperm(length, generator=generator)]
