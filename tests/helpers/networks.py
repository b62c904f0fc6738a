"""Small networks with random weights, and inputs for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medseg_diffusion.networks.unet import UNet

BOTH = pytest.mark.parametrize("dims", [2, 3], ids=["2D", "3D"])


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def awake(module: Any, seed: int = 0) -> Any:
    """The module with all parameters drawn anew, so that no branch is zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    return module.eval()


def small(dims: int, **changes: object) -> UNet:
    options: dict[str, Any] = {
        "in_channels": 2,
        "out_channels": 3,
        "channels": 8,
        "channel_mult": (1, 2),
        "num_res_blocks": 1,
    }
    return UNet(dims, **{**options, **changes})


def size(dims: int, *numbers: int) -> tuple[int, ...]:
    return numbers[:dims]
