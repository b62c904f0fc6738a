"""Turns a scan into an anomaly map: resample to the model's grid, score, map back to the scan, filter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor, nn

from medseg_diffusion import build
from medseg_diffusion.config.anomaly import AnomalyConfig
from medseg_diffusion.data.healthy import require_usable
from medseg_diffusion.device import autocast
from medseg_diffusion.errors import InputError
from medseg_diffusion.methods.detector import Detector
from medseg_diffusion.methods.healthy_scores import scan_score
from medseg_diffusion.volumes.fitting import from_generator_grid, to_generator_grid
from medseg_diffusion.volumes.foreground import scan_foreground
from medseg_diffusion.volumes.preprocessing import Placement
from medseg_diffusion.volumes.volume import Volume

from .generator import Generator

BATCH = 16
"""Number of slices that are scored together."""


@dataclass(frozen=True, eq=False)
class AnomalyMap:
    """A scored scan, on its own grid (I, J, K).

    Attributes:
        score: Anomaly score, float32, 0 or above; 0 outside the foreground.
        foreground: Voxels whose scores count, bool: `scan_foreground`, eroded as the model's configuration says.
        scan_score: Score of the whole scan (`medseg_diffusion.methods.healthy_scores.scan_score`).
        evaluations: Calls of the denoiser and the noisy classifier, where each slice of a batch counts once.
        counterpart: The healthy counterpart of the scan that the method produced, float32 in the scan's unit; the scan
            itself where nothing was scored. None unless asked for.
        unlike_training: In what the scan is unlike those of the training (`methods.seen`), one sentence; empty if
            nothing is known. Its score is not comparable with those of healthy scans.
    """

    score: Tensor
    foreground: Tensor
    scan_score: float
    evaluations: int
    counterpart: Tensor | None = None
    unlike_training: str = ""

    @property
    def values(self) -> NDArray[np.float32]:
        """The scores within the foreground, (n,)."""
        return cast(NDArray[np.float32], self.score[self.foreground].numpy())


@dataclass(frozen=True, eq=False)
class OnGrid:
    """A scan on the grid of a generator.

    Attributes:
        images: Slices of the scan, or the volume, (N, C, *size) in [-1, 1].
        inside: Foreground of the images, (N, 1, *size) float, 1 inside.
        image: The scan, (C, I, J, K) on the model's grid.
        foreground: Foreground, bool (I, J, K) on the model's grid.
        native: Foreground, bool on the scan's own grid.
        placement: The map back to the scan.
        scan: The scan on its own grid.
    """

    images: Tensor
    inside: Tensor
    image: Tensor
    foreground: Tensor
    native: Tensor
    placement: Placement
    scan: Volume


def on_grid(config: AnomalyConfig, volume: Volume) -> OnGrid:
    """Resample a scan to the generator's grid.

    Raises:
        InputError: A scan of another modality, without foreground, or much smaller or larger than the generator's
            volumes.
    """
    size = config.generator.data.shape
    image, placement = build.image_preprocessing(config.generator.preprocessing, size).apply(volume)
    require_usable(volume, placement.shape, size, config.modality)
    native = scan_foreground(volume, config.generator.preprocessing.orientation)
    head = placement.forward(native[None].float())[0] > 0.5
    if config.postprocessing.erosion:
        head = _eroded(head, config.postprocessing.erosion, planes=len(size) == 2)
        native = native & (placement.restore(head[None].float())[0] > 0.5)
    if not head.any() or not native.any():
        raise InputError(volume.source, "no foreground", "a scan that shows something", "check the scan")
    stack = image[None] if len(size) == 3 else image.movedim(-1, 0)
    inside = head[None, None].float() if len(size) == 3 else head.movedim(-1, 0)[:, None].float()
    images = to_generator_grid(stack.clamp(-1, 1), size).expand(-1, config.generator.data.channels, *[-1] * len(size))
    return OnGrid(images, to_generator_grid(inside, size, fill=0.0), image, head, native, placement, volume)


# many: the detector with its settings, the scan, and what is asked for
def scored(
    detector: Detector,
    config: AnomalyConfig,
    grid: OnGrid,
    seed: int,
    device: torch.device,
    networks: Sequence[nn.Module] = (),
    only: Tensor | None = None,
    on_progress: Callable[[float], None] = lambda done: None,
    counterpart: bool = False,
) -> AnomalyMap:
    """Score a scan: run the detector, filter the map, restore it to the scan's grid, and restrict it to the foreground.

    Args:
        detector: A detector of ``config``.
        config: The model's configuration.
        grid: The scan on the generator's grid.
        seed: Seed of all randomness. All slices have the same one, and so the same noise.
        device: Device of the detector.
        networks: Networks whose calls are counted.
        only: Images to score, bool (N,); the others have score 0. None scores all images.
        on_progress: Called with the share done, at every call of a network in ``networks`` and after every batch.
        counterpart: Whether the healthy counterpart is kept.
    """
    has_foreground = grid.inside.flatten(1).any(1)  # slices of air have nothing to score
    selected = (has_foreground if only is None else has_foreground & only).nonzero().flatten()
    maps = torch.zeros_like(grid.inside)
    healthy = grid.images[:, :1].clone() if counterpart else None
    expected, batches = max(1, detector.evaluations * len(selected)), math.ceil(len(selected) / BATCH)
    finished = 0  # batches; some detectors call further networks, which their evaluations do not count

    def on_call(done: int) -> None:
        on_progress(min(max(done / expected, finished / batches), (finished + 1) / batches))

    with counted(networks, on_call) as calls:
        for part in selected.split(BATCH) if len(selected) else ():
            with autocast(device, config.generator.training.precision):
                detected = detector.detect(grid.images[part].to(device), [seed] * len(part))
            maps[part] = detected.score.float().cpu()
            if healthy is not None:
                healthy[part] = detected.healthy.float().mean(1, keepdim=True).cpu()
            finished += 1
            on_progress(finished / batches)
    score = filtered(_on_model_grid(maps, grid, 0.0), config)
    native = grid.placement.restore((score * grid.foreground)[None])[0].clamp(min=0) * grid.native
    return AnomalyMap(
        native,
        grid.native,
        scan_score(native[grid.native].numpy()),
        sum(calls),
        None if healthy is None else _in_unit_of_scan(_on_model_grid(healthy, grid, -1.0), grid),
    )


def _on_model_grid(maps: Tensor, grid: OnGrid, fill: float) -> Tensor:
    """Maps of the images (N, 1, *size) on the model's grid, (I, J, K)."""
    whole = maps.ndim == 5
    back = from_generator_grid(maps, _plane(grid.image, 3 if whole else 2), fill)
    return back[0, 0] if whole else back[:, 0].movedim(0, -1)


