"""Anomaly models in memory: scans to maps of what is unlike the healthy scans of the training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from scipy import ndimage
from torch import Tensor, nn

from medseg_diffusion import build
from medseg_diffusion.config.anomaly import AnomalyConfig, PostprocessingSection
from medseg_diffusion.config.load import parse_config
from medseg_diffusion.data.healthy import HEALTHY, require_usable
from medseg_diffusion.device import autocast, choose_device, keep_freed_memory, tune
from medseg_diffusion.diffusion.guidance import Classifier, FixedCondition
from medseg_diffusion.diffusion.noise import derive_seed
from medseg_diffusion.errors import InputError, ModelError, UsageError
from medseg_diffusion.methods.counterfactual import ClassifierCounterfactual, FreeCounterfactual
from medseg_diffusion.methods.detector import Detector
from medseg_diffusion.methods.healthy_scores import HealthyScores, scan_score
from medseg_diffusion.methods.latent_healing import HealthyLatents, LatentHealing, Reconstruction
from medseg_diffusion.methods.partial_noise import PartialNoise
from medseg_diffusion.methods.patched import Patched
from medseg_diffusion.networks.autoencoder import Codec
from medseg_diffusion.tasks.image import ImageDiffusion
from medseg_diffusion.volumes.fitting import fitted, unfitted
from medseg_diffusion.volumes.foreground import scan_foreground
from medseg_diffusion.volumes.preprocessing import Placement
from medseg_diffusion.volumes.volume import Volume

from .generator import Generator, restore_classifier, restore_generator
from .store import SavedModel, load_model_files

GENERATOR, CLASSIFIER = "generator.", "classifier."
"""Prefixes of the parts' weights in an anomaly model; their cards are the entries "generator" and "classifier"."""
BATCH = 16
"""Slices that are scored at once."""


@dataclass(frozen=True, eq=False)
class AnomalyMap:
    """A scored scan, on its own grid (I, J, K).

    Attributes:
        score: float32, 0 or above; 0 outside the foreground.
        foreground: bool, where scores count: `scan_foreground`, eroded if the model says so.
        scan_score: of the whole scan (`medseg_diffusion.methods.healthy_scores.scan_score`).
        evaluations: of the networks that see noise, denoiser and classifier, one a slice and call.
    """

    score: Tensor
    foreground: Tensor
    scan_score: float
    evaluations: int

    @property
    def values(self) -> NDArray[np.float32]:
        """The scores within the foreground, (n,)."""
        return cast(NDArray[np.float32], self.score[self.foreground].numpy())


class AnomalyModel:
    """A trained anomaly model, loaded once for many scans.

    Args:
        name_or_path: model folder, run folder or installed name.
        method: one of the model's detectors; None takes its default.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        latent_quantile: of "latent-healing", the share of healthy latent positions that stay as they are; None, like
            the following, takes the model's.
        median: side of the median filter.
        erosion: of the foreground, in voxels.
        min_volume_mm3: of the mask's connected parts.

    Raises:
        ModelError: missing or unusable model.
        UsageError: a detector that the model does not have, or an unknown device.
    """

    def __init__(
        self,
        name_or_path: str | Path,
        method: str | None = None,
        device: str = "auto",
        latent_quantile: float | None = None,
        median: int | None = None,
        erosion: int | None = None,
        min_volume_mm3: float | None = None,
    ) -> None:
        self.device = choose_device(device)
        tune(self.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.saved: SavedModel = load_model_files(name_or_path)
        self.config, self.generator, self.classifier = restore_anomaly(self.saved, self.device)
        known = self.config.detectors
        if method is not None and method not in known:
            raise UsageError(f"{self.saved.path}: --method {method}: this model's generator serves {', '.join(known)}")
        self.method = method or known[0]
        if latent_quantile is not None and self.method != "latent-healing":
            raise UsageError(f"--latent-quantile is for latent-healing, not {self.method}")
        self.networks = noise_networks(self.generator, self.classifier)
        healthy = stored_latents(self.saved)
        self.detector = make_detector(
            self.config, self.generator, self.classifier, self.method, healthy, latent_quantile
        )
        given = {"median": median, "erosion": erosion, "min_volume_mm3": min_volume_mm3}
        before = self.config.postprocessing
        after = postprocessing(self.config, {name: value for name, value in given.items() if value is not None})
        # The smallest volume changes the mask, not the map that was calibrated.
        moved = [name for name in ("median", "erosion") if getattr(after, name) != getattr(before, name)]
        if latent_quantile not in (None, self.config.latent_healing.quantile):
            moved.append("latent quantile")
        self.config = self.config.model_copy(update={"postprocessing": after})
        self.notes: tuple[str, ...] = ()
        if moved:
            self.notes = (
                f"the model was calibrated with another {' and '.join(moved)}: healthy quantiles do not hold until "
                "medseg calibrate-anomaly is given the same",
            )

    @property
    def name(self) -> str:
        path = self.saved.path
        return path.resolve().parent.name if path.name == "model" else path.name

    def healthy_scores(self) -> HealthyScores | None:
        """What the model knows of healthy scans' final maps; None without calibration."""
        return stored_scores(self.saved, self.method)

    def score(
        self, volume: Volume, seed: int = 0, on_progress: Callable[[float], None] = lambda done: None
    ) -> AnomalyMap:
        """Scores a scan; ``seed`` decides all randomness.

        Raises:
            InputError: a scan without foreground.
        """
        grid = on_grid(self.config, volume)
        return scored(self.detector, self.config, grid, seed, self.device, self.networks, on_progress=on_progress)


def postprocessing(config: AnomalyConfig, changed: Mapping[str, float]) -> PostprocessingSection:
    """The configuration's post-processing with some values changed; UsageError for an impossible one."""
    try:
        return PostprocessingSection(**{**config.postprocessing.model_dump(), **changed})
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"--{first['loc'][0]} {first['input']}: {first['msg']}") from error


