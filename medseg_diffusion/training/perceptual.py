"""Perceptual distances for training an autoencoder: LPIPS where its weights are available, else a named fallback."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from medseg_diffusion.errors import ModelError
from medseg_diffusion.networks.extractors import fingerprints, reason, weight_file

from .autoencoder import GradientSSIM, Perceptual

PerceptualLoss = Literal["auto", "lpips", "gradient-ssim"]

BACKBONE_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
"""torchvision's VGG-16, whose features LPIPS compares."""


def perceptual_loss(
    kind: PerceptualLoss,
    backbone: str | None,
    channels: int,
    device: torch.device,
    download: bool = False,
) -> tuple[Perceptual, str, list[str]]:
    """Returns a perceptual distance, its name, and the fingerprints of the trained weights that it uses.

    An extractor that shares any of these fingerprints (`medseg_diffusion.networks.extractors`) must not score what was
    trained with this distance.

    Args:
        kind: "auto" is LPIPS where its package and weights are available, else "gradient-ssim".
        backbone: file of torchvision's VGG-16 weights; None looks among torchvision's downloads.
        channels: of the images; LPIPS sees greyscale as RGB.
        device: of the images.
        download: fetch missing weights, provided that the package is installed and ``backbone`` is None.

    Raises:
        ModelError: ``kind`` is "lpips" or a backbone is named, but something that LPIPS needs is missing, damaged or
            of another network; or a download failed.
    """
    if kind == "gradient-ssim":
        return GradientSSIM(), "gradient-ssim", []
    file = Path(backbone) if backbone else weight_file(BACKBONE_URL, download and find_spec("lpips") is not None)
    try:
        loss = LPIPS(file, channels)
    except Exception as error:  # a wrong or damaged file can raise nearly anything
        if kind == "auto" and backbone is None:
            return GradientSSIM(), "gradient-ssim", []
        raise ModelError(
            f"{file}: cannot load LPIPS ({reason(error)}); install medseg-diffusion[lpips] and name the "
            "weights of torchvision's VGG-16 with --set loss.lpips_backbone=FILE, or set loss.perceptual=gradient-ssim"
        ) from error
    return loss.to(device), "lpips", fingerprints(loss.distance.net.state_dict().values())


class LPIPS(nn.Module):
    """Learned perceptual distance (Zhang et al. 2018, arXiv 1801.03924): the PyPI package lpips with VGG-16."""

    def __init__(self, backbone: Path, channels: int = 3) -> None:
        super().__init__()
        import lpips

        weights = torch.load(backbone, map_location="cpu", weights_only=True)
        self.distance = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
        # The package cuts VGG's features into slices, in which layers keep their numbers.
        stages = self.distance.net.state_dict()
        self.distance.net.load_state_dict({name: weights["features." + name.partition(".")[2]] for name in stages})
        self.requires_grad_(False).eval()
        self.channels = channels

    def forward(self, reconstruction: Tensor, image: Tensor) -> Tensor:
        if self.channels == 1:
            reconstruction, image = reconstruction.expand(-1, 3, -1, -1), image.expand(-1, 3, -1, -1)
        distance: Tensor = self.distance(reconstruction.float(), image.float())
        return distance.mean()
