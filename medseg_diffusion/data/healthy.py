"""Training images for anomaly detection: healthy scans, or the healthy slices of scans with labelled lesions."""

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

from medseg_diffusion.errors import InputError, UsageError, listed, remark
from medseg_diffusion.files import whole_folder
from medseg_diffusion.volumes.fitting import to_generator_grid
from medseg_diffusion.volumes.inputs import find_scans, scan_files
from medseg_diffusion.volumes.io import read_labels, read_volume
from medseg_diffusion.volumes.outputs import RESULTS
from medseg_diffusion.volumes.paths import file_states, folders_below, is_image, is_series, scan_name
from medseg_diffusion.volumes.preprocessing import Placement, Preprocessing
from medseg_diffusion.volumes.sources import series_below
from medseg_diffusion.volumes.volume import Volume

from .cases import Bounds, SplitName, digest, find_cases, split_of_patients
from .file_lists import FileList, ListedFile
from .image_cache import VERSION, PackedImages, Row, open_packed, write_packed
from .patients import patients_of

HEALTHY, UNHEALTHY = 0, 1
LEAST_FOREGROUND = 0.01
"""Smallest share of a slice that must be brighter than the scan's darkest level. Emptier slices are left out."""
CLASSES = ("healthy", "unhealthy")
HEIGHTS = 10
"""Number of bands of relative height, from the lowest slice to the highest."""
_TOUCHED = 1e-4  # smallest share of a voxel that a lesion must cover to touch it
MOST_REPEATS = 8
"""How often a slice is drawn in one epoch at most."""


@dataclass(frozen=True)
class HealthyScan:
    """A scan for training. ``label`` marks its lesions; None if it has none."""

    name: str
    image: Path
    label: Path | None
    patient: str


def find_healthy(data: Path | FileList) -> list[HealthyScan]:
    """The scans of a list, of a labelled folder (`find_cases`), or of a plain one, whose scans are entirely healthy.

    A plain folder may hold DICOM series at any depth. Localizers are left out, with a warning.

    patients.csv (`medseg_diffusion.data.patients`) says which scans are of one patient. Without it, a DICOM series in
    deeper folders is of the patient whose name the first of them has, and any other scan has a patient of its own.

    Raises:
        InputError: a missing folder, no scan, or an image file instead of a volume.
    """
    if isinstance(data, FileList):
        return [_listed(entry) for entry in data.entries]
    folder = data
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if names & {"dataset.json", "labels", "masks", "labelsTr"}:
        cases = find_cases(folder).cases
        if several := [case.image for case in cases if case.further_channels]:
            raise _several_channels(several[0])
        return [HealthyScan(case.name, case.image, case.label, case.patient) for case in cases]
    files = _scans(folder)
    for file in files:
        require_volume(file)
    single = files == [folder]
    names_of = {file: (Path() if single else file.relative_to(folder).parent) / scan_name(file) for file in files}
    patients = patients_of(folder, [name.as_posix() for name in names_of.values()])
    return [
        HealthyScan(name.as_posix(), file, None, patients.get(name.as_posix(), name.parts[0]))
        for file, name in names_of.items()
    ]


def _scans(folder: Path) -> list[Path]:
    """The scans of a plain folder, files and DICOM series, or the path itself if it is one scan."""
    if not folder.is_dir() or is_series(folder):
        return find_scans(folder)
    files = [path for path in scan_files(folder) if not scan_name(path).endswith(RESULTS)]
    series = series_below(folder)
    others = [path for path in folders_below(folder) if path not in series and is_series(path)]
    if others:
        remark(f"{folder}: left out localizers: {listed([path.relative_to(folder) for path in others], 3)}")
    return [*files, *series] or find_scans(folder)


def _listed(entry: ListedFile) -> HealthyScan:
    image, *channels = entry.images
    require_volume(image)
    if channels:
        raise _several_channels(image)
    return HealthyScan(entry.name, image, entry.labels[0] if entry.labels else None, entry.patient)


def _several_channels(image: Path) -> InputError:
    return InputError(image, "one of several channels of a scan", "scans of one channel", "give one of them")


def require_volume(scan: Path) -> None:
    """InputError for an image file: anomaly detection needs volumes."""
    if is_image(scan):
        raise InputError(scan, "a 2D picture", "a volume", "give NIfTI, NRRD or MetaImage files, or DICOM series")


@dataclass(frozen=True)
class HealthySource:
    """The scans that `medseg train-anomaly` learns from.

    Attributes:
        scans: scans that give healthy slices.
        exclude_labelled: slices closer than this to a labelled slice are left out; None if no voxel may be labelled.
        unhealthy: scans whose labelled slices are the class "unhealthy"; all slices of scans without labels.
        splits: patient -> split.
    """

    scans: tuple[HealthyScan, ...]
    exclude_labelled: int | None
    unhealthy: tuple[HealthyScan, ...]
    splits: dict[str, SplitName]


