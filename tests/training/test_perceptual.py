"""The backbone of the perceptual loss: found, refused or downloaded on request only."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from medseg_diffusion.errors import ModelError
from medseg_diffusion.networks import extractors
from medseg_diffusion.networks.extractors import extractor, fingerprints
from medseg_diffusion.training import perceptual
from medseg_diffusion.training.perceptual import perceptual_loss
from tests.helpers.downloads import published


class FakeLPIPS(nn.Module):
    """The package's layout: VGG's layers in slices, under their own numbers."""

    def __init__(self, **_options: object) -> None:
        super().__init__()
        self.net = nn.ModuleDict({"slice1": nn.ModuleDict({"0": nn.Conv2d(3, 8, 3)})})


@pytest.fixture
def vgg(tmp_path: Path, monkeypatch) -> dict[str, torch.Tensor]:
    """Weights in torchvision's layout, for a package of the above, and an empty folder of downloads."""
    module = ModuleType("lpips")
    module.__spec__ = ModuleSpec("lpips", None)
    module.LPIPS = FakeLPIPS  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lpips", module)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return {f"features.{name}": value for name, value in nn.Sequential(nn.Conv2d(3, 8, 3)).state_dict().items()}


def test_the_perceptual_loss_has_the_fingerprints_of_its_backbone(tmp_path: Path, vgg) -> None:
    torch.save(vgg, tmp_path / "any-name.pth")
    _, name, found = perceptual_loss("lpips", str(tmp_path / "any-name.pth"), 3, torch.device("cpu"))
    assert (name, found) == ("lpips", fingerprints([vgg["features.0.weight"]]))
    assert perceptual_loss("gradient-ssim", None, 3, torch.device("cpu"))[1:] == ("gradient-ssim", [])


def test_a_wrong_or_damaged_backbone_is_one_line_or_the_fallback(tmp_path: Path, vgg) -> None:
    torch.save(vgg, tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:-300])
    (tmp_path / "text.pth").write_bytes(b"no weights")
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save({"layer": torch.zeros(2)}, tmp_path / "other.pth")
    torch.save({**vgg, "features.0.weight": torch.zeros(2, 2)}, tmp_path / "shape.pth")
    default = tmp_path / "hub" / "checkpoints" / "vgg16-397923af.pth"
    default.parent.mkdir(parents=True)
    for name in ("cut", "text", "empty", "other", "shape", "missing"):
        file = tmp_path / f"{name}.pth"
        for wanted in ("auto", "lpips"):
            with pytest.raises(ModelError, match=rf"{name}\.pth: cannot load LPIPS \(\w+: ") as caught:
                perceptual_loss(wanted, str(file), 3, torch.device("cpu"))
            assert "\n" not in str(caught.value)
        if file.is_file():
            default.write_bytes(file.read_bytes())
        assert perceptual_loss("auto", None, 3, torch.device("cpu"))[1] == "gradient-ssim"


def test_the_backbone_is_downloaded_on_request_only(tmp_path: Path, vgg, monkeypatch) -> None:
    monkeypatch.setattr(perceptual, "BACKBONE_URL", published(tmp_path, vgg))
    assert perceptual_loss("auto", None, 3, torch.device("cpu"))[1] == "gradient-ssim"
    assert not (tmp_path / "hub").exists()
    for download in (True, False):  # the second finds what the first has fetched
        assert perceptual_loss("auto", None, 3, torch.device("cpu"), download=download)[1] == "lpips"


@pytest.mark.parametrize("damage", ["missing", "altered"])
def test_a_failed_download_is_one_line_and_leaves_no_file(tmp_path: Path, vgg, monkeypatch, damage) -> None:
    url = published(tmp_path, vgg)
    file = next(tmp_path.glob("weights-*.pth"))
    file.unlink() if damage == "missing" else file.write_bytes(b"something else")
    monkeypatch.setattr(extractors, "INCEPTION_URL", url)
    monkeypatch.setattr(perceptual, "BACKBONE_URL", url)
    for call in (
        lambda: extractor(download=True),
        lambda: perceptual_loss("auto", None, 3, torch.device("cpu"), download=True),
    ):
        with pytest.raises(ModelError, match=r"cannot be downloaded from file://.*; try again, or put") as caught:
            call()
        assert "\n" not in str(caught.value) and file.name in str(caught.value)
        assert not list((tmp_path / "hub" / "checkpoints").iterdir())
