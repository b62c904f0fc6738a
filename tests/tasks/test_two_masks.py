"""One image that allows two masks, with chances of 0.3 and 0.7: a trained model samples each as often as it is true."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import binom
from torch import Tensor, nn

from medseg_diffusion import build
from medseg_diffusion.config.segmenter import SegmenterConfig
from medseg_diffusion.sampling.ddpm import DDPM

CHANCE = 0.3
SAMPLES = 200


def masks() -> Tensor:
    """Two masks (2, 12, 12) without a common pixel."""
    both = torch.zeros(2, 12, 12, dtype=torch.int64)
    both[0, 2:6, 2:10] = 1
    both[1, 7:11, 2:10] = 1
    return both


def config(method: str) -> SegmenterConfig:
    return SegmenterConfig.model_validate(
        {
            "method": method,
            "data": {"window": [12, 12]},
            "network": {"dims": 2, "channels": 16, "channel_mult": [1, 2], "patch_size": 2, "norm_groups": 8},
            "probabilistic_unet": {"features": 16, "latent_channels": 2, "beta": 1.0},
            "diffusion": {"schedule": {"name": "cosine", "num_steps": 100}},
            "inference": {"sampler": "ddpm", "steps": 20},
        }
    )


def trained(method: str, steps: int) -> build.Segmenter:
    torch.manual_seed(0)
    model = build.segmenter(config(method), 2)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator, image = torch.Generator().manual_seed(0), torch.zeros(16, 1, 12, 12)
    for step in range(steps):
        first = torch.rand(16, generator=generator) < CHANCE
        labels = masks()[(~first).long()]
        optimizer.zero_grad()
        model({"image": image, "label": labels, "seed": torch.arange(16 * step, 16 * step + 16)}).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    return model.eval()


def shares(samples: Tensor) -> tuple[float, float]:
    """Shares of the samples (N, 12, 12) that are the first and the second mask, with a Dice above 0.9."""
    dice = [
        2 * (samples * mask).flatten(1).sum(1) / (samples.flatten(1).sum(1) + mask.sum()) for mask in masks().float()
    ]
    return float((dice[0] > 0.9).float().mean()), float((dice[1] > 0.9).float().mean())


@pytest.mark.parametrize(("method", "steps"), [("categorical", 250), ("probabilistic-unet", 400)])
def test_each_mask_is_sampled_as_often_as_it_is_true(method: str, steps: int) -> None:
    model = trained(method, steps)
    times = build.times(config(method), 20)
    samples = model.probabilities(torch.zeros(1, 1, 12, 12), [list(range(SAMPLES))], DDPM(), times)[0].argmax(1)
    first, second = shares(samples.float())
    assert first + second > 0.95
    # The interval of 99 % of a binomial share, and 0.1 for what a small network has not learnt.
    low, high = (value / SAMPLES for value in binom.interval(0.99, SAMPLES, CHANCE))
    assert low - 0.1 <= first <= high + 0.1
