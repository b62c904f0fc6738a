"""The interface of all segmenters, and how the members of an ensemble become one segmentation on the scan's grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from medseg_diffusion.config.pixel_classifier import PixelClassifierConfig
from medseg_diffusion.config.segmenter import SegmenterConfig
from medseg_diffusion.config.shared import InferenceSection
from medseg_diffusion.device import Precision, autocast_dtype
from medseg_diffusion.errors import ModelError
from medseg_diffusion.methods.ablation import Replacement
from medseg_diffusion.methods.calibration import Calibration
from medseg_diffusion.methods.ensemble import Ensemble, Fusion, Uncertainty, entropy, largest_part, temperature_scaled
from medseg_diffusion.methods.segment import Segmenter, segment
from medseg_diffusion.methods.shape_prior import ShapePrior
from medseg_diffusion.methods.windows import Windows
from medseg_diffusion.sampling.loop import Sampler
from medseg_diffusion.volumes.preprocessing import Placement, Preprocessing
from medseg_diffusion.volumes.volume import Volume

from .store import SavedModel

PROBABILITIES_AT_ONCE = 2**28
"""Largest number of values of all members in memory (1 GB). Large scans take fewer members or slices at once."""

NOT_FASTER = "--fast changes nothing: this model has no setting with fewer steps or masks"
"""Note on the option ``fast``."""

Quality = Literal["usual", "check"]


@dataclass(frozen=True)
class EnsembleOptions:
    """How many masks are sampled, and how they become one; None takes the model's default.

    Attributes:
        ensemble: Number of sampled masks.
        steps: Denoiser calls per sample.
        sampler: "ddpm", "ddim" or "dpm++".
        fusion: "mean", "majority" or "staple" (`Ensemble.fuse`).
        uncertainty: Kind of the uncertainty map (`Ensemble.uncertainty`).
        keep_largest: Whether only the largest connected part of the foreground is kept.
        fast: One step and one mask instead of the model's defaults, as far as the model has both.
    """

    ensemble: int | None = None
    steps: int | None = None
    sampler: str | None = None
    fusion: Fusion = "mean"
    uncertainty: Uncertainty = "entropy"
    keep_largest: bool | None = None
    fast: bool = False


@dataclass(frozen=True, eq=False)
class Segmentation:
    """A segmented scan in memory, on the scan's own grid (I, J, K).

    Attributes:
        labels: Class values, (I, J, K) uint8 or int32.
        probabilities: Class probabilities, (K, I, J, K').
        uncertainty: Uncertainty map of the requested kind, (I, J, K).
        members: Labels of every member on the model's grid, (N, *S).
        volumes_ml: Class name -> volume, without background.
        members_ml: Class name -> smallest and largest volume of the members; empty for one member.
        intervals_ml: Class name -> an interval that contains the reference's volume in a share ``level`` of patients
            like the model's calibration patients (`methods.calibration`); empty if the model was not calibrated for
            these options.
        level: 0.95, or less for few calibration patients; None without intervals.
        agreement: Class name -> mean Dice of pairs of members; empty for one member.
        quality: "check" if the members agree less than on 95 of 100 calibration scans of the model, else "usual"; None
            if the model was not calibrated for these options.
        disagreement: Disagreement of the members, one number for the scan (`Ensemble.disagreement`); None for one
            member.
    """

    labels: Tensor
    probabilities: Tensor
    uncertainty: Tensor
    members: Tensor
    volumes_ml: dict[str, float]
    members_ml: dict[str, tuple[float, float]]
    intervals_ml: dict[str, tuple[float, float]]
    level: float | None
    agreement: dict[str, float]
    quality: Quality | None
    disagreement: float | None


class SegmentationModel(Protocol):
    """The interface of a segmenter, which is loaded once for many scans: `MaskSegmenter` or `PixelSegmenter`.

    Attributes:
        saved: The model directory.
        device: Device of the computation.
        dims: 2 for slices, 3 for volumes.
        channels: Number of channels of the scans.
        labels: Label value -> class name, background 0 included.
        preprocessing: Preprocessing of the scans.
        inference: The model's defaults.
        ensemble: Members per scan.
        samplers: Names of the samplers that can be chosen; empty for a model that takes no steps.
        sampler_name: Name of the sampler; empty for a model that takes no steps.
        num_steps: Network calls per sample.
        merge_labels: Whether all labels above 0 were merged into one class for the training.
        aggregation: How members become one segmentation.
        notes: Remarks on the chosen options for the user, one sentence each.
    """

    saved: SavedModel
    device: torch.device
    dims: int
    channels: int
    labels: dict[int, str]
    preprocessing: Preprocessing
    inference: InferenceSection
    ensemble: int
    samplers: tuple[str, ...]
    sampler_name: str
    num_steps: int
    merge_labels: bool
    aggregation: Aggregation
    notes: list[str]

    @property
    def config(self) -> SegmenterConfig | PixelClassifierConfig:
        """Configuration of the training."""
        ...

    @property
    def samples_masks(self) -> bool:
        """Whether masks are sampled, so that the size of the ensemble can be chosen."""
        ...

    def without_x_t(self, replacement: Replacement, seed: int = 0) -> AbstractContextManager[None]:
        """While the context lasts, the denoising network sees a replacement of x_t (`methods.ablation`).

        Raises:
            ValueError: a model without steps.
        """
        ...

    def sample(
        self, volume: Volume, seed: int, on_progress: Callable[[float], None] = ...
    ) -> tuple[Ensemble, Placement]:
        """Sample the ensemble on the model's grid, on the CPU; also return the placement that maps back to the scan."""
        ...

    def segment(self, volume: Volume, seed: int = 0, on_progress: Callable[[float], None] = ...) -> Segmentation:
        """Segment a scan; ``seed`` decides all randomness. ``on_progress`` is called with the share done."""
        ...


@dataclass(frozen=True, eq=False)
class Aggregation:
    """How the members of an ensemble become one segmentation.

    Attributes:
        labels: Label value -> class name.
        fusion: How the members' masks become one: "mean", "majority" or "staple".
        uncertainty: Kind of the uncertainty map.
        largest_part: Whether to keep only the largest connected part of the foreground.
        prior: Shape to which the foreground is restricted, or None.
        prior_mm: Largest distance of the foreground outside the shape.
        calibration: The model's calibration for these options, or None.
    """

    labels: dict[int, str]
    fusion: Fusion = "mean"
    uncertainty: Uncertainty = "entropy"
    largest_part: bool = False
    prior: ShapePrior | None = None
    prior_mm: float | None = None
    calibration: Calibration | None = None

    @property
    def outside(self) -> list[float]:
        """Class probabilities of voxels that the model did not see: certain background."""
        return [1.0] + [0.0] * (len(self.labels) - 1)

    @property
    def foreground(self) -> dict[int, str]:
        """The classes without background."""
        return {value: name for value, name in self.labels.items() if value}

    def combine(self, ensemble: Ensemble, placement: Placement) -> Segmentation:
        """Combine the members into one segmentation. Probabilities, never labels, are mapped to the scan's grid."""
        if (near := self._near_the_shape(ensemble, placement)) is not None:
            ensemble = ensemble.within(near)
        mean = placement.restore(ensemble.mean, self.outside)
        scores = mean if self.fusion == "mean" else placement.restore(ensemble.fuse(self.fusion), self.outside)
        labels = scores.argmax(0).to(torch.uint8 if len(self.labels) <= 256 else torch.int32)
        if self.largest_part:
            dropped = (labels > 0) & ~largest_part(labels)
            labels[dropped] = 0
            mean[:, dropped] = torch.tensor(self.outside)[:, None]
            # All following numbers are computed after this restriction.
            coarse = ensemble.mean.argmax(0)
            ensemble = ensemble.within((coarse == 0) | largest_part(coarse))
        counts = np.bincount(labels.numpy().ravel(), minlength=len(self.labels))
        voxel_ml = _voxel_ml(placement.native_affine)
        volumes = {name: float(counts[value] * voxel_ml) for value, name in self.foreground.items()}
        position_ml = _voxel_ml(placement.affine)
        intervals = self._intervals(volumes, voxel_ml)
        if self.calibration is not None:  # changes no label, so it may follow the choice of the largest class
            mean = temperature_scaled(mean, self.calibration.temperature)
        kind, several = self.uncertainty, len(ensemble) > 1
        uncertain = entropy(mean) if kind == "entropy" else placement.restore(ensemble.uncertainty(kind)[None])[0]
        agreement = self._agreement(ensemble) if several else {}
        return Segmentation(
            labels=labels,
            probabilities=mean,
            uncertainty=uncertain,
            members=ensemble.labels,
            volumes_ml=volumes,
            members_ml=self._ranges(ensemble, position_ml) if several else {},
            intervals_ml=intervals,
            level=self.calibration.level if self.calibration is not None and intervals else None,
            agreement=agreement,
            quality=self._quality(agreement),
            disagreement=ensemble.disagreement if several else None,
        )

    def members_on_scan(self, segmentation: Segmentation, placement: Placement) -> Tensor:
        """Masks of all members on the scan's grid, (N, I, J, K), with the data type of ``segmentation.labels``."""
        classes = len(self.labels)
        masks = [
            placement.restore(F.one_hot(member.long(), classes).movedim(-1, 0).float(), self.outside).argmax(0)
            for member in segmentation.members
        ]
        return torch.stack(masks).to(segmentation.labels.dtype)

    def _near_the_shape(self, ensemble: Ensemble, placement: Placement) -> Tensor | None:
        if self.prior is None or self.prior_mm is None:
            return None
        return self.prior.near(ensemble.mean.argmax(0) > 0, placement.spacing, self.prior_mm)

    def _intervals(self, volumes_ml: dict[str, float], voxel_ml: float) -> dict[str, tuple[float, float]]:
        if self.calibration is None:
            return {}
        return {
            name: self.calibration.volume_interval(value, volumes_ml[name], voxel_ml)
            for value, name in self.foreground.items()
        }

    def _ranges(self, ensemble: Ensemble, position_ml: float) -> dict[str, tuple[float, float]]:
        volumes = ensemble.volumes_ml(1000 * position_ml)
        low, high = volumes.min(0).values, volumes.max(0).values
        return {name: (float(low[value]), float(high[value])) for value, name in self.foreground.items()}

    def _agreement(self, ensemble: Ensemble) -> dict[str, float]:
        dice = ensemble.pairwise_dice()
        return {name: float(dice[value - 1]) for value, name in self.foreground.items()}

    def _quality(self, agreement: dict[str, float]) -> Quality | None:
        if self.calibration is None or self.calibration.agreement is None or not agreement:
            return None
        defined = [dice for dice in agreement.values() if dice == dice]
        if not defined:  # all members have an empty mask: they agree on nothing
            return "check"
        return "usual" if sum(defined) / len(defined) >= self.calibration.agreement else "check"


def stored_calibration(saved: SavedModel) -> Calibration | None:
    """The calibration in a model's card.

    Calibrations with one temperature for each ensemble size are of the cases that chose the weights. They are not used.

    Raises:
        ModelError: A calibration of another version.
    """
    content = saved.card.get("calibration")
    if content is None or "temperatures" in content:
        return None
    try:
        return Calibration(**content)
    except TypeError as error:
        raise ModelError(f"{saved.path}: its calibration is of another version; train it again") from error


@dataclass(frozen=True)
class Pass:
    """How an image is sampled: model, sampler, times, windows and precision."""

    sampler: Sampler
    times: Sequence[int]
    windows: Windows
    dims: int
    precision: Precision

    def members(
        self, model: Segmenter, image: Tensor, seeds: Sequence[int], device: torch.device, on_batch: Callable[[], None]
    ) -> Tensor:
        """Sample class probabilities (N, K, I, J, K') of ``image`` (C, I, J, K') for N seeds, float32 on the CPU."""
        dtype = autocast_dtype(device, self.precision)
        context: Any = torch.autocast(device.type, dtype) if dtype else nullcontext()
        with torch.no_grad(), context:
            probabilities = segment(
                model, image.to(device), seeds, self.sampler, self.times, self.windows, self.dims, on_batch
            )
        return probabilities.float().cpu()


def counter(total: int, on_progress: Callable[[float], None]) -> Callable[[], None]:
    """Make a function that counts its calls and reports their share of ``total`` to ``on_progress``."""
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        on_progress(min(1.0, done / total))

    return count


def _voxel_ml(affine: np.ndarray) -> float:
    return abs(float(np.linalg.det(affine[:3, :3]))) / 1000
