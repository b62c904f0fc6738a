"""Chooses a few labelled images of a folder and resamples them to a generator's grid."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from medseg_diffusion.config.pixel_classifier import PixelClassifierConfig
from medseg_diffusion.config.segmenter import DataSection
from medseg_diffusion.config.shared import warn_of_unused
from medseg_diffusion.data.cases import Case, CaseFolder, Split, find_cases, split_by_hash
from medseg_diffusion.data.file_lists import FileList
from medseg_diffusion.data.mask_examples import CaseFormat, PreparedCase, prepare
from medseg_diffusion.diffusion.noise import derive_seed
from medseg_diffusion.errors import InputError, UsageError
from medseg_diffusion.methods.activations import Activations
from medseg_diffusion.methods.labelled_pixels import FEWEST_PIXELS
from medseg_diffusion.methods.seen import Seen
from medseg_diffusion.models.generator import Generator
from medseg_diffusion.models.pixel_segmenter import pixel_activations, pixel_preprocessing
from medseg_diffusion.volumes.fitting import labels_to_generator_grid, to_generator_grid
from medseg_diffusion.volumes.io import read_map

from .training_scans import seen_in_cases

Unit = Literal["case", "slice"]
Select = Literal["hash", "diverse"]


@dataclass(frozen=True)
class Labelling:
    """The choice of the labelled images.

    Attributes:
        count: Number K of labelled cases or slices.
        unit: "case", or "slice" for single slices that show a class above background.
        select: "hash" takes the first K images of the training side, ordered by a hash of name and ``seed``. "diverse"
            takes the image nearest to each centre of K clusters of the generator's features.
        seed: Seed of the choice.
    """

    count: int
    unit: Unit = "case"
    select: Select = "hash"
    seed: int = 0


@dataclass(frozen=True, eq=False)
class LabelledUnit:
    """A labelled case or slice. ``images`` is (n, C, *size), ``labels`` is (n, *size); n is 1 for a slice."""

    name: str
    images: Tensor
    labels: Tensor


@dataclass(frozen=True, eq=False)
class LabelledData:
    """The chosen units of a folder, with the generator's number of channels; a single channel is repeated.

    Attributes:
        units: The labelled images.
        channels: Names of the scans' channels.
        labels: Label value -> class name.
        folder: The cases of the folder.
        split: The split of the cases.
        seen: What the images measured; of labelled cases, their labels too. None for too few of them.
    """

    units: list[LabelledUnit]
    channels: tuple[str, ...]
    labels: dict[int, str]
    folder: CaseFolder
    split: Split
    seen: Seen | None


def labelled_units(
    config: PixelClassifierConfig,
    generator: Generator,
    data: Path | FileList,
    labelling: Labelling,
    cache: Path,
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> LabelledData:
    """Choose the labelled images of a folder and resample them to the generator's grid.

    Args:
        config: Configuration of the pixel classifiers.
        generator: The generator, which decides the grid.
        data: Folder or list of labelled scans.
        labelling: The choice of the images.
        cache: Folder for preprocessed cases.
        on_progress: Called with (what is done, done, total).

    Raises:
        UsageError: Classes without names, or more test cases than the generator held out.
        InputError: Unusable data, or fewer labelled images than requested.
    """
    folder = find_cases(data)
    if several := next((case for case in folder.cases if case.further_labels), None):
        raise InputError(
            str(data), f"{len(several.labels)} readers of case {several.name}", "one mask for each image",
            "put the masks to learn from into labels/",
        )  # fmt: skip
    labels = _class_names(config, folder, data)
    warn_of_unused(config.data.codes, [name for value, name in labels.items() if value])
    held_out = _held_out(config, generator, data, folder.cases)
    split = split_by_hash(folder.cases, *held_out)
    training = [case for case in folder.cases if case.name in split.train]
    pool = sorted(training, key=lambda case: derive_seed(labelling.seed, case.name))
    if not pool or (labelling.unit == "case" and labelling.count > len(pool)):
        raise _too_few(data, labelling.count, len(pool), "cases", held_out)
    # Without clustering, only the chosen cases are read.
    all_are_read = labelling.unit == "slice" or labelling.select == "diverse"
    channels = _channels(pool[0].image, generator.config.data.channels)
    cases = prepare(
        pool if all_are_read else pool[: labelling.count],
        pixel_preprocessing(generator),
        CaseFormat(channels, len(labels)),
        cache,
        lambda done, total: on_progress("cases", done, total),
        slices=len(generator.config.data.shape) == 2,
    )
    units = _chosen(config, generator, cases, labelling, len(labels))
    if labelling.count > len(units):
        shown = "every" if labelling.count == 1 else "a"
        what = f"slices that show {shown} class" if labelling.unit == "slice" else "cases"
        raise _too_few(data, labelling.count, len(units), what, held_out)
    names = folder.channels if len(folder.channels) == channels else tuple(f"channel {i}" for i in range(channels))
    used, whole = {unit.name for unit in units}, labelling.unit == "case"
    seen = seen_in_cases(
        [case for case in cases if not whole or case.name in used],
        folder,
        pixel_preprocessing(generator),
        labels,
        len(generator.config.data.shape),
        masks=whole,
    )
    return LabelledData(units, names, labels, folder, split, seen)


def _class_names(config: PixelClassifierConfig, folder: CaseFolder, data: Path | FileList) -> dict[int, str]:
    """Label value -> class name, from the configuration or else from the folder."""
    names = config.data.labels or tuple(folder.labels[value] for value in sorted(folder.labels) if value)
    if not names:
        raise UsageError(f"{data}: the names of labels 1, 2, ... are unknown; add --set data.labels=[...]")
    labels = dict(enumerate(["background", *names]))
    if folder.labels and set(folder.labels) != set(labels):
        raise UsageError(
            f"{data}: dataset.json names labels {', '.join(map(str, sorted(folder.labels)))}, but "
            f"{'data.labels names' if config.data.labels else 'classes are'} 0 to {len(names)}; number them without "
            "gaps, and name all of them"
        )
    return labels


def _channels(image: Path, channels: int) -> int:
    """Number of channels of the scans: that of the generator's images, or one, which is repeated."""
    count = len(read_map(image).data)
    if count not in (1, channels):
        raise InputError(
            image,
            f"{count} channels",
            "a single one, as the generator's images" if channels == 1 else f"{channels}, as the generator's, or one",
            "convert the images, or use a generator of such images",
        )
    return 1 if count == 1 else channels


