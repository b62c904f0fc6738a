"""What models return for a scan, on the scan's own grid, and the images that a generator drew."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
import numpy.typing as npt
import torch

from medseg_diffusion.data.image_cache import to_unit
from medseg_diffusion.errors import UsageError
from medseg_diffusion.files import require_replaceable, write_files
from medseg_diffusion.reports.pictures import as_pictures, grid, png
from medseg_diffusion.volumes.io import write_labels, write_map
from medseg_diffusion.volumes.label_table import LabelTable
from medseg_diffusion.volumes.memory import to_nibabel
from medseg_diffusion.volumes.volume import Volume
from medseg_diffusion.workflows.label_files import label_table

SegmentedMap = Literal["probabilities", "uncertainty", "members", "mutual-information"]
"""What `Segmenter.segment` makes beside the labels."""
ScoredMap = Literal["score", "mask", "foreground", "counterpart"]


def _write(array: npt.NDArray[Any], scan: Volume, path: Path, table: LabelTable | None = None) -> Path:
    """Write labels or a map, (I, J, K) or (C, I, J, K), with the geometry of the scan; ``table`` names the labels."""
    data = torch.from_numpy(np.ascontiguousarray(array))
    if data.is_floating_point():
        write_map(data, scan, path)
    else:
        write_labels(data, scan, path, table)
    return path


@dataclass(frozen=True, eq=False)
class SegmentedScan:
    """A segmented scan, on its own grid (I, J, K).

    Attributes:
        scan: The scan, whose geometry all arrays have.
        labels: Label of every voxel, (I, J, K) uint8, or int32 for more than 256 classes.
        classes: Label -> name of the class, background 0 included: of all classes, or of those that were chosen.
        volumes_ml: Class name -> volume in ml, without background.
        maps: The maps that were asked for, by their names.
        members_ml: Class name -> smallest and largest volume of the members; empty for one member.
        intervals_ml: Class name -> an interval that contains the true volume in a share ``level`` of patients like
            those that the model was calibrated on; empty if the model was not calibrated for these options.
        level: That share, such as 0.95; None without intervals.
        agreement: Class name -> mean Dice of pairs of members, 0 to 1; empty for one member.
        disagreement: Disagreement of the members, one number for the scan, 0 for equal ones; None for one member.
        quality: "check" if the scan or the mask is unlike those of the model's training, or if the members agree less
            than on 95 of 100 calibration scans; else "usual"; None without calibration.
        unlike_training: In what the scan or the mask is unlike those of the training, one sentence; empty if nothing
            is known. Such a scan has no intervals.
        warnings: What the reader should know, one sentence each.
    """

    scan: Volume
    labels: npt.NDArray[Any]
    classes: dict[int, str]
    volumes_ml: dict[str, float]
    maps: Mapping[SegmentedMap, npt.NDArray[Any]]
    members_ml: dict[str, tuple[float, float]]
    intervals_ml: dict[str, tuple[float, float]]
    level: float | None
    agreement: dict[str, float]
    disagreement: float | None
    quality: Literal["usual", "check"] | None
    unlike_training: str
    warnings: tuple[str, ...]

    @property
    def members(self) -> npt.NDArray[Any]:
        """The mask of every sampled member, (N, I, J, K) of the type of ``labels``.

        Raises:
            UsageError: They were not asked for; so do the other maps.
        """
        return self._array("members")

    @property
    def probabilities(self) -> npt.NDArray[np.float32]:
        """Probability of every class of `classes`, (C, I, J, K) float32 in [0, 1], behind that of everything else."""
        return self._array("probabilities")

    @property
    def uncertainty(self) -> npt.NDArray[np.float32]:
        """Uncertainty of the kind that was chosen at the loading, (I, J, K) float32."""
        return self._array("uncertainty")

    @property
    def mutual_information(self) -> npt.NDArray[np.float32]:
        """Disagreement of the members in every voxel, (I, J, K) float32 in [0, 1]."""
        return self._array("mutual-information")

    def _array(self, what: SegmentedMap | Literal["labels"]) -> npt.NDArray[Any]:
        if what == "labels":
            return self.labels
        if what not in self.maps:
            raise UsageError(f"{what}: not made; ask for it with segment(scan, maps=[{what!r}])")
        return self.maps[what]

    def to_nibabel(self, what: SegmentedMap | Literal["labels"] = "labels") -> nib.Nifti1Image:
        """The labels, or a map, as an image of nibabel with the scan's affine and codes; channels are its last axis.

        The header of labels holds the names and colours of the classes.

        Raises:
            UsageError: A map that was not asked for.
        """
        return to_nibabel(self._array(what), self.scan, self._table(what))

    def save(self, path: str | Path, what: SegmentedMap | Literal["labels"] = "labels") -> Path:
        """Write the labels, or a map, with the scan's geometry, and return the path. Its suffix decides the format.

        NIfTI files of labels hold the names and colours of the classes, too.

        Raises:
            UsageError: A map that was not asked for, a missing folder, or a folder of this name.
            InputError: An unknown suffix.
        """
        return _write(self._array(what), self.scan, Path(path), self._table(what))

    def _table(self, what: SegmentedMap | Literal["labels"]) -> LabelTable | None:
        if what not in ("labels", "members"):
            return None
        return label_table({value: name for value, name in self.classes.items() if value})


@dataclass(frozen=True, eq=False)
class ScoredScan:
    """A scan with its anomaly map, on its own grid (I, J, K).

    Attributes:
        scan: The scan, whose geometry all arrays have.
        maps: "score", "mask", "foreground" and, if it was asked for, "counterpart".
        threshold: The score above which a voxel is in the mask.
        volume_ml: Volume of the mask in ml.
        scan_score: Score of the whole scan.
        healthy_percentile: Share of the model's healthy calibration scans with a lower score, in %; None without
            calibration for these options, and for a scan unlike those of the training.
        unlike_training: In what the scan is unlike those of the training, one sentence; empty if nothing is known.
        warnings: What the reader should know, one sentence each.
    """

    scan: Volume
    maps: Mapping[ScoredMap, npt.NDArray[Any]]
    threshold: float
    volume_ml: float
    scan_score: float
    healthy_percentile: float | None
    unlike_training: str
    warnings: tuple[str, ...]

    @property
    def score(self) -> npt.NDArray[np.float32]:
        """How unlike healthy scans a voxel is, (I, J, K) float32, 0 or above; 0 outside the foreground."""
        return self._array("score")

    @property
    def mask(self) -> npt.NDArray[np.bool_]:
        """Voxels above the threshold, (I, J, K) bool, without parts below the model's smallest volume."""
        return self._array("mask")

    @property
    def foreground(self) -> npt.NDArray[np.bool_]:
        """Voxels whose scores count, (I, J, K) bool."""
        return self._array("foreground")

    @property
    def counterpart(self) -> npt.NDArray[np.float32]:
        """The healthy counterpart that the method produced, (I, J, K) float32 in the scan's unit.

        Raises:
            UsageError: It was not asked for.
        """
        return self._array("counterpart")

    def _array(self, what: ScoredMap) -> npt.NDArray[Any]:
        if what not in self.maps:
            raise UsageError(f"{what}: not made; ask for it with anomaly(scan, counterpart=True)")
        return self.maps[what]

    def to_nibabel(self, what: ScoredMap = "score") -> nib.Nifti1Image:
        """The map, or the mask, as an image of nibabel with the scan's affine and codes.

        Raises:
            UsageError: A counterpart that was not asked for.
        """
        return to_nibabel(self._array(what), self.scan)

    def save(self, path: str | Path, what: ScoredMap = "score") -> Path:
        """Write the map, or the mask, with the scan's geometry, and return the path. Its suffix decides the format.

        Raises:
            UsageError: A counterpart that was not asked for, a missing folder, or a folder of this name.
            InputError: An unknown suffix.
        """
        return _write(self._array(what), self.scan, Path(path))