@dataclass(frozen=True, eq=False)
class OnGrid:
    """A scan as a generator sees it.

    Attributes:
        images: (N, C, *size) in [-1, 1]: its slices, or the volume.
        inside: (N, 1, *size) float, 1 in the foreground.
        image: (C, I, J, K) on the model's grid.
        foreground: bool (I, J, K) on the model's grid.
        native: bool, the same on the scan's own grid.
        placement: the way back to the scan.
    """

    images: Tensor
    inside: Tensor
    image: Tensor
    foreground: Tensor
    native: Tensor
    placement: Placement


def on_grid(config: AnomalyConfig, volume: Volume) -> OnGrid:
    """Brings a scan to the generator's grid.

    Raises:
        InputError: a scan of another modality, without foreground, or much smaller or larger than the volumes that the
            generator makes.
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
    images = fitted(stack.clamp(-1, 1), size).expand(-1, config.generator.data.channels, *[-1] * len(size))
    return OnGrid(images, fitted(inside, size, fill=0.0), image, head, native, placement)


def scored(
    detector: Detector,
    config: AnomalyConfig,
    grid: OnGrid,
    seed: int,
    device: torch.device,
    networks: Sequence[nn.Module] = (),
    only: Tensor | None = None,
    on_progress: Callable[[float], None] = lambda done: None,
) -> AnomalyMap:
    """A scan to its final map: detector, back to the scan's grid, post-processing, foreground.

    Args:
        detector: of ``config``.
        config: of the model.
        grid: the scan.
        seed: of all randomness.
        device: of the detector.
        networks: those whose calls are counted.
        only: bool (N,), which images are scored; the others have 0.
        on_progress: called with the share done.
    """
    wanted = grid.inside.flatten(1).any(1)  # slices of air have nothing to score
    shown = (wanted if only is None else wanted & only).nonzero().flatten()
    maps = torch.zeros_like(grid.inside)
    with counted(networks) as calls:
        for part in shown.split(BATCH) if len(shown) else ():
            seeds = [derive_seed(seed, "slice", k) for k in part.tolist()]
            with autocast(device, config.generator.training.precision):
                maps[part] = detector.score(grid.images[part].to(device), seeds).float().cpu()
            on_progress(float(part[-1] + 1) / len(maps))
    back = unfitted(maps, _plane(grid.image, len(config.generator.data.shape)))
    score = back[0, 0] if len(config.generator.data.shape) == 3 else back[:, 0].movedim(0, -1)
    score = filtered(score, config)
    native = grid.placement.restore((score * grid.foreground)[None])[0].clamp(min=0) * grid.native
    return AnomalyMap(native, grid.native, scan_score(native[grid.native].numpy()), sum(calls))


def noise_networks(generator: Generator, classifier: nn.Module | None) -> list[nn.Module]:
    """The networks whose calls are the cost of a method: the denoiser's and the noisy classifier."""
    return [generator.task.denoiser.network, *([] if classifier is None else [classifier])]


@contextmanager
def counted(networks: Sequence[nn.Module]) -> Iterator[list[int]]:
    """Inside, every call of ``networks`` adds the size of its batch to the list."""
    calls: list[int] = []
    handles = [net.register_forward_hook(lambda net, inputs, out: calls.append(len(inputs[0]))) for net in networks]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def mask_of(found: AnomalyMap, threshold: float, voxel_mm3: float, min_volume_mm3: float = 0.0) -> Tensor:
    """Where the map is above ``threshold``, bool (I, J, K), without connected parts (corners) below a volume."""
    mask = (found.score > threshold) & found.foreground
    if min_volume_mm3 <= 0 or not mask.any():
        return mask
    parts, count = ndimage.label(mask.numpy(), structure=np.ones((3, 3, 3)))
    large = np.bincount(parts.ravel(), minlength=count + 1) * voxel_mm3 >= min_volume_mm3
    large[0] = False
    return torch.from_numpy(large[parts])