def _chosen(
    config: PixelClassifierConfig,
    generator: Generator,
    cases: Sequence[PreparedCase],
    labelling: Labelling,
    num_classes: int,
) -> list[LabelledUnit]:
    """The chosen images; fewer than requested if there are too few."""
    size, count, seed = generator.config.data.shape, labelling.count, labelling.seed
    shape = (generator.config.data.channels, *size)

    def candidates() -> Iterator[LabelledUnit]:
        units = _candidates(cases, size, labelling.unit, num_classes, count == 1, seed)
        return (replace(unit, images=unit.images.expand(-1, *shape)) for unit in units)

    if labelling.select == "hash":
        return list(islice(candidates(), count))
    activations = pixel_activations(generator, config, [])
    first = activations.with_blocks(activations.decoder_blocks()[:1])
    order = _diverse([_pooled(unit, first) for unit in candidates()], count, seed)
    chosen = {i: unit for i, unit in enumerate(candidates()) if i in order}
    return [chosen[i] for i in order]


def _held_out(
    config: PixelClassifierConfig, generator: Generator, data: Path | FileList, cases: Sequence[Case]
) -> tuple[int, int]:
    """Numbers of test and validation patients: those of the configuration, or else those that the generator held out.

    Raises:
        UsageError: More test patients than the generator held out.
    """
    section = config.data
    if generator.held_out is None:  # it is unknown what the generator has seen
        defaults = DataSection.model_fields
        test, validation = defaults["test_cases"].default, defaults["validation_cases"].default
    else:
        patients = [case.patient for case in cases]
        test, validation = generator.held_out.count(patients)
        if section.test_cases is not None and section.test_cases > test:
            raise UsageError(
                f"data.test_cases={section.test_cases}: the generator held out only {test} of the {len(set(patients))} "
                f"patients in {data} for testing; leave the key out, or train the generator with more data.test_images"
            )
    return (
        test if section.test_cases is None else section.test_cases,
        validation if section.validation_cases is None else section.validation_cases,
    )


