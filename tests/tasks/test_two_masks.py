"""One image that allows two masks, with chances of 0.3 and 0.7: a trained model samples each as often as it is true."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from scipy.stats import binom
from torch import Tensor, nn

from medseg_diffusion import build
from medseg_diffusion.config.segmenter import SegmenterConfig
from medseg_diffusion.methods.ablation import without_x_t

CHANCE = 0.3
SAMPLES = 200


def masks() -> Tensor:
    """Two masks (2, 12, 12) without a common pixel."""
    both = torch.zeros(2, 12, 12, dtype=torch.int64)
    both[0, 2:6, 2:10] = 1
    both[1, 7:11, 2:10] = 1
    return both


HONEST: dict[str, Any] = {"head": "logits", "cross_entropy_weight": 1.0, "log_snr": (-6.0, 2.5)}
"""Cross-entropy of x0 at the times at which x_t decides."""
GAUSSIAN = ("ensemdiff", "segdiff", "medsegdiff", "medsegdiff-v2")


def config(method: str, diffusion: Mapping[str, Any] = HONEST) -> SegmenterConfig:
    own = diffusion if method in GAUSSIAN else {}
    return SegmenterConfig.model_validate(
        {
            "method": method,
            "data": {"window": [12, 12]},
            "network": {"dims": 2, "channels": 16, "channel_mult": [1, 2], "patch_size": 2, "norm_groups": 8},
            "probabilistic_unet": {"features": 16, "latent_channels": 2, "beta": 1.0},
            "image_encoder": {"encoder_channels": 8, "encoder_blocks": 1, "encoder_growth": 8},
            "dynamic_encoding": {"bands": 5},
            "semantic_condition": {"depth": 1, "head_channels": 16, "dropout": 0.0},
            "diffusion": {"schedule": {"name": "cosine", "num_steps": 100}, **own},
            "inference": {"sampler": "ddpm", "steps": 20},
        }
    )


def trained(method: str, steps: int, diffusion: Mapping[str, Any] = HONEST) -> build.Segmenter:
    torch.manual_seed(0)
    model = build.segmenter(config(method, diffusion), 2)
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


def as_often_as_true(samples: Tensor) -> bool:
    """Whether nearly every sample is one of the masks, and the first has its share of them."""
    first, second = shares(samples.float())
    # The interval of 99 % of a binomial share, and 0.1 for what a small network has not learnt.
    low, high = (value / SAMPLES for value in binom.interval(0.99, SAMPLES, CHANCE))
    return first + second > 0.95 and low - 0.1 <= first <= high + 0.1


def samples_of(model: build.Segmenter, times: list[int], name: str = "ddpm") -> Tensor:
    sampler = build.sampler(name)
    return model.probabilities(torch.zeros(1, 1, 12, 12), [list(range(SAMPLES))], sampler, times)[0].argmax(1)


SLOW = pytest.mark.slow
EPS: dict[str, Any] = {"target": "eps", "schedule": {"name": "linear", "num_steps": 100}}


@pytest.mark.parametrize(
    ("method", "steps", "diffusion"),
    [
        pytest.param("categorical", 250, {}, marks=SLOW),
        pytest.param("probabilistic-unet", 400, {}, marks=SLOW),
        ("ensemdiff", 250, HONEST),
        pytest.param("segdiff", 250, HONEST, marks=SLOW),
        pytest.param("medsegdiff", 250, HONEST, marks=SLOW),
        pytest.param("medsegdiff-v2", 250, HONEST, marks=SLOW),
        pytest.param("segdiff", 400, EPS, marks=SLOW),
        pytest.param("ensemdiff", 400, {**EPS, "learned_variance": True}, marks=SLOW),
    ],
)
def test_each_mask_is_sampled_as_often_as_it_is_true(method: str, steps: int, diffusion: Mapping[str, Any]) -> None:
    """Also with the published objectives: noise, and noise with a learned variance."""
    model, times = trained(method, steps, diffusion), build.times(config(method, diffusion), 20)
    assert as_often_as_true(samples_of(model, times))
    if method in (*GAUSSIAN, "categorical"):  # a network that cannot see x_t fails this test
        for replacement in ("fresh", "shared", "zeros"):
            with without_x_t(model.network, replacement, method == "categorical"):
                assert not as_often_as_true(samples_of(model, times)), replacement


@pytest.mark.slow
def test_rectified_flow_samples_each_mask_as_often_as_it_is_true() -> None:
    """With its own target, schedule, times and samplers."""
    flow = {"schedule": {"name": "rectified-flow", "num_steps": 100}, "target": "flow", "times": "logit-normal"}
    model = trained("ensemdiff", 400, flow)
    for name, steps in (("euler", 20), ("heun", 10)):
        times = build.times(config("ensemdiff", flow), steps, name)
        assert as_often_as_true(samples_of(model, times, name)), name
