"""The network of an exported MONAI bundle: all of `medseg segment`, from the scan's grid and back to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from medseg_diffusion import build
from medseg_diffusion.build import SHAPE_PRIOR
from medseg_diffusion.config.segmenter import SegmenterConfig
from medseg_diffusion.diffusion.noise import derive_seed
from medseg_diffusion.volumes.paths import scan_name
from medseg_diffusion.volumes.volume import Volume

from .restore import typed_config
from .segmenter import MaskSegmenter
from .store import SavedModel

if TYPE_CHECKING:
    from monai.data import MetaTensor

MODEL = "model."
"""Prefix of the segmenter's weights in the state dict; the finder and the shape prior have none."""
_NOWHERE = Path("bundle")


class BundleSegmenter(nn.Module):
    """Scans (B, C, I, J, K) on their own grids to class values (B, 1, I, J, K) uint8 or int32.

    A scan's position and name are those of MONAI's `MetaTensor`; a plain tensor has voxels of 1 mm and no name. Results
    are those of `medseg segment` with the model's defaults.

    Args:
        card: the JSON of `bundle_card`. It stands in the bundle's configuration, so that MONAI can build the network
            from any folder.
        seed: seed of all randomness; every scan derives its own from this and its name.
    """

    def __init__(self, card: str, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self.card: dict[str, Any] = json.loads(card)
        config = typed_config(SavedModel(_NOWHERE, self.card, {}, ""), SegmenterConfig)
        self.model = build.segmenter(config, len(self.card["labels"]))
        self.finder = build.finder(config)
        if SHAPE_PRIOR in self.card:
            shape = self.card[SHAPE_PRIOR]["shape"]
            self.register_buffer(SHAPE_PRIOR, torch.zeros(shape, dtype=torch.uint8))
        self._ready: MaskSegmenter | None = None
        self.register_load_state_dict_post_hook(lambda module, keys: setattr(module, "_ready", None))

    def forward(self, scans: Tensor) -> Tensor:
        from monai.data import list_data_collate

        segmenter = self._segmenter(scans.device)
        return list_data_collate([self._labels(segmenter, scan) for scan in scans])

    def _segmenter(self, device: torch.device) -> MaskSegmenter:
        if self._ready is None or self._ready.device != device:
            weights = {name.removeprefix(MODEL): value.detach().cpu() for name, value in self.state_dict().items()}
            self._ready = MaskSegmenter(SavedModel(_NOWHERE, self.card, weights, ""), device)
        return self._ready

    def _labels(self, segmenter: MaskSegmenter, scan: Tensor) -> MetaTensor:
        from monai.data import MetaTensor

        meta = dict(scan.meta) if isinstance(scan, MetaTensor) else {}
        affine = torch.as_tensor(scan.affine if isinstance(scan, MetaTensor) else torch.eye(4)).double()
        data = torch.as_tensor(scan).as_subclass(Tensor).float().cpu()
        file = meta.get("filename_or_obj", "")
        volume = Volume(data.reshape(*data.shape, *[1] * (4 - data.ndim)), affine.cpu().numpy(), Path(file or "scan"))
        seed = derive_seed(self.seed, scan_name(file) if file else "")
        labels = segmenter.segment(volume, seed).labels.reshape(data.shape[1:])
        return MetaTensor(labels[None].to(scan.device), affine=affine, meta=meta)


def bundle_state(saved: SavedModel) -> dict[str, Tensor]:
    """The state dict of `BundleSegmenter` for a model."""
    own = build.segmenter_weights(saved.weights)
    return {MODEL + name if name in own else name: value for name, value in saved.weights.items()}


def bundle_card(saved: SavedModel) -> str:
    """What `BundleSegmenter` needs of a model's card, as JSON: no free text, since MONAI executes some texts."""
    card = saved.card
    content = {name: card[name] for name in ("method", "labels")}
    content["config"] = {**card["config"], "description": ""}
    if SHAPE_PRIOR in saved.weights:
        content[SHAPE_PRIOR] = {**card[SHAPE_PRIOR], "shape": list(saved.weights[SHAPE_PRIOR].shape)}
    return json.dumps(content)
