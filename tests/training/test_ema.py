"""The moving average of the weights: its warm-up and its bounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from medseg_diffusion.training.ema import EMA, _lerp_in_few_kernels, _lerp_in_one_pass


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


@torch.no_grad()
def test_the_average_does_not_move_in_a_skipped_step() -> None:
    model: Any = nn.BatchNorm1d(1)
    ema = EMA(model, decay=0.4)
    model.weight.fill_(5.0)
    model.running_mean.fill_(7.0)
    ema.update(model, torch.tensor(False))
    averaged: Any = ema.module
    assert float(averaged.weight) == 1 and float(averaged.running_mean) == 7
    ema.update(model, torch.tensor(True))
    assert float(averaged.weight) > 1


@torch.no_grad()
def test_both_ways_to_move_the_average_agree() -> None:
    """The one of CPUs and the one of GPUs."""
    current = [torch.randn(3, 4), torch.randn(5)]
    start = [torch.randn(3, 4), torch.randn(5)]
    moved = [[value.clone() for value in start] for _ in range(2)]
    _lerp_in_one_pass(moved[0], current, torch.tensor(0.3))
    _lerp_in_few_kernels(moved[1], current, torch.tensor(0.3))
    torch.testing.assert_close(moved[0], moved[1])
    torch.testing.assert_close(moved[0][0], 0.7 * start[0] + 0.3 * current[0])


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0])
def test_an_average_that_never_moves_is_refused(decay) -> None:
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\)"):
        EMA(nn.Linear(1, 1), decay)
