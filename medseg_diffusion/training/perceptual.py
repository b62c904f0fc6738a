"""Perceptual distances for training an autoencoder: LPIPS where its weights can be had, else a stated fallback."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from medseg_diffusion.errors import ModelError
from medseg_diffusion.networks.extractors import fingerprints, reason, weight_file

from .autoencoder import GradientSSIM, Perceptual

BACKBONE_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
"""torchvision's VGG-16, on which LPIPS was learned."""


def perceptual_loss(
    wanted: Literal["auto", "lpips", "gradient-ssim"],
    backbone: str | None,
    channels: int,
    device: torch.device,
    dims: int = 2,
    download: bool = False,
) -> tuple[Perceptual, str, list[str]]:
    """The distance asked for and its name; "auto" is LPIPS where package and weights are, else "gradient-ssim".

    The third value is the fingerprints of the trained weights inside it (`medseg_diffusion.networks.extractors`): no
    extractor that has any of them may score what was trained with it.

    Args:
        wanted: the kind.
        backbone: torchvision's VGG-16 weights; None looks among torchvision's downloads.
        channels: of the images; LPIPS sees greyscale as RGB.
        device: of the images.
        dims: of the images; LPIPS knows no volumes, of which "auto" takes the fallback.
        download: fetch the weights where the package is there, they are missing and no backbone is named.

    Raises:
        ModelError: LPIPS is demanded, or its backbone named, but something that it needs is missing, damaged or of
            another network; or a download failed.
    """
    if dims == 3 and wanted == "lpips":
        raise ModelError("loss.perceptual=lpips: LPIPS compares images, not volumes; set loss.perceptual=gradient-ssim")
    if dims == 3 or wanted == "gradient-ssim":
        return GradientSSIM(dims), "gradient-ssim", []
    file = Path(backbone) if backbone else weight_file(BACKBONE_URL, download and find_spec("lpips") is not None)
    try:
        loss = LPIPS(file, channels)
    except Exception as error:  # a wrong or damaged file can raise nearly anything
        if wanted == "auto" and backbone is None:
            return GradientSSIM(), "gradient-ssim", []
        raise ModelError(
            f"{file}: LPIPS cannot be had ({reason(error)}); install medseg-diffusion[lpips] and name the "
            "weights of torchvision's VGG-16 with --set loss.lpips_backbone=FILE, or set loss.perceptual=gradient-ssim"
        ) from error
    return loss.to(device), "lpips", fingerprints(loss.distance.net.state_dict().values())


class LPIPS(nn.Module):
    """Learned perceptual distance (Zhang et al. 2018, arXiv 1801.03924), of the PyPI package lpips, VGG-16."""

    def __init__(self, backbone: Path, channels: int = 3) -> None:
        super().__init__()
        import lpips

        weights = torch.load(backbone, map_location="cpu", weights_only=True)
        self.distance = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
        # The package cuts VGG's features into slices, whose layers keep their numbers.
        stages = self.distance.net.state_dict()
        self.distance.net.load_state_dict({name: weights["features." + name.partition(".")[2]] for name in stages})
        self.requires_grad_(False).eval()
        self.channels = channels

    def forward(self, found: Tensor, image: Tensor) -> Tensor:
        if self.channels == 1:
            found, image = found.expand(-1, 3, -1, -1), image.expand(-1, 3, -1, -1)
        distance: Tensor = self.distance(found.float(), image.float())
        return distance.mean()
