"""The interface of all segmenters, and how the members of an ensemble become one segmentation on the scan's grid."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from medseg_diffusion.config.pixel_classifier import PixelClassifierConfig
from medseg_diffusion.config.segmenter import SegmenterConfig
from medseg_diffusion.config.shared import InferenceSection
from medseg_diffusion.errors import ModelError
from medseg_diffusion.methods.ablation import Replacement
from medseg_diffusion.methods.calibration import Calibration
from medseg_diffusion.methods.ensemble import (
    Ensemble,
    Fusion,
    Members,
    Uncertainty,
    entropy,
    in_order,
    largest_part,
    most_probable,
    temperature_scaled,
)
from medseg_diffusion.methods.shape_prior import ShapePrior
from medseg_diffusion.volumes.preprocessing import Placement, Preprocessing, Where
from medseg_diffusion.volumes.resample import Part
from medseg_diffusion.volumes.volume import Volume

from .passes import Slabs
from .store import SavedModel

NOT_FASTER = "--fast changes nothing: this model has no setting with fewer steps or masks"
"""Note on the option ``fast``."""

Map = Literal["probabilities", "uncertainty", "mutual-information"]
"""A map on the scan's grid, which is only made if it is asked for: large scans of many classes have large maps."""
Quality = Literal["usual", "check"]
Number = TypeVar("Number")


@dataclass(frozen=True)
class EnsembleOptions:
    """How many masks are sampled, and how they become one; None takes the model's default.

    Attributes:
        ensemble: Number of sampled masks.
        steps: Steps of the sampler.
        sampler: "ddpm", "ddim", "dpm++", "euler" or "heun".
        fusion: "mean", "majority" or "staple" (`Ensemble.fuse`).
        uncertainty: Kind of the uncertainty map (`Ensemble.uncertainty`).
        keep_largest: Whether only the largest connected part of the foreground is kept.
        fast: One step and one mask instead of the model's defaults, as far as the model has both.
        tissues: Tissues instead of the model's classes, as its card groups them (`classes.tissues_of`).
    """

    ensemble: int | None = None
    steps: int | None = None
    sampler: str | None = None
    fusion: Fusion = "mean"
    uncertainty: Uncertainty = "entropy"
    keep_largest: bool | None = None
    fast: bool = False
    tissues: bool = False


