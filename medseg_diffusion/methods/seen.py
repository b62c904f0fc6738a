"""What a model has seen in training, and in what a scan, or the mask on it, is unlike that.

A network answers whatever it is shown. So a model stores what its training scans measured: voxel sizes, field of view,
the distribution of intensities after its own preprocessing, and of every class the volume, the share of the image and
the contrast with other classes. What a further scan measures is compared with these ranges.

A range is that of the training scans from the 1st to the 99th percentile, so that one odd scan among many does not
widen it. The extremes of a few scans are no border: among 15 scans alike, every eighth further one is beyond the
smallest or the largest. A scan is therefore only unlike if it lies beyond a margin as well:

* voxel size and field of view, or the number of pixels: a factor of `LENGTH_FACTOR`;
* volume and share of a class: a factor of `VOLUME_FACTOR`, or the square root of largest to smallest if that is more;
* intensities: half of the range and `INTENSITY_MARGIN`, on the model's scale, where most of a scan is within -1 and 1;
* contrast: the inner fence, 1.5 times the quartiles' distance below the first quartile, has the margin in it; classes
  that differ in a share `ENOUGH_CONTRAST` of voxels raise no doubt.

Contrast is how often a voxel of one class is brighter than one of another class (the area under the ROC curve). It
depends on no unit, window or curve of the intensities. It tells T1 from FLAIR, whose histograms overlap: a model of T1
finds grey and white matter on FLAIR, but with little contrast.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from medseg_diffusion.volumes.volume import FloatArray, Shape, orientation_transform, spacing_of

SEEN = "seen"
"""Key of a model's card: the entry that `Seen.entry` makes."""
UNLIKE = "unlike the training scans: "
"""How a `sentence` about doubts begins."""
FEWEST_SCANS = 5
"""Fewer scans tell no range."""
LENGTH_FACTOR, VOLUME_FACTOR, INTENSITY_MARGIN = 1.5, 2.0, 0.1
LARGEST_CLASSES = 6
"""Contrast is measured between so many classes, the largest ones: pairs of 30 classes would be 435."""
ENOUGH_CONTRAST = 0.9
LEAST_CONTRAST = 0.7
"""Classes with less contrast in some training scans are not expected to have any."""
_SAMPLED = 200_000  # voxels of an image for its quantiles
_SAMPLED_OF_CLASS, _FEWEST_OF_CLASS = 4000, 20
_INTENSITIES = {
    "lowest": "the lowest value in a share of {:.2f}{}",
    "q10": "10th percentile {:.2f}{} on the model's scale",
    "q25": "25th percentile {:.2f}{} on the model's scale",
    "q50": "median {:.2f}{} on the model's scale",
    "q75": "75th percentile {:.2f}{} on the model's scale",
    "q90": "90th percentile {:.2f}{} on the model's scale",
}

Range = tuple[float, float]


@dataclass(frozen=True)
class MeasuredMask:
    """What a mask measures.

    Attributes:
        volume_ml: class -> volume; empty for an image without a voxel size.
        image_share: class -> share of the voxels of the model's grid.
        contrast: class -> other class -> how often a voxel of the first is brighter than one of the other.
    """

    volume_ml: Mapping[str, float]
    image_share: Mapping[str, float]
    contrast: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class MeasuredScan:
    """What a scan measures.

    Attributes:
        voxel_mm: axis -> voxel size of the scan's own grid; empty for an image without one.
        field_of_view_mm: axis -> size of the scan; empty for an image without a voxel size.
        pixels: axis -> number of pixels of an image without a voxel size; empty for all others.
        intensity: for each channel, name -> statistic of the preprocessed image.
        masks: the masks of all readers.
    """

    voxel_mm: Mapping[str, float]
    field_of_view_mm: Mapping[str, float]
    intensity: Sequence[Mapping[str, float]]
    masks: Sequence[MeasuredMask] = ()
    pixels: Mapping[str, float] = field(default_factory=dict)


def measured_scan(
    image: Tensor, shape: Shape, affine: FloatArray | None, orientation: str | None, dims: int
) -> MeasuredScan:
    """Measure a scan.

    Args:
        image: (C, *S) preprocessed intensities.
        shape: sizes of the scan's own grid.
        affine: (4, 4) voxel -> RAS mm of that grid; None for an image without a voxel size.
        orientation: the axes of the model, such as "RAS"; None for those of the scan.
        dims: 2 for a model of slices, which does not see their distance and their number; 3 for one of volumes.
    """
    intensity = [_intensity(channel) for channel in image]
    if affine is None:
        return MeasuredScan({}, {}, intensity, pixels={f"axis {i}": n for i, n in enumerate(shape[:dims], 1)})
    return MeasuredScan(*lengths(shape, affine, orientation, dims), intensity)


