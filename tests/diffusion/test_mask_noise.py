"""What a threshold reads from a noised mask, against drawn noise."""

from __future__ import annotations

import math

import pytest
import torch

from medseg_diffusion.diffusion.mask_noise import threshold_dice


@pytest.mark.parametrize("share", [0.02, 0.3])
@pytest.mark.parametrize("log_snr", [-4.0, -1.0, 1.0, 2.5])
def test_the_best_threshold_is_that_of_drawn_masks(log_snr, share) -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(400_000, generator=generator) < share
    x_t = (2 * mask.float() - 1) * math.exp(log_snr / 2) + torch.randn(len(mask), generator=generator)
    ordered = mask[x_t.argsort(descending=True)].double()
    marked = torch.arange(1, len(mask) + 1)
    dice = (2 * ordered.cumsum(0) / (marked + ordered.sum())).max()
    assert threshold_dice(log_snr, share) == pytest.approx(float(dice), abs=0.01)


def test_all_positions_are_the_least_answer() -> None:
    share = 0.1
    assert threshold_dice(-30, share) == pytest.approx(2 * share / (1 + share), abs=1e-6)
    with pytest.raises(ValueError, match="between 0 and 1"):
        threshold_dice(0.0, 1.0)
