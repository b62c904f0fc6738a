"""A scan in memory: its voxels, their position in the patient, and the header fields that are preserved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from medseg_diffusion.errors import InputError, remark

FloatArray = npt.NDArray[np.float64]
Shape = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Header:
    """Header fields of a file that are preserved beside voxels and affine. Most exist in NIfTI files only.

    Attributes:
        qform_code: NIfTI code of the quaternion transform (0 = absent, 1 = scanner, ...).
        sform_code: NIfTI code of the affine transform.
        xyzt_units: NIfTI code of the spatial and temporal units; 2 is millimetres.
        qform: (4, 4) voxel -> RAS mm of the quaternion transform if it differs from the affine, else None.
        modality: DICOM modality, such as "MR" or "CT"; empty if the file does not tell it.
        series: UID of the DICOM series; empty for another format.
        white: level of white in an image file (PNG, ...): 1, 255 or 65535; 0 if the file does not tell it.
        sparse: the file may leave out empty slices, as a DICOM segmentation does: beyond the grid, voxels are 0.
        unknown_step: a sparse file does not say how far its slices are apart: between them, there may be empty ones.
        description: what a file that is written says of itself, in ASCII; that of a file that is read is not preserved.
    """

    qform_code: int = 1
    sform_code: int = 1
    xyzt_units: int = 2
    qform: FloatArray | None = None
    modality: str = ""
    series: str = ""
    white: int = 0
    sparse: bool = False
    unknown_step: bool = False
    description: str = ""


@dataclass(frozen=True, eq=False)
class FileImage:
    """An opened file whose header was read. `load()` reads the voxels.

    Attributes:
        shape: spatial axes I, J, K first, further axes (channels, time) last.
        dtype: voxel type as stored.
        affine: (4, 4) voxel -> RAS mm.
        header: fields that are preserved.
        load: returns the voxels as an array of `shape`, with slope and intercept applied.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    affine: FloatArray
    header: Header
    load: Callable[[], npt.NDArray[np.generic]]