@dataclass(frozen=True, eq=False)
class Segmentation:
    """A segmented scan in memory, on the scan's own grid (I, J, K).

    If some of the classes were chosen, labels, probabilities, and all numbers by the name of a class are of these
    alone. They are the same as without the choice. All else tells about the whole segmentation: uncertainty, mutual
    information, members, volumes of all classes, quality, disagreement, and in what it is unlike those of the training.

    Attributes:
        classes: Class value -> name, without background: all of the model's, or the chosen ones.
        labels: Class values, (I, J, K) uint8 or int32; 0 for background and for classes that were not chosen.
        probabilities: Class probabilities, (K, I, J, K'): of everything that is in no class of ``classes``, then of
            each of these by its value. None unless asked for, as the other maps.
        uncertainty: Uncertainty map of the requested kind, (I, J, K).
        mutual_information: Disagreement of the members (`Ensemble.uncertainty`) before any part is dropped, (I, J, K).
        members: Labels of every member on the model's grid, (N, *S), of all classes.
        placement: How the model's grid lies in the scan.
        volumes_ml: Class name -> volume, without background.
        all_volumes_ml: The same of all classes, chosen or not: the whole mask is compared with the training.
        members_ml: Class name -> smallest and largest volume of the members; empty for one member.
        intervals_ml: Class name -> an interval that contains the reference's volume in a share ``level`` of patients
            like the model's calibration patients (`methods.calibration`); empty if the model was not calibrated for
            these options.
        level: 0.95, or less for few calibration patients; None without intervals.
        agreement: Class name -> mean Dice of pairs of members; empty for one member.
        quality: "check" if the scan or the mask is unlike those of the training, or if the members agree less than on
            95 of 100 calibration scans of the model, else "usual"; None if the model was not calibrated for these
            options.
        disagreement: Disagreement of the members, one number for the scan (`Ensemble.disagreement`); None for one
            member.
        unlike_training: In what the scan or the mask is unlike those of the training (`methods.seen`), one sentence;
            empty if nothing is known. Such a scan has no intervals: they hold for scans like those of the calibration.
    """

    classes: dict[int, str]
    labels: Tensor
    probabilities: Tensor | None
    uncertainty: Tensor | None
    mutual_information: Tensor | None
    members: Tensor
    placement: Placement
    volumes_ml: dict[str, float]
    all_volumes_ml: dict[str, float]
    members_ml: dict[str, tuple[float, float]]
    intervals_ml: dict[str, tuple[float, float]]
    level: float | None
    agreement: dict[str, float]
    quality: Quality | None
    disagreement: float | None
    unlike_training: str = ""


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
        num_steps: Steps of the sampler.
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
        """Sample the ensemble on the model's grid; also return the placement that maps back to the scan.

        The probabilities of all classes are in memory at once; `segment` needs much less for large scans.
        """
        ...

    def segment(
        self,
        volume: Volume,
        seed: int = 0,
        on_progress: Callable[[float], None] = ...,
        maps: Collection[Map] = (),
        chosen: Collection[int] | None = None,
    ) -> Segmentation:
        """Segment a scan; ``seed`` decides all randomness. ``on_progress`` is called with the share done.

        ``maps`` are made beside the labels. ``chosen`` are the values of the classes to tell of; None takes all.
        """
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

    def combine(
        self,
        ensemble: Ensemble | Slabs,
        placement: Placement,
        maps: Collection[Map] = (),
        chosen: Collection[int] | None = None,
    ) -> Segmentation:
        """Combine the members into one segmentation, slab by slab, and make the ``maps`` that are asked for.

        Probabilities, never labels, are mapped to the scan's grid.

        The values ``chosen`` restrict what the result tells of (`Segmentation`), after everything was computed: a voxel
        has the class that it has without a choice, the largest part is that of all classes together, and agreement and
        quality are those of the whole segmentation.
        """
        classes = {value: name for value, name in self.foreground.items() if chosen is None or value in chosen}
        slabs = Slabs([ensemble], 0) if isinstance(ensemble, Ensemble) else ensemble
        disagreement: Tensor | None = None  # mutual information before positions are excluded
        if self.prior is not None or self.fusion == "staple":  # they need all of the image
            whole = slabs.joined()
            if (near := self._near_the_shape(whole, placement)) is not None:
                disagreement = whole.uncertainty("mutual-information").cpu() if "mutual-information" in maps else None
                whole = whole.within(near)
            slabs = Slabs([whole], slabs.axis)
        scan = _OnScan(self, placement, maps, slabs.axis, sorted(classes))
        members = scan.fill(slabs)
        mutual: Tensor | None = None
        if "mutual-information" in maps:
            disagreement = members.uncertainty("mutual-information") if disagreement is None else disagreement
            mutual = self._restored(disagreement, placement)
        labels = torch.from_numpy(scan.labels)
        if self.largest_part:
            dropped = (labels > 0) & ~largest_part(labels)
            scan.drop(dropped)
            # All following numbers are computed after this restriction.
            members = members.within((members.best == 0) | largest_part(members.best))
        uncertain = scan.entropy
        if self.uncertainty != "entropy" and "uncertainty" in maps:
            uncertain = self._restored(members.uncertainty(self.uncertainty), placement)
        counts = torch.bincount(in_order(labels[None])[0], minlength=len(self.labels)).tolist()
        voxel_ml = _voxel_ml(placement.native_affine)
        volumes = {name: counts[value] * voxel_ml for value, name in self.foreground.items()}
        intervals = self._intervals(volumes, voxel_ml)
        several = len(members) > 1
        agreement = self._agreement(members) if several else {}
        ranges = self._ranges(members, _voxel_ml(placement.affine)) if several else {}
        scan.keep_only(classes)
        return Segmentation(
            classes=classes,
            labels=labels,
            probabilities=scan.probabilities,
            uncertainty=uncertain,
            mutual_information=mutual,
            members=members.labels,
            placement=placement,
            volumes_ml=_of(classes, volumes),
            all_volumes_ml=volumes,
            members_ml=_of(classes, ranges),
            intervals_ml=_of(classes, intervals),
            level=self.calibration.level if self.calibration is not None and intervals else None,
            agreement=_of(classes, agreement),
            quality=self._quality(agreement),
            disagreement=members.disagreement if several else None,
        )

    def members_on_scan(self, segmentation: Segmentation) -> Tensor:
        """Masks of all members on the scan's grid, (N, I, J, K), with the data type of ``segmentation.labels``.

        They show the classes of the segmentation: all, or the chosen ones.
        """
        classes, placement = len(self.labels), segmentation.placement
        masks = torch.zeros(len(segmentation.members), *placement.native_shape, dtype=segmentation.labels.dtype)
        turned = placement.turned(masks.numpy())
        for member, mask in zip(segmentation.members, turned, strict=True):
            for where, shares in placement.restored(_one_hot(member, classes), 0):
                mask[where] = labels_of(shares).numpy()
            _keep_only(mask, segmentation.classes, classes)
        return masks

    def _restored(self, values: Tensor, placement: Placement) -> Tensor:
        return placement.restore(values[None])[0]

    def _near_the_shape(self, ensemble: Ensemble, placement: Placement) -> Tensor | None:
        if self.prior is None or self.prior_mm is None:
            return None
        near = self.prior.near(most_probable(ensemble.mean).cpu() > 0, placement.spacing, self.prior_mm)
        return None if near is None else near.to(ensemble.mean.device)

    def _intervals(self, volumes_ml: dict[str, float], voxel_ml: float) -> dict[str, tuple[float, float]]:
        if self.calibration is None:
            return {}
        return {
            name: self.calibration.volume_interval(value, volumes_ml[name], voxel_ml)
            for value, name in self.foreground.items()
        }

    def _ranges(self, members: Members, position_ml: float) -> dict[str, tuple[float, float]]:
        volumes = members.volumes_ml(1000 * position_ml)
        low, high = volumes.min(0).values, volumes.max(0).values
        return {name: (float(low[value]), float(high[value])) for value, name in self.foreground.items()}

    def _agreement(self, members: Members) -> dict[str, float]:
        dice = members.pairwise_dice()
        return {name: float(dice[value - 1]) for value, name in self.foreground.items()}

    def _quality(self, agreement: dict[str, float]) -> Quality | None:
        if self.calibration is None or self.calibration.agreement is None or not agreement:
            return None
        defined = [dice for dice in agreement.values() if dice == dice]
        if not defined:  # all members have an empty mask: they agree on nothing
            return "check"
        return "usual" if sum(defined) / len(defined) >= self.calibration.agreement else "check"


