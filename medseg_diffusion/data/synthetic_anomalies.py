"""Synthetic anomalies in a scan: brighter or darker blobs, and local deformations, each with its exact mask.

They measure an anomaly detector on scans without annotated lesions. A blob is a ball whose radius varies smoothly with
direction. Its shape is defined in millimetres, so it is the same on any grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from torch import Tensor

from medseg_diffusion.volumes.volume import FloatArray, Shape

AnomalyKind = Literal["hyper", "hypo", "deformation"]
Mask = npt.NDArray[np.bool_]

STRONGEST_DEFORMATION = 0.33
"""Largest displacement relative to the radius. A larger one would fold the image along a ray."""
FINEST_RADIUS = 1.5
"""Smallest useful radius, in voxels of the finest axis."""

_CORE = 0.7  # share of a blob's radius that must fit into the foreground; the rest may be cut off by its border
_REACH = 1.2  # radii at which a displacement ends; a half sine of this length exceeds 1/2 between 0.2 and 1 radii
_BLOB_ROUGHNESS, _DEFORMATION_ROUGHNESS = 0.18, 0.06  # standard deviation of the radius over directions
_STEP = 0.1  # spacing of the lattice of radii, in units of the sphere of directions
_SMOOTH = 0.3  # standard deviation of the smoothing on it: bumps are about half a radian wide


@dataclass(frozen=True)
class AnomalyRecipe:
    """The kind of anomaly that is inserted.

    Attributes:
        kind: "hyper" is brighter and "hypo" darker. "deformation" displaces tissue away from a centre (bulge) or
            towards it (shrink), with equal probability.
        contrast: above 0. For a blob, the change of intensity relative to `robust_spread`. For a deformation, the
            largest displacement relative to the radius, at most `STRONGEST_DEFORMATION`.
        radius_mm: smallest and largest radius. The radius is uniform between them, but no larger than the foreground
            has room for. It is the radius of a ball with the volume of the mask (before the foreground's border cuts
            off a part of it).

    Raises:
        ValueError: numbers beyond these limits.
    """

    kind: AnomalyKind = "hyper"
    contrast: float = 0.3
    radius_mm: tuple[float, float] = (4.0, 10.0)

    def __post_init__(self) -> None:
        low, high = self.radius_mm
        if not 0 < low <= high < float("inf"):
            raise ValueError(f"radii must satisfy 0 < lowest <= highest, got {low:g} and {high:g} mm")
        if not 0 < self.contrast < float("inf"):
            raise ValueError(f"contrast must be above 0, got {self.contrast:g}")
        if self.kind == "deformation" and self.contrast > STRONGEST_DEFORMATION:
            raise ValueError(
                f"contrast of a deformation, its displacement over its radius, must be at most {STRONGEST_DEFORMATION} "
                f"(more would fold the image), got {self.contrast:g}"
            )


@dataclass(frozen=True, eq=False)
class Anomaly:
    """One anomaly and the image that contains it.

    Attributes:
        image: (I, J, K) float32.
        mask: bool (I, J, K), where the weight of a blob is above one half, or the displacement above half of its
            maximum. A deformation does not move its centre: the mask has a small hole there.
        touched: bool (I, J, K), where the image may have changed: the mask and its soft edge.
        centre: voxel of the centre.
        radius_mm: see `AnomalyRecipe`.
        displacement_mm: largest displacement, negative towards the centre; 0 for a blob.
    """

    image: Tensor
    mask: Tensor
    touched: Tensor
    centre: Shape
    radius_mm: float
    displacement_mm: float = 0.0


def robust_spread(image: Tensor, foreground: Tensor) -> float:
    """The 95th minus the 5th percentile of the intensities (I, J, K) in the foreground (bool); 0 if it is empty."""
    values = image[foreground].double().numpy()
    if not values.size:
        return 0.0
    low, high = np.percentile(values, [5, 95])
    return float(high - low)


def insert_anomaly(
    image: Tensor,
    free: Tensor,
    spacing_mm: Sequence[float],
    recipe: AnomalyRecipe,
    spread: float,
    generator: torch.Generator,
) -> Anomaly | None:
    """Insert one anomaly into a copy of an image.

    Nothing changes outside ``free``. The centre is uniform over the voxels with enough room around them. A deformation
    must fit completely. A blob needs room for 0.7 of its radius: the rest ends softly at the border of ``free``, like a
    lesion in the cortex. The edge of the grid limits the room, too, except along an axis of one voxel.

    A blob adds or subtracts ``recipe.contrast * spread`` times a weight that is 1 inside and falls to 0 over two voxels
    of the finest axis. No voxel becomes darker than the darkest voxel of the image, because most modalities have no
    negative values. A deformation displaces voxels along rays from its centre, by a half sine that ends at 1.2 radii.
    It interpolates by cubic splines, clipped to the image's range.

    Args:
        image: (I, J, K) float32.
        free: bool (I, J, K), the foreground without the ``touched`` voxels of other anomalies.
        spacing_mm: voxel size along the three axes.
        recipe: kind, contrast and radii.
        spread: unit of the contrast, from `robust_spread`.
        generator: source of the radius, the shape, the position and the direction.

    Returns:
        The anomaly, or None if there is no room for the smallest radius.
    """
    deformation = recipe.kind == "deformation"
    roughness = _DEFORMATION_ROUGHNESS if deformation else _BLOB_ROUGHNESS
    edge = min(spacing_mm)
    farthest = 1 + 2.5 * roughness  # largest distance of the surface from the centre, in radii
    share, margin = (_REACH * farthest, 0.0) if deformation else (_CORE, edge)

    room = _room(free.numpy(), spacing_mm)
    low, high = recipe.radius_mm
    high = min(high, (float(room.max()) - margin) / share)
    if high < low:
        return None
    radius = low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))
    outwards = bool(torch.randint(2, (), generator=generator))
    lattice = _radius_lattice(roughness, generator)
    candidates = np.flatnonzero(room >= share * radius + margin - 1e-6)
    position = candidates[int(torch.randint(len(candidates), (), generator=generator))]
    i, j, k = (int(index) for index in np.unravel_index(position, room.shape))

    # The rest works in a box around the anomaly.
    half_mm = _REACH * farthest * radius + 3 * edge
    widths = [int(np.ceil(half_mm / size)) for size in spacing_mm]
    box = tuple(slice(max(0, c - w), min(n, c + w + 1)) for c, w, n in zip((i, j, k), widths, image.shape, strict=True))
    lines = [
        (np.arange(part.start, part.stop) - c) * mm for part, c, mm in zip(box, (i, j, k), spacing_mm, strict=True)
    ]
    offset = np.stack(np.meshgrid(*lines, indexing="ij"))
    distance = np.sqrt((offset**2).sum(0))
    direction = offset / np.maximum(distance, 1e-9)
    surface = radius * ndimage.map_coordinates(lattice, direction / _STEP + lattice.shape[0] // 2, order=1)

    before = image[box].double().numpy()
    displacement = 0.0
    if deformation:
        displacement = recipe.contrast * radius * (1 if outwards else -1)
        profile = np.where(distance < _REACH * surface, np.sin(np.pi * distance / (_REACH * surface)), 0.0)
        touched: Mask = (profile > 0) & free[box].numpy()
        mask: Mask = touched & (profile > 0.5)
        start = np.array([c - part.start for c, part in zip((i, j, k), box, strict=True)]).reshape(3, 1, 1, 1)
        source = start + (offset - displacement * profile * direction) / np.reshape(spacing_mm, (3, 1, 1, 1))
        moved = ndimage.map_coordinates(before, source, order=3, mode="nearest")
        after = np.where(touched, np.clip(moved, float(image.min()), float(image.max())), before)
    else:
        depth = np.minimum(surface - distance, _depth(free[box].numpy(), spacing_mm) - edge)
        weight = np.clip(0.5 + depth / (2 * edge), 0, 1)
        touched, mask = weight > 0, weight > 0.5
        change = recipe.contrast * spread * weight
        after = before + change if recipe.kind == "hyper" else np.maximum(before - change, float(image.min()))
    result = image.clone()
    result[box] = torch.from_numpy(np.where(touched, after, before)).to(image.dtype)
    return Anomaly(result, _whole(mask, box, image), _whole(touched, box, image), (i, j, k), radius, displacement)


def _radius_lattice(roughness: float, generator: torch.Generator) -> FloatArray:
    """Radius by direction, on a cubic lattice around the unit sphere.

    The enclosed volume is that of the unit ball. The radius varies with the standard deviation ``roughness`` and
    differs from its mean by at most two of them.
    """
    count = round(1.2 / _STEP)
    lines = np.arange(-count, count + 1) * _STEP
    shape = (len(lines),) * 3
    noise = ndimage.gaussian_filter(
        torch.randn(shape, generator=generator, dtype=torch.float64).numpy(), _SMOOTH / _STEP
    )
    length = np.sqrt(sum(axis**2 for axis in np.meshgrid(lines, lines, lines, indexing="ij")))
    shell = np.abs(length - 1) < _STEP  # lattice points near the sphere sample all directions evenly
    radius = 1 + roughness * np.clip((noise - noise[shell].mean()) / noise[shell].std(), -2, 2)
    scaled: FloatArray = radius / np.cbrt((radius[shell] ** 3).mean())
    return scaled


def _room(free: Mask, spacing_mm: Sequence[float]) -> FloatArray:
    """Distance in mm from every voxel to the nearest one that is not free or is beyond the grid; 0 if not free."""
    padding = [(1, 1) if n > 1 else (0, 0) for n in free.shape]
    inner = tuple(slice(before, before + n) for (before, _), n in zip(padding, free.shape, strict=True))
    return _depth(np.pad(free, padding), spacing_mm)[inner]


def _depth(free: Mask, spacing_mm: Sequence[float]) -> FloatArray:
    """Distance in mm from every voxel to the nearest one that is not free; infinite if all are free."""
    if free.all():
        return np.full(free.shape, np.inf)
    distance: FloatArray = ndimage.distance_transform_edt(free, sampling=spacing_mm)
    return distance


def _whole(part: Mask, box: tuple[slice, ...], like: Tensor) -> Tensor:
    whole = torch.zeros(like.shape, dtype=torch.bool)
    whole[box] = torch.from_numpy(part)
    return whole
