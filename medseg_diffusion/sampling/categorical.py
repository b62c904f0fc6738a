"""Ancestral sampling of categorical diffusion over any subset of the times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from medseg_diffusion.diffusion.categorical import draw, posterior
from medseg_diffusion.diffusion.schedule import NoiseSchedule

Predict = Callable[[Tensor, Tensor], Tensor]
"""Labels (B, *S) at times (B,) to probabilities (B, K, *S) of the classes of x_0."""


@torch.no_grad()
def sample_categorical(
    predict: Predict,
    schedule: NoiseSchedule,
    x: Tensor,
    times: Sequence[int],
    generators: Sequence[torch.Generator],
) -> Tensor:
    """Moves labels ``x`` (B, *S) along the ``times`` and returns probabilities (B, K, *S) of x_0 at the last of them.

    The labels of a sample are its most probable classes: drawing them would only add noise from pixel to pixel.

    Args:
        predict: the model.
        schedule: that of its training.
        x: labels at ``times[0]``: uniform ones at T.
        times: decreasing to 0.
        generators: one CPU generator per batch element.
    """
    if len(times) < 2 or times[-1] != 0 or any(t <= s for t, s in pairwise(times)):
        raise ValueError(f"times must decrease to 0, got {list(times)}")
    for t, s in pairwise(times):
        probabilities = predict(x, torch.full((len(x),), t, dtype=torch.int64, device=x.device))
        if s:
            x = draw(posterior(schedule, probabilities, x, t, s), generators)
    return probabilities
