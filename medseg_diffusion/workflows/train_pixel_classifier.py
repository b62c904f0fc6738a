"""A generator and a few labelled images in, a segmenter out: the whole of `medseg train-pixel-classifier`.

RUN/config.yaml     resolved configuration
RUN/labelled.json   which images were labelled, and how they were chosen
RUN/model/          the segmenter, with its generator in it
RUN/test/           masks of the held-out cases and their references, with report.html, summary.json and cases.csv
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor

from medseg_diffusion import build
from medseg_diffusion.config.pixel_classifier import PixelClassifierConfig
from medseg_diffusion.config.segmenter import DataSection
from medseg_diffusion.data.augmentation import Augmenter
from medseg_diffusion.data.cases import Case, CaseFolder, Split, find_cases, split_by_hash
from medseg_diffusion.data.mask_examples import PreparedCase, prepare
from medseg_diffusion.device import choose_device, keep_freed_memory, tune
from medseg_diffusion.diffusion.noise import derive_seed
from medseg_diffusion.errors import InputError, UsageError
from medseg_diffusion.files import write_json
from medseg_diffusion.methods.activations import Activations
from medseg_diffusion.methods.label_efficient import (
    FEWEST_PIXELS,
    ClassifierOptions,
    choose_blocks,
    fit_classifiers,
    labelled_pixels,
)
from medseg_diffusion.models.generator import Generator, restore_generator
from medseg_diffusion.models.pixel_segmenter import GENERATOR, pixel_activations, pixel_inference, pixel_preprocessing
from medseg_diffusion.models.store import SavedModel, load_model_files, save_model
from medseg_diffusion.reports.card import pixel_classifier_card
from medseg_diffusion.training.run import start_run, versions
from medseg_diffusion.volumes.fitting import fitted, fitted_labels
from medseg_diffusion.volumes.io import read_labels, read_map, read_volume, write_labels

from .evaluate import EvaluateOptions, Evaluation, evaluate
from .segment import SegmentationModel

Unit = Literal["case", "slice"]
Select = Literal["hash", "diverse"]


@dataclass(frozen=True)
class TrainedPixelClassifier:
    """The model directory, what was labelled, and the scores of the held-out cases (None without any)."""

    model: Path
    labelled: tuple[str, ...]
    blocks: tuple[str, ...]
    test: Evaluation | None


@dataclass(frozen=True, eq=False)
class LabelledUnit:
    """One labelled image: a case, or a slice of one. ``images`` (n, C, *size), ``labels`` (n, *size)."""

    name: str
    images: Tensor
    labels: Tensor


@dataclass(frozen=True, eq=False)
class LabelledData:
    """The chosen units of a folder, the names of its scans' channels, its classes by value, its cases and their sides.

    Units have as many channels as the generator: a single one is repeated.
    """

    units: list[LabelledUnit]
    channels: tuple[str, ...]
    labels: dict[int, str]
    folder: CaseFolder
    split: Split


def train_pixel_classifier(
    config: PixelClassifierConfig,
    generator: str | Path,
    data: Path,
    labelled: int,
    run: Path,
    *,
    unit: Unit = "case",
    select: Select = "hash",
    test: bool = True,
    device: str = "auto",
    seed: int = 0,
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> TrainedPixelClassifier:
    """Trains pixel classifiers of a generator's activations on a few labelled images, and scores them.

    Args:
        config: of method label-efficient.
        generator: a trained or imported generator, folder or installed name.
        data: a folder of labelled scans; labels of other cases than the chosen ones are used for the scores alone, and
            with ``unit`` "slice" to find slices that show something.
        labelled: number K of labelled cases or slices.
        run: the run directory, new.
        unit: "case", or "slice" for single slices that show a class above background.
        select: "hash" takes the first K of the training side in an order of names and ``seed``; "diverse" the one
            nearest to each centre of K clusters of the generator's features.
        test: whether the held-out cases are segmented and scored.
        device: auto, cpu, cuda, cuda:N or mps.
        seed: of the choice, the pixels and the classifiers.
        on_progress: called with (what is done, done, total).

    Raises:
        UsageError: options that do not fit, or a run folder that is not empty.
        InputError: unusable data, an empty class, or more labelled images asked for than there are. What is wrong with
            a held-out case leaves the model in place.
        ModelError: no usable generator, or one without activations.
    """
    chosen_device = choose_device(device)
    tune(chosen_device)
    keep_freed_memory()
    saved = load_model_files(generator)
    restored = restore_generator(saved, chosen_device)
    if unit == "slice" and len(restored.config.data.shape) == 3:
        raise UsageError("--unit slice: the generator makes volumes, so cases are labelled")
    blocks = config.features.blocks
    dims = len(restored.config.data.shape)
    if wrong := [axis for axis in config.augmentation.flip_axes if axis >= dims]:
        raise UsageError(f"augmentation.flip_axes: no axis {wrong[0]} in the generator's {dims}D")
    # An unfit generator is refused before any data is read.
    activations = pixel_activations(restored, config, [] if blocks == "auto" else [f"decoder.{i}" for i in blocks])
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise UsageError(f"{run}: is not an empty folder; choose another one")
    existed = run.exists()
    start_run(run, config, {"seed": seed, "generator_sha256": saved.sha256}, resume=False)
    try:
        found, blocks_used = _trained(
            config, restored, activations, saved, data, labelled, run, unit, select, seed, on_progress
        )
    except BaseException:  # so that the command can be given again
        for path in run.iterdir() if existed else [run]:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
        raise
    scores = None
    if test and found.split.test:
        held_out = [case for case in found.folder.cases if case.name in found.split.test]
        scores = _scored(run, held_out, found.labels, str(chosen_device), seed, on_progress)
        model = load_model_files(run / "model")
        dice = {f"dice {found.labels[k].replace('_', ' ')}": v.mean for k, v in scores.dice.items()}
        # The mean over no case is NaN.
        card = {**model.card, "metrics": {"test": {name: mean for name, mean in dice.items() if mean == mean}}}
        save_model(run / "model", card, model.weights, pixel_classifier_card(card))
    return TrainedPixelClassifier(run / "model", tuple(one.name for one in found.units), blocks_used, scores)


def _trained(
    config: PixelClassifierConfig,
    restored: Generator,
    activations: Activations,
    saved: SavedModel,
    data: Path,
    labelled: int,
    run: Path,
    unit: Unit,
    select: Select,
    seed: int,
    on_progress: Callable[[str, int, int], None],
) -> tuple[LabelledData, tuple[str, ...]]:
    """Trains and writes RUN/model; returns what was labelled, and the blocks."""
    found = labelled_units(config, restored, data, labelled, run / "cache", unit, select, seed, on_progress)
    images, masks = [one.images for one in found.units], [one.labels for one in found.units]
    classes = list(found.labels.values())
    augmenter = Augmenter(build.augmentation(config.augmentation), len(restored.config.data.shape))

    def change(image: Tensor, label: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        changed, mask = augmenter(image[: len(found.channels)], label, generator)
        return changed.expand_as(image), mask  # grey images stay grey

    if config.features.blocks == "auto":
        activations = activations.with_blocks(choose_blocks(activations, images, masks, classes, seed))
    pixels = labelled_pixels(
        activations,
        images,
        masks,
        classes,
        config.data.pixels_per_class,
        seed,
        run / "cache" / "features.npy",
        lambda done, total: on_progress("features of labelled images", done, total),
        copies=config.data.copies,
        change=change,
    )
    classifiers = fit_classifiers(
        pixels,
        ClassifierOptions(**config.classifier.model_dump()),
        seed,
        restored.device,
        lambda done, total: on_progress("classifiers", done, total),
    )
    chosen = [one.name for one in found.units]
    write_json(run / "labelled.json", {"unit": unit, "select": select, "seed": seed, "labelled": chosen})
    summary = {
        "labelled": f"{labelled} {unit}{'s' if labelled > 1 else ''}, chosen by {select}",
        "pixels": len(pixels.labels),
    }
    card = _card(config, restored, saved, found, activations.blocks, seed, summary)
    weights = {**classifiers.state_dict(), **{GENERATOR + name: value for name, value in saved.weights.items()}}
    del pixels
    shutil.rmtree(run / "cache", ignore_errors=True)
    save_model(run / "model", card, weights, pixel_classifier_card(card))
    return found, activations.blocks


def labelled_units(
    config: PixelClassifierConfig,
    generator: Generator,
    data: Path,
    labelled: int,
    cache: Path,
    unit: Unit = "case",
    select: Select = "hash",
    seed: int = 0,
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> LabelledData:
    """Chooses the labelled images of a folder and brings them to the generator's grid; see `train_pixel_classifier`.

    Args:
        cache: folder for preprocessed cases.
    """
    folder = find_cases(data)
    names = config.data.labels or tuple(folder.labels[value] for value in sorted(folder.labels) if value)
    if not names:
        raise UsageError(f"{data}: the names of labels 1, 2, ... are unknown; add --set data.labels=[...]")
    labels = dict(enumerate(["background", *names]))
    if folder.labels and set(folder.labels) != set(labels):
        raise UsageError(
            f"{data}: dataset.json names labels {', '.join(map(str, sorted(folder.labels)))}, but "
            f"{'data.labels' if config.data.labels else 'classes are'} 0 to {len(names)}; number them without gaps, "
            "and name all of them"
        )
    held_out = _held_out(config, generator, data, folder.cases)
    split = split_by_hash(folder.cases, *held_out)
    pool = sorted((case for case in folder.cases if case.name in split.train), key=lambda c: derive_seed(seed, c.name))
    if not pool or (unit == "case" and labelled > len(pool)):
        raise _too_few(data, labelled, len(pool), "cases", held_out)
    # Without clustering, cases that are not chosen are not even read.
    read = pool if unit == "slice" or select == "diverse" else pool[:labelled]
    count, channels = len(read_map(pool[0].image).data), generator.config.data.channels
    if count not in (1, channels):
        raise InputError(
            pool[0].image,
            f"{count} channels",
            "a single one, as the generator's images" if channels == 1 else f"{channels}, as the generator's, or one",
            "convert the images, or use a generator of such images",
        )
    channels = 1 if count == 1 else channels
    cases = prepare(
        read,
        pixel_preprocessing(generator),
        channels,
        len(labels),
        cache,
        lambda done, total: on_progress("cases", done, total),
        slices=len(generator.config.data.shape) == 2,
    )
    size = generator.config.data.shape

    def candidates() -> Iterator[LabelledUnit]:
        found = _candidates(cases, size, unit, len(labels), labelled == 1, seed)
        shape = (generator.config.data.channels, *size)
        return (replace(one, images=one.images.expand(-1, *shape)) for one in found)

    if select == "diverse":
        every = pixel_activations(generator, config, [])
        first = every.with_blocks(every.decoder_blocks()[:1])
        order = _diverse([_pooled(one, first) for one in candidates()], labelled, seed)
        chosen = {i: one for i, one in enumerate(candidates()) if i in order}
        units = [chosen[i] for i in order]
    else:
        units = list(islice(candidates(), labelled))
    if labelled > len(units):
        what = f"slices that show {'every' if labelled == 1 else 'a'} class" if unit == "slice" else "cases"
        raise _too_few(data, labelled, len(units), what, held_out)
    known = folder.channels if len(folder.channels) == channels else tuple(f"channel {i}" for i in range(channels))
    return LabelledData(units, known, labels, folder, split)


def _held_out(
    config: PixelClassifierConfig, generator: Generator, data: Path, cases: Sequence[Case]
) -> tuple[int, int]:
    """Test and validation patients: as asked for, else those on the generator's sides.

    Raises:
        UsageError: more for testing than the generator has surely not seen.
    """
    section = config.data
    if generator.held_out is None:  # nobody says what it has seen
        usual = DataSection.model_fields
        test, validation = usual["test_cases"].default, usual["validation_cases"].default
    else:
        patients = [case.patient for case in cases]
        test, validation = generator.held_out.count(patients)
        if section.test_cases is not None and section.test_cases > test:
            raise UsageError(
                f"data.test_cases={section.test_cases}: of the {len(set(patients))} patients in {data} {test} are on "
                "the side that the generator held out for testing; leave it out, or train the generator with more "
                "data.test_images"
            )
    return (
        test if section.test_cases is None else section.test_cases,
        validation if section.validation_cases is None else section.validation_cases,
    )


def _candidates(
    cases: Sequence[PreparedCase], size: Sequence[int], unit: Unit, num_classes: int, every_class: bool, seed: int
) -> Iterator[LabelledUnit]:
    """What may be labelled, on the generator's grid, one after another: cases in their order, slices in one of a hash.

    Of slices only those with `FEWEST_PIXELS` of a class above background, or of ``every_class``.

    Raises:
        InputError: a volume that is larger than those of the generator, or a picture where it makes volumes.
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
            yield LabelledUnit(case.name, fitted(images, size), fitted_labels(masks, size))
        return
    places = [
        (f"{case.name}, slice {k}", case, slice(k, k + 1))
        for case in cases
        for k in case.label.flatten(0, 1).any(0).nonzero().flatten().tolist()
    ]
    for name, case, part in sorted(places, key=lambda place: derive_seed(seed, place[0])):
        masks = fitted_labels(case.label[..., part].movedim(-1, 0), size)
        enough = torch.bincount(masks.flatten(), minlength=num_classes) >= FEWEST_PIXELS
        if enough.all() if every_class else enough[1:].any():
            yield LabelledUnit(name, fitted(case.image[..., part].float().clamp(-1, 1).movedim(-1, 0), size), masks)


