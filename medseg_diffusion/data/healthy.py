"""Healthy scans, or the healthy part of scans with known lesions, as training images of anomaly detection."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from medseg_diffusion.errors import InputError
from medseg_diffusion.files import whole_folder
from medseg_diffusion.volumes.fitting import to_generator_grid
from medseg_diffusion.volumes.io import read_labels, read_volume
from medseg_diffusion.volumes.paths import find_scans, is_image, scan_name
from medseg_diffusion.volumes.preprocessing import Placement, Preprocessing
from medseg_diffusion.volumes.volume import Volume

from .cases import Bounds, find_cases, split_of_patients
from .image_cache import VERSION, PackedImages, Row, open_packed, write_packed
from .images import Part

HEALTHY, UNHEALTHY = 0, 1
SHOWN = 0.01
"""Slices of which less is brighter than the scan's darkest level are not learned from: they show next to nothing."""
CLASSES = ("healthy", "unhealthy")
HEIGHTS = 10
"""Bands of relative height from the lowest slice to the highest."""
_TOUCHED = 1e-4  # share of a voxel
MOST_REPEATS = 8
"""Of a slice in one epoch."""


@dataclass(frozen=True)
class HealthyScan:
    """A scan to learn from. ``label`` marks lesions, None where there are none at all."""

    name: str
    image: Path
    label: Path | None
    patient: str


def find_healthy(folder: Path) -> list[HealthyScan]:
    """The scans of a labelled folder (`find_cases`), or of a plain one, which are then healthy altogether.

    Raises:
        InputError: neither.
    """
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if names & {"dataset.json", "labels", "masks", "labelsTr"}:
        return [HealthyScan(case.name, case.image, case.label, case.patient) for case in find_cases(folder).cases]
    files = find_scans(folder)
    for file in files:
        require_volume(file)
    return [HealthyScan(scan_name(file), file, None, scan_name(file)) for file in files]


def require_volume(scan: Path) -> None:
    """InputError for a picture: anomalies are found in volumes."""
    if is_image(scan):
        raise InputError(scan, "a 2D picture", "a volume", "give NIfTI, NRRD or MetaImage files, or DICOM series")


@dataclass(frozen=True)
class HealthySource:
    """What `medseg train-anomaly` learns from.

    Attributes:
        scans: the healthy ones.
        exclude_labelled: slices closer than this to a labelled one are left out; None where nothing may be labelled.
        unhealthy: scans whose labelled slices (all slices, where nothing is labelled) are the class "unhealthy".
        sides: of every patient.
    """

    scans: tuple[HealthyScan, ...]
    exclude_labelled: int | None
    unhealthy: tuple[HealthyScan, ...]
    sides: dict[str, Part]


def healthy_source(
    healthy: Path, exclude_labelled: int | None, unhealthy: Path | None, held_out: tuple[int, int]
) -> HealthySource:
    """Finds the scans and the side of every patient, that of `split_by_hash` for ``held_out`` (test, validation).

    Raises:
        InputError: no scans, or too few to hold any out.
    """
    scans = find_healthy(healthy)
    sides = split_of_patients([scan.patient for scan in scans], *held_out)
    others = find_healthy(unhealthy) if unhealthy is not None else []
    # Patients of the healthy folder keep their side; others are for training alone.
    return HealthySource(tuple(scans), exclude_labelled, tuple(others), sides)


def healthy_slices(label: Tensor | None, count: int, exclude_labelled: int | None) -> Tensor:
    """Which of ``count`` slices are healthy, bool (count,): no slice closer than ``exclude_labelled`` is labelled.

    Args:
        label: (I, J, K) on the model's grid, above 0 where there is a lesion, or None.
        count: K.
        exclude_labelled: 1 leaves out the labelled slices alone.
    """
    healthy = torch.ones(count, dtype=torch.bool)
    if label is None or exclude_labelled is None:
        return healthy
    for k in label.flatten(0, 1).any(0).nonzero().flatten().tolist():
        healthy[max(0, k - exclude_labelled + 1) : k + exclude_labelled] = False
    return healthy