class _OnScan:
    """The arrays of a segmentation on the scan's grid, filled slab by slab.

    Attributes:
        labels: (I, J, K) uint8, or int32 for more than 256 classes.
        probabilities: (1 + chosen classes, I, J, K') after the calibration, or None if not asked for. The first are
            those of all that was not chosen.
        entropy: (I, J, K) of the probabilities, or None.
    """

    def __init__(
        self, how: Aggregation, placement: Placement, maps: Collection[Map], axis: int, chosen: list[int]
    ) -> None:
        """For slabs along ``axis``; the labels have the order in which these are contiguous."""
        self.how, self.placement, shape = how, placement, placement.native_shape
        self.chosen = chosen
        certain = self._calibrated(torch.tensor(how.outside)[:, None])  # of voxels outside the crop
        self.labels = np.zeros(shape, np.uint8 if len(how.labels) <= 256 else np.int32, "F" if axis == 2 else "C")
        self.certain, self.probabilities, self.entropy = certain, None, None
        if "probabilities" in maps:
            outside = self._of_chosen(certain)
            self.probabilities = torch.empty(len(outside), *shape)
            for channel, value in zip(self.probabilities, outside.flatten().tolist(), strict=True):
                channel.fill_(value)
        if "uncertainty" in maps and how.uncertainty == "entropy":
            self.entropy = entropy(certain).expand(*shape).clone()

    def fill(self, slabs: Slabs) -> Members:
        """Fill the arrays, and return what remains of the slabs on the model's grid."""
        how, fused = self.how, self.how.fusion != "mean"
        mean_too = fused and (self.probabilities is not None or self.entropy is not None)
        axis, length = slabs.axis, self.placement.shape[slabs.axis]
        rest: Members | None = None

        first = 0

        def scores(slab: Ensemble) -> Tensor:
            nonlocal rest, first
            rest = slab.members(how.uncertainty == "variance").placed(rest, first, axis, length)
            first += slab.labels.shape[axis + 1]
            fused_scores = slab.fuse(how.fusion)
            return torch.cat([fused_scores, slab.mean]) if mean_too else fused_scores

        labels = self.placement.turned(self.labels[None])[0]
        classes = len(how.labels)
        for where, part in self.placement.restored(map(scores, slabs.parts), axis):
            if self.probabilities is None and self.entropy is None:
                labels[where] = labels_of(part).cpu().numpy()
            else:
                values = part.values()
                labels[where] = most_probable(values[:classes]).cpu().numpy()
                self._fill_maps(where, values[-classes:])
                del values
            del part  # the next one needs its memory
        assert rest is not None
        return rest

    def drop(self, dropped: Tensor) -> None:
        """Make voxels certain background."""
        self.labels[dropped.numpy()] = 0
        if self.probabilities is not None:
            self.probabilities[:, dropped] = self._of_chosen(self.certain)
        if self.entropy is not None:
            self.entropy[dropped] = entropy(self.certain)

    def keep_only(self, chosen: Collection[int]) -> None:
        """Make voxels of all other classes background."""
        _keep_only(self.labels, chosen, len(self.how.labels))

    def _of_chosen(self, probabilities: Tensor) -> Tensor:
        """Of probabilities (K, ...) those of the chosen classes, behind the sum of all others."""
        if len(self.chosen) == len(probabilities) - 1:
            return probabilities
        of_chosen = probabilities[self.chosen]
        return torch.cat([(1 - of_chosen.sum(0, keepdim=True)).clamp(min=0), of_chosen])

    def _fill_maps(self, where: Where, mean: Tensor) -> None:
        calibrated = self._calibrated(mean)
        if self.probabilities is not None:
            self.placement.turned(self.probabilities.numpy())[:, *where] = self._of_chosen(calibrated).cpu().numpy()
        if self.entropy is not None:
            self.placement.turned(self.entropy[None].numpy())[0][where] = entropy(calibrated).cpu().numpy()

    def _calibrated(self, probabilities: Tensor) -> Tensor:
        calibration = self.how.calibration
        # It changes no label, so it may follow the choice of the largest class.
        return probabilities if calibration is None else temperature_scaled(probabilities, calibration.temperature)