def restore_anomaly(
    saved: SavedModel, device: torch.device | str = "cpu"
) -> tuple[AnomalyConfig, Generator, nn.Module | None]:
    """Configuration, generator and classifier of a model directory.

    Raises:
        ModelError: a card or weights that do not describe an anomaly model of this version.
    """
    try:
        config = parse_config(saved.card["config"], str(saved.path / "model.json"))
        if not isinstance(config, AnomalyConfig):
            raise UsageError(f"a {config.method}, which is not made by train-anomaly")
        generator = restore_generator(_part(saved, "generator", GENERATOR), device)
        classifier = None
        if config.classifier is not None:
            classifier, _, _ = restore_classifier(_part(saved, "classifier", CLASSIFIER), device)
    except (KeyError, UsageError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"{saved.path}: not an anomaly model of this version ({reason}); use a model made by train-anomaly"
        ) from error
    return config, generator, classifier


def make_detector(
    config: AnomalyConfig,
    generator: Generator,
    classifier: nn.Module | None,
    method: str,
    healthy: HealthyLatents | None,
    latent_quantile: float | None = None,
) -> Detector:
    """The detector ``method`` of a configuration with its trained parts.

    Raises:
        UsageError: settings that the generator's schedule does not allow.
    """
    task, kind = generator.task, config.residual
    denoiser = task.denoiser
    try:
        if method == "latent-healing":
            section = config.latent_healing
            times = np.linspace(section.earliest, section.latest, section.times).round().astype(int).tolist()
            return LatentHealing(
                denoiser,
                cast(Codec, generator.codec),
                times,
                section.start,
                section.steps,
                section.quantile if latent_quantile is None else latent_quantile,
                section.smoothing,
                healthy,
                residual=kind,
                draws=section.draws,
            )
        if method == "reconstruction":
            return Reconstruction(cast(Codec, generator.codec), kind)
        if method == "partial-noise":
            noise = build.noise_source(config.generator.diffusion.noise)
            walk = config.partial_noise.start, config.partial_noise.steps
            return PartialNoise(denoiser, noise, *walk, config.partial_noise.draws, kind)
        if method == "patched":
            noise = build.noise_source(config.generator.diffusion.noise)
            patched = config.patched
            size = config.generator.data.shape
            return Patched(denoiser, noise, size, patched.time, draws=patched.draws, residual=kind)
        assert isinstance(task, ImageDiffusion)
        walk = (config.counterfactual.start, config.counterfactual.steps)
        label = torch.tensor([HEALTHY], device=generator.device)
        null = task.null(label)
        if method == "classifier-guided":
            known = cast(Classifier, classifier)
            scale = config.counterfactual.scale
            return ClassifierCounterfactual(FixedCondition(denoiser, null), known, HEALTHY, *walk, scale, kind)
        return FreeCounterfactual(denoiser, task.condition(label), null, *walk, config.counterfactual.guidance, kind)
    except ValueError as error:
        raise UsageError(f"{method}: {error}") from error


def stored_latents(saved: SavedModel) -> HealthyLatents | None:
    """The healthy KL maps' statistics among a model's weights."""
    names = ("mean", "std", "quantiles")
    weights = saved.weights
    if f"latents.{names[0]}" not in weights:
        return None
    return HealthyLatents(*(weights[f"latents.{name}"] for name in names))


def stored_scores(saved: SavedModel, method: str) -> HealthyScores | None:
    """The calibration of a detector in a model."""
    numbers: Mapping[str, Any] | None = saved.card.get("calibration", {}).get(method)
    if numbers is None:
        return None
    weights = saved.weights
    return HealthyScores(
        quantile=float(numbers["quantile"]),
        automatic=float(numbers["threshold"]),
        rate=float(numbers["rate"]),
        quantiles=weights[f"scores.{method}.quantiles"],
        scan_scores=weights[f"scores.{method}.scans"],
        patients=int(numbers["patients"]),
    )


def _part(saved: SavedModel, entry: str, prefix: str) -> SavedModel:
    inner = {name.removeprefix(prefix): value for name, value in saved.weights.items() if name.startswith(prefix)}
    return SavedModel(saved.path, saved.card[entry], inner, saved.sha256)


def _plane(image: Tensor, dims: int) -> Sequence[int]:
    return image.shape[1:] if dims == 3 else image.shape[1:3]


def filtered(score: Tensor, config: AnomalyConfig) -> Tensor:
    """A map (I, J, K) after the median filter of ``config``: in the slices' planes, or in 3D as its generator."""
    side = config.postprocessing.median
    if side == 1:
        return score
    size = (side, side, 1 if len(config.generator.data.shape) == 2 else side)
    return torch.from_numpy(ndimage.median_filter(score.numpy(), size))


def _eroded(mask: Tensor, voxels: int, planes: bool) -> Tensor:
    structure = ndimage.generate_binary_structure(3, 1)
    if planes:
        structure[..., [0, 2]] = False
    # The image's border is no outline: a crop from inside a body keeps it.
    return torch.from_numpy(ndimage.binary_erosion(mask.numpy(), structure, voxels, border_value=1))