def lesion_map(scan: HealthyScan, placement: Placement) -> Tensor | None:
    """Every voxel of the model's grid that a lesion touches, bool (I, J, K); None for a scan without labels."""
    if scan.label is None:
        return None
    labels = read_labels(scan.label)
    placement.require_grid_of(labels)
    return placement.forward((labels.data > 0).float())[0] > _TOUCHED


def require_usable(volume: Volume, shape: Sequence[int], size: Sequence[int], modality: str | None) -> None:
    """InputError for a scan of another modality, or one that images of ``size`` cannot show.

    Args:
        volume: the scan.
        shape: (I, J, K) on the model's grid.
        size: two sides for slices, three for volumes, which may fill a quarter of each side at least.
        modality: DICOM's; None for any.
    """
    known = volume.header.modality
    if known and modality and known != modality:
        raise InputError(volume.source, f"modality {known}", modality, "use a model that was made for it")
    if len(size) == 3:
        fewest = [-(-m // 4) for m in size]  # thinner ones would be padding for the most part
        fits = all(low <= n <= m for n, m, low in zip(shape, size, fewest, strict=True))
        wanted = f"{' x '.join(map(str, fewest))} to {' x '.join(map(str, size))}"
        remedy = "cut it to the region that the model was trained on, or use a model of slices"
    else:
        shape = shape[:2]
        fits = 4 * min(shape) >= max(shape)
        wanted = "axial slices of which no side is less than a quarter of the other"
        remedy = "give the whole volume, not a single sagittal or coronal slice"
    if not fits:
        raise InputError(volume.source, f"{' x '.join(map(str, shape))} voxels on the model's grid", wanted, remedy)


def packed_healthy(
    source: HealthySource,
    store: Path,
    size: Sequence[int],
    channels: int,
    preprocessing: Preprocessing,
    modality: str | None = None,
    on_scan: Callable[[int, int], None] = lambda done, total: None,
) -> PackedImages:
    """The healthy slices (or whole healthy volumes) of the scans, packed; class 1 are the unhealthy ones, if any.

    Slices without a lesion are frequent where lesions are rare, at the top and the bottom, so that a model would know
    little of the middle, and a classifier would take the height for the disease. Hence they are drawn so often that
    every height is met about as often as in the scans, as far as `MOST_REPEATS` allows.

    Raises:
        InputError: an unusable scan, one of another modality, lesions among scans that should have none, or nothing
            left to train on.
    """
    everything = [*source.scans, *source.unhealthy]
    files = [path for scan in everything for path in (scan.image, scan.label) if path is not None]
    state = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    about = [state, source.exclude_labelled, source.sides, len(source.scans), list(size), channels, VERSION]
    about += [HEIGHTS, MOST_REPEATS]
    key = hashlib.sha256(json.dumps([*about, asdict(preprocessing)]).encode()).hexdigest()[:16]
    folder = store / f"healthy-{'x'.join(map(str, size))}-{key}"

    missing: Counter[str] = Counter()
    draws: list[int] = []

    def rows() -> Iterator[Row]:
        first, heights = 0, _Heights()
        for done, scan in enumerate(everything, 1):
            wanted = HEALTHY if done <= len(source.scans) else UNHEALTHY
            side: Part = source.sides.get(scan.patient, "train")
            volume = read_volume(scan.image)
            image, placement = preprocessing.apply(volume)
            require_usable(volume, placement.shape, size, modality)
            lesions = lesion_map(scan, placement)
            if wanted == HEALTHY:
                refuse_lesions(scan, source.exclude_labelled)
            if len(size) == 2:
                visible, chosen = _slices(image, lesions, wanted, source.exclude_labelled)
                images = image.movedim(-1, 0)[visible & chosen]
                if side == "train":
                    heights.add(first, wanted, visible, chosen)
            else:
                marked = lesions is not None and bool(lesions.any())
                images = image[None] if wanted == UNHEALTHY or not marked else image[None][:0]
            first += len(images)
            if wanted == HEALTHY:
                missing[side] += int((visible & ~chosen).sum()) if len(size) == 2 else 1 - len(images)
            levels = ((to_generator_grid(images.clamp(-1, 1), size) + 1) * 127.5).round().to(torch.uint8)
            pixels = levels.movedim(1, -1).expand(*levels.shape[:1], *size, channels).numpy()
            yield Row(scan.name, wanted, side, pixels)
            on_scan(done, len(everything))
        draws.extend(heights.draws())

    if not (folder / "index.json").is_file():
        with whole_folder(folder) as temporary:
            classes = CLASSES if source.unhealthy else ()
            near, shape, held_out = source.scans[0].image.parent, (*size, channels), Bounds.of(source.sides)
            write_packed(temporary, rows(), near, shape, classes, draws=draws, held_out=held_out)
            (temporary / LEFT_OUT).write_text(json.dumps(missing))
    return open_packed(folder)


LEFT_OUT = "left_out.json"


def left_out(images: PackedImages) -> Counter[Part]:
    """How many slices (or volumes) of each side's healthy scans were not packed, for a lesion in or near them."""
    return Counter(json.loads((images.folder / LEFT_OUT).read_text()))


def _slices(image: Tensor, lesions: Tensor | None, wanted: int, exclude_labelled: int | None) -> tuple[Tensor, Tensor]:
    """Which slices show anything, and which are of the wanted class; bool (K,) both."""
    count = image.shape[-1]
    if wanted == HEALTHY:
        chosen = healthy_slices(lesions, count, exclude_labelled)
    else:
        chosen = torch.ones(count, dtype=torch.bool) if lesions is None else lesions.flatten(0, 1).any(0)
    return (image > -0.9).flatten(0, 2).float().mean(0) >= SHOWN, chosen


class _Heights:
    """Where the slices of training scans lie, and how often each that is learned from stands for one that is not."""

    def __init__(self) -> None:
        self.shown = np.zeros((2, HEIGHTS), int)  # slices of the scans of either class
        self.kept = np.zeros((2, HEIGHTS), int)  # of these, what is learned from
        self.places: list[tuple[int, int, int]] = []  # position, class, band

    def add(self, first: int, label: int, shown: Tensor, chosen: Tensor) -> None:
        """A scan of class ``label``; the slices that are ``shown`` and ``chosen`` have the positions from ``first``."""
        bands = (torch.arange(len(shown)) * HEIGHTS // len(shown)).numpy()
        kept = bands[(shown & chosen).numpy()]
        np.add.at(self.shown[label], bands[shown.numpy()], 1)
        np.add.at(self.kept[label], kept, 1)
        self.places += [(first + i, label, int(band)) for i, band in enumerate(kept)]

    def draws(self) -> list[int]:
        """Positions, each 1 to `MOST_REPEATS` times."""
        times = np.clip(np.rint(self.shown / np.maximum(self.kept, 1)), 1, MOST_REPEATS).astype(int)
        return [position for position, label, band in self.places for _ in range(times[label, band])]


def refuse_lesions(scan: HealthyScan, exclude_labelled: int | None) -> None:
    """InputError for a scan with lesions, unless ``exclude_labelled`` says what to do with them."""
    if scan.label is None or exclude_labelled is not None:
        return
    marked = int((read_labels(scan.label).data > 0).sum())
    if marked:
        raise InputError(
            scan.label,
            f"{marked} labelled voxels",
            "no lesion in healthy scans",
            "leave out the slices near them with --exclude-labelled 1 (or more), or give the folder of images alone "
            "where the labels mark no lesions",
        )