def labels_of(part: Part) -> Tensor:
    """The class with the largest score, uint8 or int32, of resampled scores; those that cannot be largest are left out.

    The largest of K scores is at least a K-th of their sum. So a class is interpolated only around voxels where it has
    that much, and the background only where another class has.
    """
    scores = part.data
    if scores.device.type != "cpu" or part.shape == tuple(scores.shape[1:]):
        return most_probable(part.values())
    least = float(scores.sum(0).min()) / len(scores) - 1e-4  # more than rounding
    boxes = {value: part.reach(scores[value] >= least) for value in range(1, len(scores))}
    reached = {value: box for value, box in boxes.items() if box is not None}
    labels = torch.zeros(part.shape, dtype=torch.uint8 if len(scores) <= 256 else torch.int32)
    if not reached:
        return labels
    ends = [[(box[axis].start, box[axis].stop) for box in reached.values()] for axis in range(3)]
    union = [slice(min(start for start, _ in one), max(stop for _, stop in one)) for one in ends]
    within, best = labels[tuple(union)].numpy(), part.within(union, 0).numpy().copy()
    for value, box in reached.items():
        own = tuple(
            slice(side.start - whole.start, side.stop - whole.start) for side, whole in zip(box, union, strict=True)
        )
        score = part.within(box, value).numpy()
        np.copyto(within[own], value, where=score > best[own], casting="unsafe")
        np.maximum(best[own], score, out=best[own])
    return labels


def _keep_only(labels: np.ndarray, chosen: Collection[int], classes: int) -> None:
    """Set labels (I, J, K), 0 to ``classes`` - 1, to 0 where they are not chosen."""
    dropped = np.ones(classes, bool)
    dropped[[0, *chosen]] = False
    if dropped.any():
        # Plane by plane as they lie in memory: numpy makes 8 bytes of every label by which it indexes.
        for plane in np.moveaxis(labels, int(np.argmax(labels.strides)), 0):
            plane[dropped[plane]] = 0


def _of(classes: Mapping[int, str], numbers: Mapping[str, Number]) -> dict[str, Number]:
    """The numbers of these classes, by name."""
    return {name: numbers[name] for name in classes.values() if name in numbers}


def _one_hot(labels: Tensor, classes: int) -> Iterator[Tensor]:
    """Float masks (K, 1, ...) of the classes, plane by plane of the first axis."""
    for plane in labels.split(1):
        yield torch.stack([(plane == value).float() for value in range(classes)])


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


def _voxel_ml(affine: np.ndarray) -> float:
    return abs(float(np.linalg.det(affine[:3, :3]))) / 1000
