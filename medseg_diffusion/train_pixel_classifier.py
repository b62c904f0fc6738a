"""A generator and a few labelled images in, a segmenter out: the whole of `medseg train-pixel-classifier`.

RUN/config.yaml     resolved configuration
RUN/labelled.json   which images were labelled, and how they were chosen
RUN/model/          the segmenter, with its generator in it
RUN/test/           masks of the held-out cases, with report.html, summary.json and cases.csv
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor

from . import build
from .checkpoint import SavedModel, load_model_files, save_model
from .config import PixelClassifierConfig
from .data.cases import Case, CaseFolder, Split, find_cases, split_by_hash
from .data.mask_examples import PreparedCase, prepare
from .diffusion.noise import derive_seed
from .errors import InputError, UsageError
from .evaluation import Evaluation, evaluate
from .generator import Generator, restore_generator
from .methods.activations import Activations
from .methods.label_efficient import ClassifierOptions, choose_blocks, fit_classifiers, labelled_pixels
from .pipeline import SegmentationModel
from .reports.card import pixel_classifier_card
from .segmenter import GENERATOR, pixel_activations, pixel_inference
from .training.run import start_run, versions, write_json
from .training.runtime import choose_device, keep_freed_memory, tune
from .volumes.fitting import fitted, fitted_labels
from .volumes.io import read_volume, write_labels

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
    """The chosen units of a folder, its classes by value, its cases and their sides."""

    units: list[LabelledUnit]
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
        UsageError: options that do not fit, an empty class, or a generator without activations.
        InputError: unusable data, or more labelled images asked for than there are.
        ModelError: no usable generator.
    """
    chosen_device = choose_device(device)
    tune(chosen_device)
    keep_freed_memory()
    saved = load_model_files(generator)
    restored = restore_generator(saved, chosen_device)
    dims = len(restored.config.data.shape)
    if unit == "slice" and dims == 3:
        raise UsageError("--unit slice: the generator makes volumes, so cases are labelled")
    new = not run.exists()
    start_run(run, {**config.model_dump(mode="json"), "seed": seed, "generator_sha256": saved.sha256}, resume=False)
    try:
        return _trained(config, restored, saved, data, labelled, run, unit, select, test, seed, on_progress)
    except (InputError, UsageError):
        if new:  # so that the corrected command can be given again
            shutil.rmtree(run)
        raise


def _trained(
    config: PixelClassifierConfig,
    restored: Generator,
    saved: SavedModel,
    data: Path,
    labelled: int,
    run: Path,
    unit: Unit,
    select: Select,
    test: bool,
    seed: int,
    on_progress: Callable[[str, int, int], None],
) -> TrainedPixelClassifier:
    found = labelled_units(config, restored, data, labelled, run / "cache", unit, select, seed, on_progress)
    units, labels, split, folder = found.units, found.labels, found.split, found.folder
    images = [image for one in units for image in one.images]
    masks = [mask.long() for one in units for mask in one.labels]
    every = pixel_activations(restored, config, [])
    blocks = _blocks(config, every, images, masks, len(labels), seed)
    activations = every.with_blocks(blocks)
    pixels = labelled_pixels(
        activations,
        images,
        masks,
        len(labels),
        config.data.pixels_per_class,
        seed,
        run / "cache" / "features.npy",
        lambda done, total: on_progress("features of labelled images", done, total),
    )
    classifiers = fit_classifiers(
        pixels,
        ClassifierOptions(**config.classifier.model_dump()),
        seed,
        restored.device,
        lambda done, total: on_progress("classifiers", done, total),
    )
    chosen = tuple(one.name for one in units)
    write_json(run / "labelled.json", {"unit": unit, "select": select, "seed": seed, "labelled": chosen})
    summary = {
        "labelled": f"{labelled} {unit}{'s' if labelled > 1 else ''}, chosen by {select}",
        "cases": ", ".join(chosen),
        "pixels": len(pixels.labels),
    }
    card = _card(config, restored, saved, labels, folder.channels, blocks, seed, summary)
    weights = {**classifiers.state_dict(), **{GENERATOR + name: value for name, value in saved.weights.items()}}
    del pixels
    shutil.rmtree(run / "cache", ignore_errors=True)
    save_model(run / "model", card, weights, pixel_classifier_card(card))
    scores = None
    if test and split.test:
        held_out = [case for case in folder.cases if case.name in split.test]
        scores = _scored(run, held_out, labels, str(restored.device), seed, on_progress)
        card["metrics"] = {"test": {f"dice {labels[k].replace('_', ' ')}": v.mean for k, v in scores.dice.items()}}
        save_model(run / "model", card, weights, pixel_classifier_card(card))
    return TrainedPixelClassifier(run / "model", chosen, blocks, scores)


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
    split = split_by_hash(folder.cases, config.data.test_cases, config.data.validation_cases)
    pool = sorted((case for case in folder.cases if case.name in split.train), key=lambda c: derive_seed(seed, c.name))
    if unit == "case" and labelled > len(pool):
        raise _too_few(data, labelled, len(pool), "cases", config)
    # Without clustering, cases that are not chosen are not even read.
    read = pool if unit == "slice" or select == "diverse" else pool[:labelled]
    cases = prepare(
        read,
        build.preprocessing(generator.config.preprocessing),
        generator.config.data.channels,
        len(labels),
        cache,
        lambda done, total: on_progress("cases", done, total),
    )
    units = _units(cases, generator.config.data.shape, unit, seed)
    if labelled > len(units):
        raise _too_few(data, labelled, len(units), f"{unit}s", config)
    if select == "diverse":
        every = pixel_activations(generator, config, [])
        units = _diverse(units, labelled, every.with_blocks(every.decoder_blocks()[:1]), seed)
    return LabelledData(units[:labelled], labels, folder, split)


