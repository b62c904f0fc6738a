"""Maps scans to a model's grid and intensity range, and maps results back to the scan's grid."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import nibabel as nib
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from medseg_diffusion.errors import InputError

from .resample import Part, resample, resample_slabs, same_directions, sized_grid, spacing_grid, straight_grid
from .volume import FloatArray, Shape, Volume, orientation_transform, reorient, spacing_of

Box = tuple[tuple[int, int], ...]  # first and one past the last voxel of each of the three axes
Where = tuple[slice, ...]  # the same, to index arrays with

Intensity = Literal["percentile", "zscore", "median"]

_COARSE_MM = 4.0  # voxel size of the search for the head
_HEAD_PART_MM3 = 1000.0  # components up to this size are noise or dirt, not head
_HEAD_MARGIN_MM = 10.0
_MEDIAN = -0.3  # intensity to which "median" maps the foreground's median
_MOST_ENLARGED = 512  # voxels of the model's grid for each of the scan's
_MOST_VOXELS = 2**28  # on the model's grid; more is a header in another unit, and would not fit into memory
RESTORED_AT_ONCE = 2**24
"""Largest number of values that `Placement.restored` makes at once (64 MB), unless a plane has more."""
_SCALED_AT_ONCE = 2**17  # voxels that are scaled in float64 at once: 1 MB, in the caches
_FEW = 0.01  # if fewer voxels than this share are above the minimum, statistics are taken from all voxels


@dataclass(frozen=True, eq=False)
class Placement:
    """How a model's grid lies in a scan. `Preprocessing.apply` makes it; it maps results back to the scan.

    Attributes:
        native_shape: sizes of the scan's grid.
        native_affine: (4, 4) voxel -> RAS mm of the scan.
        transform: (3, 2) axis moves and flips from the scan to the model's orientation (`volume.reorient`).
        box: the part of the scan that was not cropped away, in voxels after `transform`.
        box_affine: (4, 4) voxel -> RAS mm of the box.
        shape: sizes of the model's grid.
        affine: (4, 4) voxel -> RAS mm of the model's grid.
    """

    native_shape: Shape
    native_affine: FloatArray
    transform: npt.NDArray[np.int64]
    box: Box
    box_affine: FloatArray
    shape: Shape
    affine: FloatArray

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size of the model's grid in millimetres."""
        return spacing_of(self.affine)

    def require_grid_of(self, labels: Volume) -> None:
        """InputError for labels on another grid than the scan."""
        scan = torch.empty(1).expand(1, *self.native_shape)
        Volume(scan, self.native_affine).require_same_grid(labels)

    def leaves_out(self, labels: Volume) -> bool:
        """Whether labels (1, I, J, K) on the scan's grid mark voxels beyond the part that was not cropped away."""
        inside = _cut(reorient(labels.data, self.transform), self.box)
        return bool(inside.count_nonzero() < labels.data.count_nonzero())

    def forward(self, data: Tensor) -> Tensor:
        """Map data from the scan's grid to the model's grid by linear interpolation.

        Where the model's grid is coarser, the data is smoothed first (`resample`).

        Args:
            data: (C, I, J, K) on the scan's grid.

        Returns:
            (C, *S) on the model's grid; floating point if the voxel size changes, else of the same type.
        """
        if tuple(data.shape[1:]) != self.native_shape:
            raise ValueError(f"data of shape {tuple(data.shape)} is not on the scan's grid {self.native_shape}")
        part = _cut(reorient(data, self.transform), self.box)
        return resample(part, self.box_affine, self.affine, self.shape)

    def restore(self, data: Tensor, outside: float | Sequence[float] = 0.0) -> Tensor:
        """Map class probabilities or other maps back to the scan's grid. Take the argmax afterwards, not before.

        Linear interpolation; bit-exact where the voxel size was not changed.

        Args:
            data: (C, *S) on the model's grid.
            outside: value, or one value per channel, outside the crop. For class probabilities, use 1 for the
                background and 0 for the other classes.

        Returns:
            (C, I, J, K), the scan's own shape, floating point.

        Raises:
            ValueError: data on another grid, or a number of outside values that is not the number of channels.
        """
        if data.ndim != 4 or tuple(data.shape[1:]) != self.shape:
            raise ValueError(f"data of shape {tuple(data.shape)} is not on the model's grid {self.shape}")
        fill = [outside] * len(data) if isinstance(outside, int | float) else list(outside)
        if len(fill) != len(data):
            raise ValueError(f"{len(fill)} outside values were given for {len(data)} channels")
        if not data.is_floating_point():
            data = data.float()
        result = torch.empty((len(data), *self.native_shape), dtype=data.dtype)
        if math.prod(self.native_shape) > math.prod(stop - start for start, stop in self.box):
            for channel, value in zip(result, fill, strict=True):
                channel.fill_(value)
        whole = self.turned(result.numpy())
        for where, part in self.restored([data], 0):
            whole[:, *where] = part.values().cpu().numpy()
        return result.to(data.device)

    def restored(self, slabs: Iterable[Tensor], axis: int) -> Iterator[tuple[Where, Part]]:
        """`restore` of data that comes in slabs, to slabs, so that large scans of many classes fit into memory.

        The numbers are those of `restore`, bit for bit, however thick the slabs are.

        Args:
            slabs: consecutive parts (C, ...) of data on the model's grid along ``axis``, floating point.
            axis: 0, 1 or 2.

        Yields:
            The place of each part in arrays that were `turned`, and the part. The parts cover the crop; beyond it,
            nothing is yielded. If the model saw a straightened grid, all of it is one part.
        """
        i, j, k = (stop - start for start, stop in self.box)
        if not same_directions(self.affine, self.box_affine, (i, j, k)):
            whole = torch.cat(list(slabs), axis + 1)
            values = resample(whole, self.affine, self.box_affine, (i, j, k))
            yield tuple(slice(start, stop) for start, stop in self.box), Part.of(values)
            return
        parts = resample_slabs(slabs, axis, self.shape, self.affine, self.box_affine, (i, j, k), RESTORED_AT_ONCE)
        for first, part in parts:
            where = [slice(start, stop) for start, stop in self.box]
            begin = self.box[axis][0] + first
            where[axis] = slice(begin, begin + part.shape[axis])
            yield tuple(where), part
            del part  # the next one needs its memory

    def turned(self, array: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        """A view of an array (C, I, J, K) on the scan's grid whose last three axes are those of the model's grid."""
        order = [int(axis) + 1 for axis in np.argsort(self.transform[:, 0])]
        flipped = tuple(axis + 1 for axis in range(3) if self.transform[axis, 1] < 0)
        return np.flip(array, flipped).transpose(0, *order)


@dataclass(frozen=True)
class Preprocessing:
    """What is done to a scan before a model sees it.

    Attributes:
        orientation: direction of the axes, such as "RAS"; None leaves them.
        spacing_mm: voxel size along those axes; None leaves it.
        intensity: how intensities are scaled. No choice depends on the scan's unit or offset.
            "percentile" maps the low and high percentile to -1 and 1 and bends values beyond them into [-1.5, 1.5].
            "zscore" gives mean 0 and standard deviation 1. Both use only voxels above the minimum, which is the
            background of most scans.
            "median" maps the low percentile of all voxels to -1 and the median of the foreground
            (`medseg_diffusion.volumes.foreground`) to -0.3, and bends as well. A lesion's brightness then depends
            neither on the air around the head nor on the fat of the scalp.
        low: lower percentile, 0 to 100.
        high: upper percentile, 0 to 100; only for "percentile".
        crop_foreground: crop the air around the head, with a margin of 10 mm.
        crop_centre: keep only the middle of the first two axes, at most this many voxels, for slices whose object is in
            the middle. Intensities are scaled by the whole scan.
        size: resize the first two axes to these sides, without keeping the aspect ratio. It is meant for photographs,
            which have no voxel size, and cannot be combined with ``spacing_mm``.
        square_pixels: resample the coarser of the first two axes to the finer one, for slices that are later resized as
            pictures with square pixels (`volumes.fitting`). ``spacing_mm`` and ``size`` take precedence.
    """

    orientation: str | None = "RAS"
    spacing_mm: tuple[float, float, float] | None = None
    intensity: Intensity = "percentile"
    low: float = 0.5
    high: float = 99.5
    crop_foreground: bool = False
    crop_centre: tuple[int, int] | None = None
    size: tuple[int, int] | None = None
    square_pixels: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 100:
            raise ValueError(f"percentiles must satisfy 0 <= low < high <= 100, got {self.low} and {self.high}")
        if self.size is not None and (self.spacing_mm is not None or min(self.size) < 1):
            raise ValueError(f"size must be two positive numbers, without spacing_mm; got {self.size}")
        if self.crop_centre is not None and (self.crop_foreground or min(self.crop_centre) < 1):
            raise ValueError(
                f"crop_centre must be two positive numbers, without crop_foreground; got {self.crop_centre}"
            )
        if self.intensity not in get_args(Intensity):
            raise ValueError(f"intensity must be one of {', '.join(get_args(Intensity))}, got {self.intensity!r}")

    def apply(self, volume: Volume, box: Box | None = None) -> tuple[Tensor, Placement]:
        """Orient, crop, resample and scale a scan, each channel by its own intensities.

        Args:
            volume: the scan, (C, I, J, K).
            box: part of the oriented scan to crop, instead of ``crop_foreground``; intensities are scaled by it.

        Returns:
            (C, *S) float32 on the model's grid, and the `Placement` that maps results back.

        Raises:
            InputError: voxels that would become too many of the model's.
            ValueError: a box beside ``crop_centre``, which crops as well.
        """
        if box is not None and self.crop_centre is not None:
            raise ValueError("crop_centre crops the whole scan, so no box can be given")
        transform = orientation_transform(volume.affine, self.orientation or volume.axcodes)
        affine = volume.affine @ nib.orientations.inv_ornt_aff(transform, volume.shape)
        data = reorient(volume.data, transform).float()
        x, y, _ = spacing_of(affine)
        body = None
        if self.intensity == "median":
            # Imported here, as in `foreground_box`: scipy and skimage take 0.3 s to import; few models need them.
            from .foreground import foreground

            body = foreground(data[0], (x, y))[None]
        if box is None:
            box = foreground_box(data[0], affine) if self.crop_foreground else tuple((0, n) for n in data.shape[1:])
        if box != tuple((0, n) for n in data.shape[1:]):
            data, body = _cut(data, box), None if body is None else _cut(body, box)
        # Scaling and resampling commute. The statistics are taken from the original voxels.
        scaling = [self._scaling(channel, body) for channel in data]
        if self.crop_centre is not None:
            box = (*map(_middle, data.shape[1:], self.crop_centre), box[2])
            data = _cut(data, box)
        start = np.eye(4)
        start[:3, 3] = [first for first, _ in box]
        box_affine: FloatArray = affine @ start
        i, j, k = data.shape[1:]
        grid, shape = straight_grid((i, j, k), box_affine)
        if self.spacing_mm is not None:
            grid, shape = spacing_grid(shape, grid, self.spacing_mm)
        elif self.size is not None:
            grid, shape = sized_grid(shape, grid, (*self.size, shape[2])), (*self.size, shape[2])
        elif self.square_pixels:
            x, y, z = spacing_of(grid)
            grid, shape = spacing_grid(shape, grid, (min(x, y), min(x, y), z))
        enlarged = math.prod(shape) / math.prod(volume.shape)
        if enlarged > _MOST_ENLARGED or (enlarged > 64 and math.prod(shape) > _MOST_VOXELS):
            found, size = (" x ".join(f"{mm:g}" for mm in spacing_of(one)) for one in (volume.affine, grid))
            raise InputError(
                volume.source,
                f"voxels of {found} mm, each of which would become {enlarged:.0f} of the model's",
                f"voxels nearer to {size} mm",
                "check the unit and the voxel size in its header",
            )
        placement = Placement(volume.shape, volume.affine, transform, box, box_affine, shape, grid)
        model = resample(data, box_affine, grid, shape)
        scaled = torch.empty_like(model)
        planes = max(1, _SCALED_AT_ONCE // math.prod(shape[1:]))
        for out, channel, (centre, width) in zip(scaled, model, scaling, strict=True):
            for to, part in zip(out.split(planes), channel.split(planes), strict=True):
                # float64, because a large offset or a tiny unit would lose digits in float32.
                values = (part.double() - centre) / width
                to.copy_(values if self.intensity == "zscore" else bend(values))
        return scaled, placement

    def voxel_mm3(self, affine: FloatArray) -> float | None:
        """Volume of a voxel of the model's grid, for a scan with this affine; None if it depends on the scan's size."""
        if self.spacing_mm is not None:
            return math.prod(self.spacing_mm)
        if self.size is not None:
            return None
        turned = spacing_of(affine)
        if self.orientation is not None:
            order = np.argsort(orientation_transform(affine, self.orientation)[:, 0])
            turned = turned[order[0]], turned[order[1]], turned[order[2]]
        i, j, k = turned
        return min(i, j) ** 2 * k if self.square_pixels else i * j * k

    def _scaling(self, channel: Tensor, body: Tensor | None) -> tuple[float, float]:
        """Centre and half-width (percentile, median), or mean and standard deviation, in the channel's unit."""
        values = channel.cpu().numpy().ravel()
        if body is not None and body.any():
            dark, _ = _percentiles(values, self.low, self.high)
            width = (float(np.median(channel[body[0]].cpu().numpy())) - dark) / (1 + _MEDIAN)
            if width > 0:
                return dark + width, width
        above = values[values > values.min()]
        sample = above if len(above) > _FEW * len(values) else values
        if self.intensity == "zscore":
            return float(sample.mean(dtype=np.float64)), float(sample.std(dtype=np.float64)) or 1.0
        low, high = _percentiles(sample, self.low, self.high)
        if low == high:
            low, high = float(values.min()), float(values.max())
        return (low + high) / 2, (high - low) / 2 or 1.0


def apply_labels(labels: Volume, placement: Placement) -> Tensor:
    """Map reference labels to a model's grid.

    Each label's mask is interpolated linearly. Each voxel gets the label with the largest value; of equal ones, the
    lowest label.

    Args:
        labels: (1, I, J, K) integers on the scan's grid.
        placement: from `Preprocessing.apply` on the scan.

    Returns:
        (1, *S) of the labels' type.

    Raises:
        InputError: the labels lie on another grid than the scan.
    """
    placement.require_grid_of(labels)
    best = torch.full((1, *placement.shape), -1.0)
    result = torch.zeros((1, *placement.shape), dtype=labels.data.dtype)
    for value in torch.unique(labels.data).tolist():
        share = placement.forward((labels.data == value).float())
        larger = share > best + 1e-6  # equal shares differ by rounding
        result[larger] = value
        best = torch.where(larger, share, best)
    return result


def foreground_box(image: Tensor, affine: FloatArray) -> Box:
    """The bounding box of the head, or of whatever is brighter than air, with a margin of 10 mm.

    Every connected part above 1 cm^3 is inside. The threshold is halfway between air and Otsu's threshold: too large a
    box costs only time, but too small a box would cut off a part of the head.

    Args:
        image: (I, J, K).
        affine: (4, 4) voxel -> RAS mm.
    """
    from scipy import ndimage
    from skimage.filters import threshold_otsu

    sizes, spacing = image.shape, spacing_of(affine)
    i, j, k = (max(_COARSE_MM, mm) for mm in spacing)
    grid, shape = spacing_grid(sizes, affine, (i, j, k))
    coarse = resample(image[None], affine, grid, shape)[0].cpu().double().numpy()
    air, top = _percentiles(coarse.ravel(), 1, 99.5)
    everything: Box = tuple((0, n) for n in sizes)
    if top <= air:
        return everything
    scaled = np.clip((coarse - air) / (top - air), 0, 1)
    parts, _ = ndimage.label(scaled > 0.5 * threshold_otsu(scaled.ravel()))
    large = np.bincount(parts.ravel()) * i * j * k > _HEAD_PART_MM3
    large[0] = False  # air
    if not large.any():
        return everything
    box = []
    for axis, places in enumerate(np.nonzero(large[parts])):
        ratio = (i, j, k)[axis] / spacing[axis]
        excess = (shape[axis] * ratio - sizes[axis]) / 2  # how far the coarse grid extends beyond the image
        margin = _HEAD_MARGIN_MM / spacing[axis]
        first = int(np.floor(places.min() * ratio - excess - margin))
        stop = int(np.ceil((places.max() + 1) * ratio - excess + margin))
        box.append((max(first, 0), min(stop, sizes[axis])))
    return tuple(box)


def _middle(size: int, width: int) -> tuple[int, int]:
    first = max(0, (size - width) // 2)
    return first, min(size, first + width)


def _cut(data: Tensor, box: Box) -> Tensor:
    (i0, i1), (j0, j1), (k0, k1) = box
    return data[:, i0:i1, j0:j1, k0:k1]


def bend(values: Tensor) -> Tensor:
    """Identity in [-1, 1]. Beyond it, values are compressed smoothly and monotonically into [-1.5, 1.5]."""
    beyond = values.abs().sub_(1).clamp_(min=0)
    bent = values.clamp(-1, 1)
    if not bool(beyond.any()):
        return bent
    return bent.add_(beyond.mul_(2).tanh_().mul_(0.5).mul_(values.sign()))


def _percentiles(values: npt.NDArray[np.floating], low: float, high: float) -> tuple[float, float]:
    # Exact order statistics without a float64 copy of the scan, as `np.percentile` would make.
    ranks = [round(percent / 100 * (len(values) - 1)) for percent in (low, high)]
    ordered = np.partition(values, ranks)
    return float(ordered[ranks[0]]), float(ordered[ranks[1]])
