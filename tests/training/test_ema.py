"""The moving average of the weights: its warm-up and its bounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from medseg_diffusion.training.ema import EMA


@torch.no_grad()
def test_the_average_warms_up() -> None:
    """min(decay, (1 + n) / (10 + n)) at the n-th update, and buffers are copied."""
    model: Any = nn.BatchNorm1d(1)
    ema = EMA(model, decay=0.4)
    averaged: Any = ema.module
    assert not averaged.training and not any(p.requires_grad for p in ema.module.parameters())
    expected = float(model.weight)
    for n in range(1, 12):
        model.weight.fill_(float(n))
        model.running_mean.fill_(float(-n))
        ema.update(model)
        decay = min(0.4, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * n
        assert float(averaged.weight) == pytest.approx(expected, rel=1e-5)
        assert float(averaged.running_mean) == -n
    assert ema.updates == 11


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0])
def test_an_average_that_never_moves_is_refused(decay) -> None:
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\)"):
        EMA(nn.Linear(1, 1), decay)