def lengths(
    shape: Shape, affine: FloatArray, orientation: str | None, dims: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Axis -> voxel size, and axis -> size of a grid, in mm along the model's axes; without axes of a single voxel."""
    spacing = spacing_of(affine)
    order, names = [0, 1, 2], ["axis 1", "axis 2", "axis 3"]
    if orientation is not None:
        order, names = np.argsort(orientation_transform(affine, orientation)[:, 0]).tolist(), list(orientation)
    axes = [(name, axis) for name, axis in zip(names[:dims], order, strict=False) if shape[axis] > 1]
    return {name: spacing[axis] for name, axis in axes}, {name: spacing[axis] * shape[axis] for name, axis in axes}


def measured_mask(labels: Tensor, image: Tensor, names: Mapping[int, str], voxel_ml: float | None) -> MeasuredMask:
    """Measure a mask (*S) on the model's grid.

    Args:
        labels: class values.
        image: (C, *S) preprocessed intensities; the first channel tells the contrast.
        names: value -> name of the class, without background.
        voxel_ml: volume of a voxel; None without a voxel size.
    """
    counts = torch.bincount(labels.flatten(), minlength=max(names, default=0) + 1).tolist()
    volumes = {} if voxel_ml is None else {name: counts[value] * voxel_ml for value, name in names.items()}
    shares = {name: counts[value] / labels.numel() for value, name in names.items()}
    return MeasuredMask(volumes, shares, contrast(labels, image[0], names))


def _intensity(channel: Tensor) -> dict[str, float]:
    flat = channel.flatten()
    sample = flat[:: _step(len(flat), _SAMPLED)].float().cpu().numpy().astype(np.float64)
    quantiles = np.quantile(sample, [0.1, 0.25, 0.5, 0.75, 0.9]).tolist()
    lowest = float(np.mean(sample <= float(flat.min()) + 1e-4))
    return dict(zip(_INTENSITIES, (lowest, *quantiles), strict=True))


def _step(size: int, count: int) -> int:
    """A step that leaves about ``count`` of ``size`` voxels, and visits every place along every axis."""
    step = max(1, size // count)
    while math.gcd(step, size) > 1:
        step += 1
    return step


def contrast(labels: Tensor, image: Tensor, names: Mapping[int, str]) -> dict[str, dict[str, float]]:
    """Class -> other class -> how often a voxel of the first is brighter; between the `LARGEST_CLASSES` of a mask.

    Args:
        labels: (*S) class values.
        image: (*S) intensities of one channel.
        names: value -> name of the class, without background.
    """
    counts = torch.bincount(labels.flatten(), minlength=max(names, default=0) + 1).tolist()
    largest = sorted((value for value in names if counts[value] >= _FEWEST_OF_CLASS), key=lambda value: -counts[value])
    sampled: dict[int, npt.NDArray[np.float64]] = {}
    flat_labels, intensities = labels.flatten(), image.flatten()
    for value in sorted(largest[:LARGEST_CLASSES]):
        places = (flat_labels == value).nonzero()[:, 0]  # along one axis: 8 bytes a voxel, not 24
        chosen = places[:: _step(len(places), _SAMPLED_OF_CLASS)]
        sampled[value] = np.sort(intensities[chosen].double().cpu().numpy())
    contrasts: dict[str, dict[str, float]] = {}
    for one in sampled:
        for other in sampled:
            if one < other:
                share = _brighter(sampled[one], sampled[other])
                contrasts.setdefault(names[one], {})[names[other]] = share
                contrasts.setdefault(names[other], {})[names[one]] = 1 - share
    return contrasts


def _brighter(one: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> float:
    """How often a value of ``one`` is above one of ``other``, both sorted; of equal values, half are."""
    below = np.searchsorted(other, one, "left") + np.searchsorted(other, one, "right")
    return float(below.mean() / 2 / len(other))


@dataclass(frozen=True)
class Seen:
    """The ranges of what a model's training scans measured; what is empty was not measured and is not compared.

    Attributes:
        scans: number of scans.
        voxel_mm, field_of_view_mm, pixels: axis -> range.
        intensity: for each channel, name -> range.
        volume_ml, image_share: class -> range.
        contrast: class -> darker class -> inner fence and largest value of how often a voxel is brighter.
    """

    scans: int
    voxel_mm: Mapping[str, Range] = field(default_factory=dict)
    field_of_view_mm: Mapping[str, Range] = field(default_factory=dict)
    intensity: Sequence[Mapping[str, Range]] = ()
    volume_ml: Mapping[str, Range] = field(default_factory=dict)
    image_share: Mapping[str, Range] = field(default_factory=dict)
    contrast: Mapping[str, Mapping[str, Range]] = field(default_factory=dict)
    pixels: Mapping[str, Range] = field(default_factory=dict)

    @classmethod
    def of(cls, scans: Sequence[MeasuredScan]) -> Self | None:
        """The ranges of scans; None for fewer than `FEWEST_SCANS`."""
        if len(scans) < FEWEST_SCANS:
            return None
        masks = [mask for scan in scans for mask in scan.masks]
        pairs = {(one, other) for mask in masks for one, others in mask.contrast.items() for other in others}
        contrast: dict[str, dict[str, Range]] = {}
        for one, other in sorted(pairs):
            values = [mask.contrast[one][other] for mask in masks if other in mask.contrast.get(one, {})]
            q1, q3 = np.quantile(values, [0.25, 0.75]).tolist()
            fence = min(q1 - 1.5 * (q3 - q1), ENOUGH_CONTRAST)
            if len(values) >= max(FEWEST_SCANS, len(masks) / 2) and fence >= LEAST_CONTRAST:
                contrast.setdefault(one, {})[other] = _rounded(fence, max(values))
        return cls(
            len(scans),
            _ranges([scan.voxel_mm for scan in scans]),
            _ranges([scan.field_of_view_mm for scan in scans]),
            [_ranges(channel) for channel in zip(*(scan.intensity for scan in scans), strict=True)],
            _ranges([mask.volume_ml for mask in masks]),
            _ranges([mask.image_share for mask in masks]),
            contrast,
            _ranges([scan.pixels for scan in scans]),
        )

    def entry(self) -> dict[str, Any]:
        """The entry `SEEN` of a card, of plain numbers; docs/reference/files.md describes it."""
        classes = {
            name: {
                **({"volume_ml": list(self.volume_ml[name])} if name in self.volume_ml else {}),
                "image_share": list(share),
            }
            for name, share in self.image_share.items()
        }
        content = {
            "voxel_mm": _lists(self.voxel_mm),
            "field_of_view_mm": _lists(self.field_of_view_mm),
            "pixels": _lists(self.pixels),
            "intensity": [_lists(channel) for channel in self.intensity],
            "classes": classes,
            "brighter": {name: _lists(others) for name, others in self.contrast.items()},
        }
        return {"scans": self.scans, **{name: value for name, value in content.items() if value}}

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any]) -> Self:
        """The ranges of an entry.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: another content.
        """
        classes = {str(name): one for name, one in entry.get("classes", {}).items()}
        return cls(
            int(entry["scans"]),
            _pairs(entry.get("voxel_mm", {})),
            _pairs(entry.get("field_of_view_mm", {})),
            [_pairs(channel) for channel in entry.get("intensity", [])],
            _pairs({name: one["volume_ml"] for name, one in classes.items() if "volume_ml" in one}),
            _pairs({name: one["image_share"] for name, one in classes.items()}),
            {str(name): _pairs(others) for name, others in entry.get("brighter", {}).items()},
            _pairs(entry.get("pixels", {})),
        )

    def doubts_of_scan(self, scan: MeasuredScan) -> list[str]:
        """In what a scan is unlike the training scans: at most one phrase each on voxels, size and intensities."""
        return [
            *_lengths_beyond("voxels of {:.3g} mm along {}", self.voxel_mm, scan.voxel_mm),
            *_lengths_beyond("a field of view of {:.0f} mm along {}", self.field_of_view_mm, scan.field_of_view_mm),
            *_lengths_beyond("{:.0f} pixels along {}", self.pixels, scan.pixels, "pixels"),
            *self._intensities_beyond(scan),
        ]

    def doubts_of_mask(self, mask: MeasuredMask) -> list[str]:
        """In what a mask is unlike the references: at most one phrase each on volumes and contrast.

        Shares of the image are compared where there are no volumes.
        """
        by_volume = bool(mask.volume_ml and self.volume_ml)
        measured, seen = (mask.volume_ml, self.volume_ml) if by_volume else (mask.image_share, self.image_share)
        if not any(measured.values()):
            return ["an empty mask (no training scan had one)"] if any(low > 0 for low, _ in seen.values()) else []
        unit, scale = ("ml", 1.0) if by_volume else ("% of the image", 100.0)
        doubts = {
            f"{name} of {_short(scale * measured[name])} {unit} (trained on {_between(one, scale, unit)})": by
            for name, one in seen.items()
            if name in measured and (by := _times_beyond(measured[name], one, _factor(one))) > 1
        }
        return [*_worst(doubts), *_worst(self._contrast_below(mask))]

    def _intensities_beyond(self, scan: MeasuredScan) -> list[str]:
        doubts: dict[str, float] = {}
        for number, (seen, measured) in enumerate(zip(self.intensity, scan.intensity, strict=False), 1):
            of = f" of channel {number}" if len(self.intensity) > 1 else ""
            for name, (low, high) in seen.items():
                margin = (high - low) / 2 + INTENSITY_MARGIN
                beyond = max(low - measured[name], measured[name] - high) / margin
                if beyond > 1:
                    what = f"other intensities: {_INTENSITIES[name].format(measured[name], of)}"
                    doubts[f"{what} (trained on {low:.2f} to {high:.2f})"] = beyond
        return _worst(doubts)

    def _contrast_below(self, mask: MeasuredMask) -> dict[str, float]:
        doubts = {}
        for one, others in self.contrast.items():
            for other, (low, high) in others.items():
                share = mask.contrast.get(one, {}).get(other, 1.0)
                if share < low:
                    what = f"{one} brighter than {other} in only {100 * share:.0f} % of pairs of voxels"
                    doubts[f"{what} (trained on {100 * low:.0f} to {100 * high:.0f} %)"] = low - share
        return doubts


def sentence(doubts: Sequence[str], withheld: str = "") -> str:
    """One sentence of all doubts, and of what is ``withheld`` because of them; empty without doubts."""
    return UNLIKE + "; ".join([*doubts, *([withheld] if withheld else [])]) if doubts else ""


def _ranges(values: Sequence[Mapping[str, float]]) -> dict[str, Range]:
    """Name -> 1st and 99th percentile of the values that all have; of few values, nearly the extremes."""
    names = [name for name in values[0] if all(name in one for one in values)] if values else []
    ends = {name: np.quantile([one[name] for one in values], [0.01, 0.99]).tolist() for name in names}
    return {name: _rounded(low, high) for name, (low, high) in ends.items()}


def _rounded(low: float, high: float) -> Range:
    return float(f"{low:.4g}"), float(f"{high:.4g}")


def _lists(ranges: Mapping[str, Range]) -> dict[str, list[float]]:
    return {name: list(ends) for name, ends in ranges.items()}


def _pairs(entry: Mapping[str, Sequence[float]]) -> dict[str, Range]:
    return {str(name): (float(low), float(high)) for name, (low, high) in entry.items()}


def _times_beyond(value: float, ends: Range, factor: float) -> float:
    """By how many times ``factor`` a value lies beyond a range, as an exponent: above 1 it is outside."""
    low, high = ends
    ratio = max(low / value if value > 0 else math.inf if low > 0 else 0.0, value / high if high > 0 else 0.0, 1.0)
    return math.log(ratio) / math.log(factor)


def _factor(ends: Range) -> float:
    low, high = ends
    return max(VOLUME_FACTOR, math.sqrt(high / low)) if low > 0 else VOLUME_FACTOR


def _lengths_beyond(what: str, seen: Mapping[str, Range], measured: Mapping[str, float], unit: str = "mm") -> list[str]:
    doubts = {
        f"{what.format(measured[axis], axis)} (trained on {_between(ends, 1.0, unit)})": by
        for axis, ends in seen.items()
        if axis in measured and (by := _times_beyond(measured[axis], ends, LENGTH_FACTOR)) > 1
    }
    return _worst(doubts)


def _worst(doubts: Mapping[str, float]) -> list[str]:
    return [max(doubts, key=lambda phrase: doubts[phrase])] if doubts else []


def _between(ends: Range, scale: float, unit: str) -> str:
    low, high = (_short(scale * end) for end in ends)
    return f"{low} {unit}" if low == high else f"{low} to {high} {unit}"


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.2g}" if abs(value) < 10 else f"{value:.3g}"
