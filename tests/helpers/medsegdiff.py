"""Small networks of MedSegDiff and MedSegDiff-V2, and inputs for them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from medseg_diffusion.networks.medsegdiff import MedSegDiff
from medseg_diffusion.networks.medsegdiff_v2 import MedSegDiffV2
from medseg_diffusion.networks.unet import UNet

BOTH = pytest.mark.parametrize("dims", [2, 3], ids=["2D", "3D"])
SIZES = pytest.mark.parametrize("size", [(8, 8), (48, 65), (7, 1), (5, 6, 7)], ids=str)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def small(name: str, dims: int) -> MedSegDiff | MedSegDiffV2:
    """A small network with random weights everywhere, also where training starts from zeros."""
    torch.manual_seed(0)
    unet = UNet(dims, 2, 2, channels=8, channel_mult=(1, 2, 2), num_res_blocks=1)
    network = MedSegDiff(unet, 3, bands=5) if name == "v1" else MedSegDiffV2(unet, 3, 2, 2, 8, 0.0)
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return network


NETWORKS = pytest.mark.parametrize("name", ["v1", "v2"])