def _in_unit_of_scan(healthy: Tensor, grid: OnGrid) -> Tensor:
    """A counterpart (I, J, K) on the model's grid, in the model's scale, as values of the scan on its own grid."""
    # Preprocessing scales linearly within [-1, 1], so that two numbers lead back. They are fitted to the scan itself.
    values = grid.placement.forward(grid.scan.data[:1].float())[0].double()
    known = grid.foreground & (grid.image[0].abs() < 1)
    scaled, unit = grid.image[0][known].double(), values[known]
    if len(scaled) < 2 or float(scaled.std()) == 0:
        known = torch.ones_like(known)
        scaled, unit = grid.image[0].flatten().double(), values.flatten()
    slope = float(((scaled - scaled.mean()) * (unit - unit.mean())).mean() / scaled.var(correction=0).clamp(min=1e-12))
    restored = grid.placement.restore((slope * (healthy - float(scaled.mean())) + float(unit.mean())).float()[None])[0]
    return torch.where(grid.native, restored, grid.scan.data[0].float())


def noise_networks(generator: Generator, classifier: nn.Module | None) -> list[nn.Module]:
    """The networks whose calls are the cost of a method: the denoiser and the noisy classifier."""
    return [generator.task.denoiser.network, *([] if classifier is None else [classifier])]


@contextmanager
def counted(networks: Sequence[nn.Module], on_call: Callable[[int], None] = lambda done: None) -> Iterator[list[int]]:
    """Inside the block, every call of ``networks`` appends the size of its batch to the yielded list.

    ``on_call`` is then called with the sum of the list.
    """
    calls: list[int] = []

    def count(network: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        calls.append(len(inputs[0]))
        on_call(sum(calls))

    handles = [network.register_forward_hook(count) for network in networks]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def mask_of(anomaly_map: AnomalyMap, threshold: float, voxel_mm3: float, min_volume_mm3: float = 0.0) -> Tensor:
    """The mask of scores above ``threshold``, bool (I, J, K), without connected parts below ``min_volume_mm3``.

    Voxels that touch at a corner are connected.
    """
    mask = (anomaly_map.score > threshold) & anomaly_map.foreground
    if min_volume_mm3 <= 0 or not mask.any():
        return mask
    parts, count = ndimage.label(mask.numpy(), structure=np.ones((3, 3, 3)))
    large = np.bincount(parts.ravel(), minlength=count + 1) * voxel_mm3 >= min_volume_mm3
    large[0] = False
    return torch.from_numpy(large[parts])


def _plane(image: Tensor, dims: int) -> Sequence[int]:
    return image.shape[1:] if dims == 3 else image.shape[1:3]


def filtered(score: Tensor, config: AnomalyConfig) -> Tensor:
    """Apply the median filter of ``config`` to a map (I, J, K): within slices, or in 3D for a generator of volumes."""
    side = config.postprocessing.median
    if side == 1:
        return score
    size = (side, side, 1 if len(config.generator.data.shape) == 2 else side)
    return torch.from_numpy(ndimage.median_filter(score.numpy(), size))


def _eroded(mask: Tensor, voxels: int, planes: bool) -> Tensor:
    structure = ndimage.generate_binary_structure(3, 1)
    if planes:
        structure[..., [0, 2]] = False
    # The border of the image is not eroded, because a crop from inside a body has no outline there.
    return torch.from_numpy(ndimage.binary_erosion(mask.numpy(), structure, voxels, border_value=1))