def _candidates(
    cases: Sequence[PreparedCase], size: Sequence[int], unit: Unit, num_classes: int, every_class: bool, seed: int
) -> Iterator[LabelledUnit]:
    """Yield the cases in their order, or slices in the order of a hash, on the generator's grid.

    A slice needs at least `FEWEST_PIXELS` pixels of one class above background, or with ``every_class`` of all classes.

    Raises:
        InputError: A volume that is larger than those of the generator, or a 2D image for a generator of volumes.
    """
    if unit == "case":
        for case in cases:
            image, label = case.image.float().clamp(-1, 1), case.label
            if len(size) == 2:
                images, masks = image.movedim(-1, 0), label.movedim(-1, 0)
            elif 1 in label.shape:
                shape = " x ".join(str(n) for n in label.shape if n > 1)
                raise InputError(case.name, f"a 2D image ({shape})", "volumes", "use a generator of images or slices")
            elif all(n <= m for n, m in zip(label.shape, size, strict=True)):
                images, masks = image[None], label[None]
            else:
                raise InputError(
                    case.name,
                    f"{' x '.join(map(str, label.shape))} voxels on the generator's grid",
                    f"at most {' x '.join(map(str, size))}",
                    "cut the scans to the region that the generator was trained on, or use a generator of slices",
                )
            yield LabelledUnit(case.name, to_generator_grid(images, size), labels_to_generator_grid(masks, size))
        return
    places = [
        (f"{case.name}, slice {k}", case, slice(k, k + 1))
        for case in cases
        for k in case.label.flatten(0, 1).any(0).nonzero().flatten().tolist()
    ]
    for name, case, part in sorted(places, key=lambda place: derive_seed(seed, place[0])):
        masks = labels_to_generator_grid(case.label[..., part].movedim(-1, 0), size)
        enough = torch.bincount(masks.flatten(), minlength=num_classes) >= FEWEST_PIXELS
        if enough.all() if every_class else enough[1:].any():
            image = case.image[..., part].float().clamp(-1, 1).movedim(-1, 0)
            yield LabelledUnit(name, to_generator_grid(image, size), masks)


@torch.no_grad()
def _pooled(unit: LabelledUnit, activations: Activations) -> Tensor:
    """Mean activations (F,) over a unit's images."""
    device = activations.noise.device
    parts = [activations(image[None].to(device)) for image in unit.images]
    pooled = [torch.cat([block.float().flatten(2).mean(2)[0] for block in part]) for part in parts]
    return torch.stack(pooled).mean(0).double().cpu()


def _diverse(pooled: Sequence[Tensor], count: int, seed: int) -> list[int]:
    """Indices of the units nearest to ``count`` cluster centres of pooled activations, none twice; all if too few."""
    if len(pooled) <= count:
        return list(range(len(pooled)))
    from scipy.cluster.vq import kmeans2  # slow to import

    features = torch.stack(list(pooled))
    features = (features - features.mean(0)) / features.std(0, correction=0).clamp(min=1e-9)
    centres, _ = kmeans2(features.numpy(), count, minit="++", seed=derive_seed(seed, "clusters") % 2**32)
    distance = torch.cdist(torch.from_numpy(centres), features)
    taken: list[int] = []
    for row in distance:
        free = row.clone()
        free[taken] = float("inf")
        taken.append(int(free.argmin()))
    return taken


def _too_few(data: Path | FileList, requested: int, available: int, what: str, held_out: tuple[int, int]) -> InputError:
    return InputError(
        str(data),
        f"{available} labelled {what} to choose from",
        f"at least the {requested} asked for",
        f"lower --labelled, or data.test_cases ({held_out[0]}) and data.validation_cases ({held_out[1]})",
    )