@dataclass(frozen=True, eq=False)
class Samples:
    """Images that a generator drew.

    Attributes:
        images: (n, H, W, C) of pictures or (n, I, J, K, C) of volumes, uint8 levels 0 to 255; C is 1 or 3.
        classes: Name of the class of each image; empty for a generator without classes.
        spacing_mm: Voxel size of volumes, whose axes are RAS; None for pictures, which have none.
        masks: The mask that each image obeys, (n, H, W) or (n, I, J, K) uint8 labels; None for images without masks.
    """

    images: npt.NDArray[np.uint8]
    classes: tuple[str, ...]
    spacing_mm: tuple[float, float, float] | None
    masks: npt.NDArray[np.uint8] | None = None

    def to_nibabel(self, index: int) -> nib.Nifti1Image:
        """One of the volumes as an image of nibabel.

        Raises:
            UsageError: Pictures, which are no volumes.
        """
        if self.spacing_mm is None:
            raise UsageError("pictures have no geometry: take .images, or write them with .save")
        data = torch.from_numpy(self.images[index]).movedim(-1, 0)
        return to_nibabel(data, Volume(data, np.diag([*self.spacing_mm, 1.0])))

    def save(self, path: str | Path) -> Path:
        """Write one PNG with all images, of volumes their middle slices, and return its path.

        Raises:
            UsageError: A name that does not end in .png, or is that of a folder.
        """
        path = Path(path)
        if path.suffix.lower() != ".png":
            raise UsageError(f"{path}: expected a name that ends in .png; .to_nibabel(i) gives a volume")
        require_replaceable(path)
        images = torch.from_numpy(self.images).movedim(-1, 1)
        write_files(path.parent, {path.name: png(grid(as_pictures(to_unit(images))))})
        return path