@torch.no_grad()
def _pooled(unit: LabelledUnit, activations: Activations) -> Tensor:
    """The means (F,) of the activations of a unit's images."""
    device = activations.noise.device
    parts = [activations(image[None].to(device)) for image in unit.images]
    pooled = [torch.cat([block.float().flatten(2).mean(2)[0] for block in part]) for part in parts]
    return torch.stack(pooled).mean(0).double().cpu()


def _diverse(pooled: Sequence[Tensor], count: int, seed: int) -> list[int]:
    """The unit nearest to each of ``count`` cluster centres of pooled activations, none twice; all where too few."""
    if len(pooled) <= count:
        return list(range(len(pooled)))
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


def _scored(
    run: Path,
    cases: Sequence[Case],
    labels: dict[int, str],
    device: str,
    seed: int,
    on_progress: Callable[[str, int, int], None],
) -> Evaluation:
    """Segments the held-out cases and compares the masks with their references."""
    model = SegmentationModel(run / "model", device)
    masks, references = run / "test" / "masks", run / "test" / "references"
    for target in (masks, references):
        target.mkdir(parents=True)
    for done, case in enumerate(cases, 1):
        volume = read_volume(case.image, channels=model.channels)
        found = model.segment(volume, derive_seed(seed, case.name))
        name = case.name.replace("/", "__")
        write_labels(found.labels, volume, masks / f"{name}_seg.nii.gz")
        reference = read_labels(case.label)
        write_labels(reference.data[0], reference, references / f"{name}.nii.gz")
        on_progress("held-out cases", done, len(cases))
    known = {value: name for value, name in labels.items() if value}
    return evaluate(masks, references, run / "test", EvaluateOptions(labels=known, seed=seed))


def _too_few(data: Path, wanted: int, there: int, what: str, held_out: tuple[int, int]) -> InputError:
    return InputError(
        data,
        f"{there} labelled {what} to choose from",
        f"at least the {wanted} asked for",
        f"lower --labelled, or data.test_cases ({held_out[0]}) and data.validation_cases ({held_out[1]})",
    )


def _card(
    config: PixelClassifierConfig,
    generator: Generator,
    saved: SavedModel,
    found: LabelledData,
    blocks: Sequence[str],
    seed: int,
    summary: dict[str, Any],
) -> dict[str, Any]:
    inference = pixel_inference(generator, config)
    return {
        "task": "mask",
        "method": config.method,
        "dims": len(generator.config.data.shape),
        "labels": {str(value): name for value, name in found.labels.items()},
        "channels": list(found.channels),
        "config": config.model_dump(mode="json"),
        "blocks": list(blocks),
        "ensemble": inference.ensemble,
        "generator": saved.card,
        "training": {
            "seed": seed,
            "generator_sha256": saved.sha256,
            "data": summary,
            "held_out": found.split.held_out(),
        },
        "metrics": {},
        "licence": "see the training data",
        "versions": versions(),
    }
