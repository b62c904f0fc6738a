"""Numbered training examples: the n-th draw depends only on (seed, epoch, example index).

Workers, ranks and interruptions change only where and when a draw is computed. A resumed run therefore sees exactly the
examples of an uninterrupted run.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import Dataset

from medseg_diffusion.diffusion.noise import derive_seed


class Examples(Protocol):
    """A finite collection of examples. The generator may augment or synthesise them."""

    def __len__(self) -> int: ...

    def example(self, index: int, generator: torch.Generator) -> Mapping[str, Tensor]: ...


UNFINISHED = "unfinished"
"""Entry of an example that `FinishesBatches` completes: the numbers that it needs for this. They stay on the CPU."""


@runtime_checkable
class FinishesBatches(Protocol):
    """Examples, or their draws, that are completed in batches, on the device that trains."""

    def finish(self, batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]: ...


class Draws(Dataset[dict[str, Tensor]]):
    """The endless sequence of draws from ``examples``: epochs of shuffled indices, one after another.

    Each draw has its own "seed" () int64, from which the training step draws time and noise.
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

    def finish(self, batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """The batch on the device, with what the examples have left to this moment."""
        return self.examples.finish(batch, device) if isinstance(self.examples, FinishesBatches) else dict(batch)


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(derive_seed(seed, "epoch", epoch))
    return [int(i) for i in torch.randperm(length, generator=generator)]