def healthy_source(
    healthy: Path | FileList,
    exclude_labelled: int | None,
    unhealthy: Path | FileList | None,
    held_out: tuple[int, int],
) -> HealthySource:
    """Find the scans and split their patients as `split_by_hash` does.

    Args:
        healthy: healthy scans, or scans with labelled lesions.
        exclude_labelled: see `HealthySource`.
        unhealthy: the scans for the class "unhealthy", or None.
        held_out: number of patients in the test and in the validation split.

    Raises:
        InputError: no scans, or too few to hold out this many.
        UsageError: ``exclude_labelled`` for scans without labels.
    """
    scans = find_healthy(healthy)
    splits = split_of_patients([scan.patient for scan in scans], *held_out)
    others = find_healthy(unhealthy) if unhealthy is not None else []
    if exclude_labelled is not None and all(scan.label is None for scan in scans):
        raise UsageError(
            f"{healthy}: has no labels, so --exclude-labelled {exclude_labelled} leaves nothing out and lesions would "
            "be trained on as healthy; add labels, or leave the option out if all scans are healthy"
        )
    # Patients of the healthy folder keep their split. All other patients are for training.
    return HealthySource(tuple(scans), exclude_labelled, tuple(others), splits)


def healthy_slices(label: Tensor | None, count: int, exclude_labelled: int | None) -> Tensor:
    """Which of ``count`` slices are healthy, bool (count,).

    A slice is healthy if no slice closer than ``exclude_labelled`` is labelled.

    Args:
        label: (I, J, K) on the model's grid, above 0 in lesions, or None.
        count: number of slices, K.
        exclude_labelled: distance in slices; 1 leaves out only the labelled slices. None leaves out nothing.
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
    """InputError for a scan of another modality, or of a shape that does not suit images of ``size``.

    Args:
        volume: the scan.
        shape: (I, J, K) on the model's grid.
        size: two sides for slices, three for volumes. A volume must fill at least a quarter of each side.
        modality: DICOM modality of the model; None accepts any.
    """
    scan_modality = volume.header.modality
    if scan_modality and modality and scan_modality != modality:
        raise InputError(volume.source, f"modality {scan_modality}", modality, "use a model that was made for it")
    if len(size) == 3:
        fewest = [-(-m // 4) for m in size]  # a thinner volume would be mostly padding
        fits = all(low <= n <= m for n, m, low in zip(shape, size, fewest, strict=True))
        expected = f"{' x '.join(map(str, fewest))} to {' x '.join(map(str, size))}"
        remedy = "cut it to the region that the model was trained on, or use a model of slices"
    else:
        shape = shape[:2]
        fits = 4 * min(shape) >= max(shape)
        expected = "axial slices of which no side is less than a quarter of the other"
        remedy = "give the whole volume, not a single sagittal or coronal slice"
    if not fits:
        raise InputError(volume.source, f"{' x '.join(map(str, shape))} voxels on the model's grid", expected, remedy)


def packed_healthy(
    source: HealthySource,
    store: Path,
    size: Sequence[int],
    channels: int,
    preprocessing: Preprocessing,
    modality: str | None = None,
    on_scan: Callable[[int, int], None] = lambda done, total: None,
) -> PackedImages:
    """The healthy slices (or whole healthy volumes) of the scans as packed images, and the unhealthy ones as class 1.

    Slices without lesions are mostly at the top and the bottom of the scans. A model would learn little of the middle
    from them, and a classifier would mistake the height for the disease. Slices are therefore repeated, at most
    `MOST_REPEATS` times, so that each height is drawn about as often as it occurs in the scans.

    Raises:
        InputError: an unusable scan, another modality, labelled voxels although ``source.exclude_labelled`` is None,
            or no image to train on.
    """
    everything = [*source.scans, *source.unhealthy]
    files = [path for scan in everything for path in (scan.image, scan.label) if path is not None]
    about: list[object] = [file_states(files), [(scan.name, scan.patient) for scan in everything], source.splits]
    about += [source.exclude_labelled, len(source.scans), list(size), channels, VERSION, HEIGHTS, MOST_REPEATS]
    key = hashlib.sha256(json.dumps([*about, asdict(preprocessing)]).encode()).hexdigest()[:16]
    folder = store / f"healthy-{'x'.join(map(str, size))}-{key}"

    missing: Counter[str] = Counter()
    draws: list[int] = []

    def rows() -> Iterator[Row]:
        first, heights = 0, _Heights()
        for done, scan in enumerate(everything, 1):
            label = HEALTHY if done <= len(source.scans) else UNHEALTHY
            split: SplitName = source.splits.get(scan.patient, "train")
            volume = read_volume(scan.image)
            image, placement = preprocessing.apply(volume)
            require_usable(volume, placement.shape, size, modality)
            lesions = lesion_map(scan, placement)
            if label == HEALTHY:
                refuse_lesions(scan, source.exclude_labelled)
            if len(size) == 2:
                visible, of_class = _slices(image, lesions, label, source.exclude_labelled)
                images = image.movedim(-1, 0)[visible & of_class]
                if split == "train":
                    heights.add(first, label, visible, of_class)
            else:
                marked = lesions is not None and bool(lesions.any())
                images = image[None] if label == UNHEALTHY or not marked else image[None][:0]
            first += len(images)
            if label == HEALTHY:
                missing[split] += int((visible & ~of_class).sum()) if len(size) == 2 else 1 - len(images)
            levels = ((to_generator_grid(images.clamp(-1, 1), size) + 1) * 127.5).round().to(torch.uint8)
            pixels = levels.movedim(1, -1).expand(*levels.shape[:1], *size, channels).numpy()
            yield Row(scan.name, label, split, pixels)
            on_scan(done, len(everything))
        draws.extend(heights.draws())

    if not (folder / "index.json").is_file():
        with whole_folder(folder) as temporary:
            classes = CLASSES if source.unhealthy else ()
            near, shape, held_out = source.scans[0].image.parent, (*size, channels), Bounds.of(source.splits)
            write_packed(temporary, rows(), near, shape, classes, draws=draws, held_out=held_out)
            (temporary / LEFT_OUT).write_text(json.dumps(missing))
    return open_packed(folder)


LEFT_OUT = "left_out.json"


def left_out(images: PackedImages) -> Counter[SplitName]:
    """Split -> number of slices (or volumes) that were not packed because a lesion is in or near them."""
    return Counter(json.loads((images.folder / LEFT_OUT).read_text()))


def _slices(image: Tensor, lesions: Tensor | None, label: int, exclude_labelled: int | None) -> tuple[Tensor, Tensor]:
    """Which slices are not empty, and which are of the class ``label``; both bool (K,)."""
    count = image.shape[-1]
    if label == HEALTHY:
        of_class = healthy_slices(lesions, count, exclude_labelled)
    else:
        of_class = torch.ones(count, dtype=torch.bool) if lesions is None else lesions.flatten(0, 1).any(0)
    return (image > -0.9).flatten(0, 2).float().mean(0) >= LEAST_FOREGROUND, of_class


class _Heights:
    """Counts the slices of training scans at each height, to repeat slices where many were left out."""

    def __init__(self) -> None:
        self.visible = np.zeros((2, HEIGHTS), int)  # non-empty slices of the scans, by class and band
        self.packed = np.zeros((2, HEIGHTS), int)  # those of them that are packed
        self.positions: list[tuple[int, int, int]] = []  # position among the packed images, class, band

    def add(self, first: int, label: int, visible: Tensor, of_class: Tensor) -> None:
        """Count a scan of class ``label``. Its visible slices of the class are packed from position ``first`` on."""
        bands = (torch.arange(len(visible)) * HEIGHTS // len(visible)).numpy()
        packed = bands[(visible & of_class).numpy()]
        np.add.at(self.visible[label], bands[visible.numpy()], 1)
        np.add.at(self.packed[label], packed, 1)
        self.positions += [(first + i, label, int(band)) for i, band in enumerate(packed)]

    def draws(self) -> list[int]:
        """The positions of the packed slices, each 1 to `MOST_REPEATS` times."""
        times = np.clip(np.rint(self.visible / np.maximum(self.packed, 1)), 1, MOST_REPEATS).astype(int)
        return [position for position, label, band in self.positions for _ in range(times[label, band])]


TRAINED_ON = "trained_on"
"""Key of a model's card: `names_of` the scans that its networks learned from."""


def names_of(scans: Sequence[HealthyScan]) -> list[str]:
    """The `digest` of the names of scans and of their patients, sorted."""
    return sorted({digest(name) for scan in scans for name in (scan.name, scan.patient)})


def refuse_trained(scans: Sequence[HealthyScan], trained_on: Sequence[str]) -> None:
    """InputError if a scan, or its patient, has one of the names ``trained_on`` (`names_of`)."""
    seen = set(trained_on)
    trained = [scan for scan in scans if seen.intersection(names_of([scan]))]
    if trained:
        more = f" and {len(trained) - 1} more" if len(trained) > 1 else ""
        raise InputError(
            trained[0].image,
            f"a scan of a name that the model was trained on{more}",
            "scans of other patients, whose scores are not too low",
            "take it out of the folder, or rename it if it is another patient's",
        )


def refuse_lesions(scan: HealthyScan, exclude_labelled: int | None) -> None:
    """InputError for a scan with labelled voxels if ``exclude_labelled`` is None."""
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
