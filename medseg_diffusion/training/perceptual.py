"""Perceptual distances for training an autoencoder: LPIPS where its weights can be had, else a stated fallback."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from medseg_diffusion.errors import ModelError

from .autoencoder import GradientSSIM, Perceptual

BACKBONE = "vgg16-397923af.pth"
"""torchvision's VGG-16, on which LPIPS was learned; its file name among torchvision's downloads."""


def perceptual_loss(
    wanted: Literal["auto", "lpips", "gradient-ssim"],
    backbone: str | None,
    channels: int,
    device: torch.device,
    dims: int = 2,
) -> tuple[Perceptual, str, list[str]]:
    """The distance asked for and its name; "auto" is LPIPS where package and weights are, else "gradient-ssim".

    The third value names the trained networks inside it as extractors of scores are named: no score of what was trained
    with them may be theirs.

    Nothing is downloaded.

    Args:
        wanted: the kind.
        backbone: torchvision's VGG-16 weights; None looks among torchvision's downloads.
        channels: of the images; LPIPS sees greyscale as RGB.
        device: of the images.
        dims: of the images; LPIPS knows no volumes, of which "auto" takes the fallback.

    Raises:
        ModelError: LPIPS is demanded, or its backbone named, but something that it needs is missing.
    """
    if dims == 3 and wanted == "lpips":
        raise ModelError("loss.perceptual=lpips: LPIPS compares images, not volumes; set loss.perceptual=gradient-ssim")
    if dims == 3 or wanted == "gradient-ssim":
        return GradientSSIM(dims), "gradient-ssim", []
    file = Path(backbone) if backbone else Path(torch.hub.get_dir()) / "checkpoints" / BACKBONE
    try:
        loss = LPIPS(file, channels).to(device)
        return loss, "lpips", [f"{file.name} ({hashlib.sha256(file.read_bytes()).hexdigest()[:8]})"]
    except (ImportError, OSError) as error:
        if wanted == "auto" and backbone is None:
            return GradientSSIM(), "gradient-ssim", []
        raise ModelError(
            f"{file}: LPIPS cannot be had ({str(error).splitlines()[0]}); install medseg-diffusion[lpips] and name the "
            "weights of torchvision's VGG-16 with --set loss.lpips_backbone=FILE, or set loss.perceptual=gradient-ssim"
        ) from error


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