@dataclass(frozen=True, eq=False)
class Volume:
    """A 3D image or label map with its geometry.

    Attributes:
        data: (C, I, J, K), float32 for images, an integer type for labels.
        affine: (4, 4) float64, voxel indices -> RAS millimetres.
        source: the file that it was read from; None if it was made in memory.
        header: fields that are preserved from reading to writing.

    Raises:
        ValueError: data without exactly four axes.
        InputError: an affine that is singular or not finite.
    """

    data: Tensor
    affine: FloatArray
    source: Path | None = None
    header: Header = field(default_factory=Header)
    # Affine and header before the first reorientation. Computing them back would restore the origin only approximately.
    _native: tuple[FloatArray, Header] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.data.ndim != 4:
            raise ValueError(f"volume data must be (C, I, J, K), got shape {tuple(self.data.shape)}")
        object.__setattr__(self, "affine", np.array(self.affine, dtype=np.float64))
        check_affine(self.affine, self.source)

    @property
    def shape(self) -> Shape:
        """Number of voxels along the three spatial axes."""
        _, i, j, k = self.data.shape
        return i, j, k

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size in millimetres along the three axes of the array."""
        return spacing_of(self.affine)

    @property
    def voxel_mm3(self) -> float:
        """Volume of a voxel in cubic millimetres; of a sheared one less than the product of `spacing`."""
        return abs(float(np.linalg.det(self.affine[:3, :3])))

    @property
    def axcodes(self) -> str:
        """The directions of the axes, such as "RAS" or "LPI"."""
        return "".join(nib.orientations.aff2axcodes(self.affine))

    def like(self, data: Tensor) -> Volume:
        """A volume with other voxels on the same grid.

        Args:
            data: (C', I, J, K), any number of channels.

        Raises:
            ValueError: another grid.
        """
        if data.ndim != 4 or tuple(data.shape[1:]) != self.shape:
            grid = ", ".join(map(str, self.shape))
            raise ValueError(f"data of shape {tuple(data.shape)} is not on the grid (C, {grid})")
        return replace(self, data=data)

    def described(self, text: str) -> Volume:
        """The same volume; files that are written like it say ``text``, of which NIfTI takes 79 characters."""
        return replace(self, header=replace(self.header, description=text.encode("ascii", "replace").decode()))

    def require_same_grid(self, other: Volume) -> None:
        """Refuse a volume whose shape or position differs by more than a tenth of a voxel.

        Raises:
            InputError: names the other volume's file and both grids.
        """
        if other.shape != self.shape:
            raise InputError(
                other.source,
                f"{_by(other.shape)} voxels",
                f"{_by(self.shape)} as in {self.source or 'the image'}",
                "resample one onto the other's grid",
            )
        shift = grid_distance(self.affine, other.affine, self.shape)
        if shift > 0.1 * min(self.spacing):
            raise InputError(
                other.source,
                f"a grid up to {shift:.3g} mm away",
                f"the position of {self.source or 'the image'}",
                "resample one onto the other's grid",
            )

    def aligned(self, other: Volume) -> Volume:
        """``other`` on this grid: its axes are permuted and flipped if they are stored in another order or direction.

        A sparse file (`Header.sparse`) may hold a part of this grid; see `covering` if this volume is from one, too.

        Raises:
            InputError: as `require_same_grid`, if it is on another grid all the same.
        """
        other = other.covering(self)
        try:
            self.require_same_grid(other)
        except InputError:
            other = other.oriented(self.axcodes)
            self.require_same_grid(other)
        return other

    def covering(self, other: Volume) -> Volume:
        """A label map from a sparse file (`Header.sparse`) on a grid that holds that of ``other``; 0 where it is new.

        Its axes become those of ``other``. Slices at unknown distances (`Header.unknown_step`) are placed one by one.
        Any other volume is returned as it is, and so is one whose marked voxels lie between those of ``other``, which
        `aligned` refuses.
        """
        if not self.header.sparse:
            return self
        step = np.linalg.inv(other.affine) @ self.affine
        axes = np.abs(step[:3, :3]).argmax(0)  # of ``other``, by this volume's axes
        scale, last = step[axes, range(3)], np.array(self.shape) - 1
        across = step[:3, :3].copy()
        across[axes, range(3)] = 0
        odd = int((np.abs(np.abs(scale) - 1) * last > 0.1).sum())
        if sorted(axes) != [0, 1, 2] or (np.abs(across) @ last).max() > 0.1 or odd > self.header.unknown_step:
            return self
        slices, places = [], []
        for axis in np.argsort(axes).tolist():  # in the order of the axes of ``other``
            exact = scale[axis] * np.arange(self.shape[axis]) + step[axes[axis], 3]
            between = np.abs(exact - np.rint(exact)) > 0.1
            if self.data.movedim(axis + 1, 0)[torch.from_numpy(between)].any():
                return self
            slices.append(np.flatnonzero(~between))
            places.append(np.rint(exact[~between]).astype(int))
        low = np.array([place.min(initial=0) for place in places])
        high = np.array([place.max(initial=n - 1) + 1 for place, n in zip(places, other.shape, strict=True)])
        turned = self.data.numpy().transpose(0, *(np.argsort(axes) + 1))
        data = np.zeros((len(turned), *(high - low)), turned.dtype)
        channels, to = np.arange(len(turned)), (place - first for place, first in zip(places, low, strict=True))
        data[np.ix_(channels, *to)] = turned[np.ix_(channels, *slices)]
        affine = other.affine.copy()
        affine[:3, 3] += affine[:3, :3] @ low
        return Volume(torch.from_numpy(data), affine, self.source, self.header)

    def oriented(self, codes: str = "RAS") -> Volume:
        """Permute and flip the axes so that they point as nearly as possible along `codes`. Nothing is interpolated.

        `volume.oriented(codes).oriented(volume.axcodes)` has the data and the affine of `volume`, bit for bit. The
        exception are axes at exactly 45 degrees, whose direction is ambiguous.

        Args:
            codes: directions of the array's axes: one of R/L, A/P and S/I each, in any order.

        Raises:
            ValueError: codes that do not name three different directions.
        """
        transform = orientation_transform(self.affine, codes)
        if np.array_equal(transform, [[0, 1], [1, 1], [2, 1]]):
            return self
        step = nib.orientations.inv_ornt_aff(transform, self.shape)
        affine, header = self.affine @ step, self.header
        if header.qform is not None:
            header = replace(header, qform=header.qform @ step)
        if header.qform_code == header.sform_code == 0:
            # A NIfTI file without either code has default axes, which no longer hold here.
            header = replace(header, sform_code=2)
        native = self._native or (self.affine, self.header)
        if np.allclose(affine, native[0], rtol=1e-9, atol=1e-9 * min(self.spacing)):
            affine, header = native
        return replace(self, data=reorient(self.data, transform), affine=affine, header=header, _native=native)


def spacing_of(affine: FloatArray) -> tuple[float, float, float]:
    """Voxel size in mm along the three array axes: the norms of the affine's columns."""
    i, j, k = np.linalg.norm(affine[:3, :3], axis=0).tolist()
    return i, j, k


def grid_distance(a: FloatArray, b: FloatArray, shape: tuple[int, ...]) -> float:
    """Largest distance in mm, over the eight corner voxels, between their positions under two affines."""
    corners = np.stack(np.meshgrid(*[(0, n - 1) for n in shape[:3]], (1,), indexing="ij"), axis=-1).reshape(-1, 4)
    return float(np.linalg.norm(corners @ (a - b).T, axis=1).max())


def orientation_transform(affine: FloatArray, codes: str) -> npt.NDArray[np.int64]:
    """(3, 2) array for `reorient`: where each array axis goes, and whether it is flipped (-1)."""
    if sorted(codes.translate(str.maketrans("LPI", "RAS"))) != ["A", "R", "S"]:
        raise ValueError(f"orientation must name one of R/L, A/P and S/I each, such as 'RAS', got {codes!r}")
    target = nib.orientations.axcodes2ornt(tuple(codes))
    transform = nib.orientations.ornt_transform(nib.orientations.io_orientation(affine), target)
    return np.asarray(transform).astype(np.int64)


def reorient(data: Tensor, transform: npt.NDArray[np.int64]) -> Tensor:
    """Move and flip the three last axes of `data` (C, I, J, K) as `orientation_transform` says. Exact."""
    flips = [axis + 1 for axis in range(3) if transform[axis, 1] < 0]
    order = np.argsort(transform[:, 0]).tolist()
    moved = torch.flip(data, flips) if flips else data
    return moved.permute(0, *(axis + 1 for axis in order)).contiguous()


def inverse_reorientation(transform: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The transform that undoes `transform`."""
    order = np.argsort(transform[:, 0])
    return np.stack([order, transform[order, 1]], axis=1)


def check_affine(affine: FloatArray, source: Path | str | None) -> None:
    """Refuse an unusable affine.

    Raises:
        InputError: a shape other than 4x4, NaN or infinite entries, a zero voxel size, or axes that lie in one plane.
    """
    expected, remedy = "an invertible 4x4 affine", "repair the header or convert the scan again"
    if affine.shape != (4, 4) or not np.isfinite(affine).all():
        raise InputError(source, "an affine with NaN or infinite entries", expected, remedy)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if (spacing == 0).any():
        raise InputError(source, f"a voxel size of {_by(spacing.tolist())} mm", expected, remedy)
    if abs(np.linalg.det(affine[:3, :3] / spacing)) < 1e-4:
        raise InputError(source, "a singular affine (its axes lie in one plane)", expected, remedy)


SMALLEST_MM, LARGEST_MM = 1e-4, 100.0
"""A voxel size out of this range is no size of a scan: a header in another unit."""
FARTHEST_MM = 1e6
"""No scan lies farther from the centre of its scanner."""
_USUAL_MM, _USUAL_SLICE_MM = (0.05, 6.0), 30.0


def check_spacing(affine: FloatArray, source: Path | str) -> None:
    """Refuse voxel sizes and positions that no scan has, and warn of unusual sizes.

    Unusual are more than 30 mm between slices, and less than 0.05 mm or more than 6 mm within them.

    Raises:
        InputError: a voxel size below `SMALLEST_MM` or above `LARGEST_MM`, or a position beyond `FARTHEST_MM`.
    """
    if (far := float(np.abs(affine[:3, 3]).max())) > FARTHEST_MM:
        raise InputError(source, f"a position {far:.3g} mm away", "up to 1 km", "repair the header or convert it again")
    sizes = sorted(spacing_of(affine))
    found, remedy = f"voxels of {_by(list(spacing_of(affine)))} mm", "check the unit and the voxel size in the header"
    if sizes[0] < SMALLEST_MM or sizes[2] > LARGEST_MM:
        raise InputError(source, found, "0.05 to 6 mm, and up to 30 mm between slices", remedy)
    if sizes[0] < _USUAL_MM[0] or sizes[1] > _USUAL_MM[1] or sizes[2] > _USUAL_SLICE_MM:
        remark(f"{Path(source).name}: {found}, which is unusual for a scan; {remedy}")


def _by(numbers: tuple[int, ...] | list[float]) -> str:
    return " x ".join(f"{number:g}" for number in numbers)