def _units(cases: Sequence[PreparedCase], size: Sequence[int], unit: Unit, seed: int) -> list[LabelledUnit]:
    """Every labelled image on the generator's grid, in the order of the cases, or of a hash for slices."""
    units = []
    for case in cases:
        image, label = case.image.float().clamp(-1, 1), case.label
        if len(size) == 3:
            units.append(LabelledUnit(case.name, fitted(image[None], size), fitted_labels(label[None], size)))
            continue
        slices, masks = image.movedim(-1, 0), label.movedim(-1, 0)
        if unit == "case":
            units.append(LabelledUnit(case.name, fitted(slices, size), fitted_labels(masks, size)))
            continue
        for k in masks.flatten(1).any(1).nonzero().flatten().tolist():
            one = slice(k, k + 1)
            units.append(
                LabelledUnit(f"{case.name}, slice {k}", fitted(slices[one], size), fitted_labels(masks[one], size))
            )
    return units if unit == "case" else sorted(units, key=lambda one: derive_seed(seed, one.name))


@torch.no_grad()
def _diverse(units: list[LabelledUnit], count: int, activations: Activations, seed: int) -> list[LabelledUnit]:
    """The unit nearest to each of ``count`` cluster centres of mean activations; further ones by their order."""
    device = activations.noise.device
    rows = []
    for one in units:
        parts = [activations(image[None].to(device)) for image in one.images]
        pooled = [torch.cat([block.float().flatten(2).mean(2)[0] for block in part]) for part in parts]
        rows.append(torch.stack(pooled).mean(0).cpu())
    features = torch.stack(rows).double()
    features = (features - features.mean(0)) / features.std(0, correction=0).clamp(min=1e-9)
    centres, _ = kmeans2(features.numpy(), count, minit="++", seed=derive_seed(seed, "clusters") % 2**32)
    distance = torch.cdist(torch.from_numpy(centres), features)
    taken: list[int] = []
    for row in distance:
        free = row.clone()
        free[taken] = float("inf")
        taken.append(int(free.argmin()))
    return [units[i] for i in taken]


def _blocks(
    config: PixelClassifierConfig,
    every: Activations,
    images: Sequence[Tensor],
    masks: Sequence[Tensor],
    num_classes: int,
    seed: int,
) -> tuple[str, ...]:
    if config.features.blocks != "auto":
        return tuple(f"decoder.{i}" for i in config.features.blocks)
    return choose_blocks(every, images, masks, num_classes, seed)


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
        volume = read_volume(case.image, channels=None)
        found = model.segment(volume, derive_seed(seed, case.name))
        name = case.name.replace("/", "__")
        write_labels(found.labels, volume, masks / f"{name}_seg.nii.gz")
        suffix = "".join(case.label.suffixes[-2:]) if case.label.name.endswith(".gz") else case.label.suffix
        (references / f"{name}{suffix}").symlink_to(case.label.resolve())
        on_progress("held-out cases", done, len(cases))
    known = {value: name for value, name in labels.items() if value}
    try:
        return evaluate(masks, references, run / "test", labels=known, seed=seed)
    finally:
        shutil.rmtree(references)


def _too_few(data: Path, wanted: int, there: int, what: str, config: PixelClassifierConfig) -> InputError:
    section = config.data
    return InputError(
        data,
        f"{there} labelled {what} to choose from",
        f"at least the {wanted} asked for",
        f"lower --labelled, or data.test_cases ({section.test_cases}) and data.validation_cases "
        f"({section.validation_cases})",
    )


def _card(
    config: PixelClassifierConfig,
    generator: Generator,
    saved: SavedModel,
    labels: dict[int, str],
    channels: Sequence[str],
    blocks: Sequence[str],
    seed: int,
    summary: dict[str, Any],
) -> dict[str, Any]:
    inference = pixel_inference(generator, config)
    return {
        "task": "mask",
        "method": config.method,
        "dims": len(generator.config.data.shape),
        "labels": {str(value): name for value, name in labels.items()},
        "channels": list(channels),
        "config": config.model_dump(mode="json"),
        "blocks": list(blocks),
        "ensemble": inference.ensemble,
        "generator": saved.card,
        "training": {"seed": seed, "generator_sha256": saved.sha256, "data": summary},
        "metrics": {},
        "licence": "see the training data",
        "versions": versions(),
    }
