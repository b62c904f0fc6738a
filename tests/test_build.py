"""Every mask segmenter learns two cases by heart: from seed to mask, nothing on the way may be wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medseg_diffusion import build
from medseg_diffusion.config.load import parse_config
from medseg_diffusion.metrics.overlap import label_overlap
from medseg_diffusion.sampling.loop import spaced
from medseg_diffusion.tasks.latent_mask import LatentMaskDiffusion
from medseg_diffusion.training.autoencoder import standardise

STEPS, RATE = 400, 1e-3
CONDITIONS: dict[str, dict[str, Any]] = {
    "image_encoder": {"encoder_channels": 16, "encoder_blocks": 1, "encoder_growth": 8},
    "dynamic_encoding": {"bands": 5},
    "semantic_condition": {"depth": 1, "head_channels": 16, "dropout": 0.0},
}
LOGITS: dict[str, Any] = {"head": "logits", "scale": 0.5, "dice_ce_weight": 1.0}
LATENT: dict[str, Any] = {"target": "x0", "scale": 0.05}


def cases(dims: int) -> tuple[Tensor, Tensor]:
    """Two noisy images (2, 1, *S), and two classes in each, apart by place and not by brightness."""
    shape = (16,) * dims if dims == 2 else (8,) * dims
    generator = torch.Generator().manual_seed(0)
    labels = torch.zeros(2, *shape, dtype=torch.int64)
    half = shape[0] // 2
    labels[0, 1 : half - 1, 1:half], labels[0, half : half + 2, half:] = 1, 2
    labels[1, half:-1, 1 : half + 1], labels[1, 1 : half - 1, half:-1] = 1, 2
    return (labels > 0).float()[:, None] + 0.3 * torch.randn((2, 1, *shape), generator=generator), labels


def learn(model: nn.Module, image: Tensor, labels: Tensor) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    model.train()
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (STEPS - step) / 50)
        loss = model({"image": image, "label": labels, "seed": torch.tensor([2 * step, 2 * step + 1])})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("method", ["baseline", "ensemdiff", "segdiff", "medsegdiff", "medsegdiff-v2", "latent-mask"])
def test_two_cases_are_learnt_by_heart(method, dims) -> None:
    image, labels = cases(dims)
    content = {
        "method": method,
        "data": {"window": list(image.shape[2:]), "labels": ["one", "two"]},
        "network": {"dims": dims, "channels": 16, "channel_mult": [1, 2, 2], "num_res_blocks": 1},
        "diffusion": {"schedule": {"name": "cosine"}, **(LATENT if method == "latent-mask" else LOGITS)},
        **CONDITIONS,
    }
    config = parse_config(content, "test")
    torch.manual_seed(0)
    model = build.segmenter(config, 3)
    if isinstance(model, LatentMaskDiffusion):
        learn(model.autoencoder.requires_grad_(True), image, labels)
        model.autoencoder.requires_grad_(False)
        with torch.no_grad():
            standardise(model.autoencoder.codec, [model.autoencoder.channels_of(labels)])
    learn(model, image, labels)
    times = spaced(build.noise_schedule(config.diffusion.schedule), 5)
    found = model.probabilities(image, [[1, 2], [3, 4]], build.sampler("dpm++"), times).argmax(2)
    for case in range(2):
        for member in range(2):
            overlap = label_overlap(found[case, member].numpy(), labels[case].numpy(), [1, 2])
            assert min(value.dice for value in overlap.values()) > 0.95
