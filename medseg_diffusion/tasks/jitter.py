"""Mirrored and jittered passes: members of an ensemble for a network that has one answer.

They differ where the answer depends on what does not matter: side, contrast, brightness, position of the grid
(test-time augmentation, Wang et al. 2019, Neurocomputing 338). They are not samples of plausible masks. An image in
windows has another change in each window, so that its members differ less in their volumes than those of whole images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from medseg_diffusion.device import at_once

GAIN = 0.1
"""Largest relative change of the contrast."""
SHIFT = 0.05
"""Largest change of the brightness; preprocessed images lie between -1 and 1."""
OFFSET = 1
"""Largest number of voxels by which an image moves along an axis. Networks that downsample depend on it."""


@dataclass(frozen=True, eq=False)
class Jitter:
    """What changes from pass to pass, and is undone in the prediction.

    Attributes:
        mirrored: axes of the image that are mirrored in half of the passes, each on its own.
        other_side: (K,) class of the other side of each class, for models that name sides; None if mirroring changes no
            class. It belongs to the first of the axes.
    """

    mirrored: tuple[int, ...] = ()
    other_side: Tensor | None = None

    def passes(self, logits: Callable[[Tensor], Tensor], image: Tensor, seeds: Sequence[Sequence[int]]) -> Tensor:
        """Probabilities (B, N, K, *S) of N passes over each image (B, C, *S), each decided by its seed alone."""
        count = len(seeds[0])
        own = [(index, _Change(self, seed, image.ndim - 2)) for index, part in enumerate(seeds) for seed in part]
        most = at_once(math.prod(image.shape[2:]), image.device)
        parts = []
        for first in range(0, len(own), most):
            some = own[first : first + most]
            changed = torch.stack([change.apply(image[index]) for index, change in some])
            predicted = logits(changed).softmax(1)
            parts += [change.undo(one) for (_, change), one in zip(some, predicted, strict=True)]
        return torch.stack(parts).unflatten(0, (len(image), count))


class _Change:
    """The change of one pass."""

    def __init__(self, jitter: Jitter, seed: int, dims: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.rand(2, generator=generator).mul(2).sub(1).tolist()
        self.gain, self.shift = 1 + GAIN * drawn[0], SHIFT * drawn[1]
        self.before = torch.randint(OFFSET + 1, (dims,), generator=generator).tolist()
        flips = torch.rand(len(jitter.mirrored), generator=generator) < 0.5
        self.axes = [axis + 1 for axis, flip in zip(jitter.mirrored, flips.tolist(), strict=True) if flip]
        other_side = jitter.other_side is not None and bool(flips[:1].any())
        self.classes = jitter.other_side if other_side else None

    def apply(self, image: Tensor) -> Tensor:
        """The changed image (C, *S + OFFSET)."""
        border = [side for before in reversed(self.before) for side in (before, OFFSET - before)]
        return F.pad((self.gain * image.flip(self.axes) + self.shift)[None], border, mode="replicate")[0]

    def undo(self, probabilities: Tensor) -> Tensor:
        """The prediction (K, *S) of the image as it was."""
        for axis, before in enumerate(self.before):
            probabilities = probabilities.narrow(axis + 1, before, probabilities.shape[axis + 1] - OFFSET)
        probabilities = probabilities.flip(self.axes)
        return probabilities if self.classes is None else probabilities[self.classes.to(probabilities.device)]
