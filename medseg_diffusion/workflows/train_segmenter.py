"""Configuration and data in, run directory out: the whole of `medseg train-segmenter` as a function.

RUN/config.yaml     resolved configuration
RUN/split.json      which case is on which side
RUN/log.csv         one row per validation; RUN/tensorboard every step
RUN/checkpoints/    last.pt: everything to resume bit-exactly
RUN/model/          the best model by validation, always loadable
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from torch import Tensor, nn

from medseg_diffusion import build
from medseg_diffusion.config.segmenter import SegmenterConfig
from medseg_diffusion.data.augmentation import Augmenter
from medseg_diffusion.data.cases import Case, Split, find_cases, split_by_hash
from medseg_diffusion.data.draws import Draws, Examples
from medseg_diffusion.data.mask_examples import MaskExamples, PreparedCase, prepare, require_every_class
from medseg_diffusion.data.synthetic_brains import LabelMap, SyntheticBrains, load_label_map, tissues
from medseg_diffusion.data.tissue import TISSUES
from medseg_diffusion.device import arranged
from medseg_diffusion.diffusion.noise import derive_seed
from medseg_diffusion.errors import ModelError, UsageError
from medseg_diffusion.methods.calibration import MEMBERS, Calibration, TemperatureFit
from medseg_diffusion.methods.segment import segment
from medseg_diffusion.methods.shape_prior import ShapePrior, average_shape
from medseg_diffusion.methods.windows import Windows
from medseg_diffusion.metrics.overlap import label_overlap
from medseg_diffusion.models.pixel_segmenter import restore_segmenter
from medseg_diffusion.models.store import load_model_files, save_model
from medseg_diffusion.reports.card import model_card
from medseg_diffusion.sampling.loop import spaced
from medseg_diffusion.tasks.latent_mask import LatentMaskDiffusion, MaskAutoencoder
from medseg_diffusion.training.autoencoder import standardise
from medseg_diffusion.training.job import training_options
from medseg_diffusion.training.run import keep_sides, require_startable, start_run, versions
from medseg_diffusion.training.runtime import Runtime
from medseg_diffusion.training.trainer import Callbacks, Progress, TrainingRun, fit
from medseg_diffusion.volumes.paths import find_scans, scan_name

STANDARDISE_CASES = 64
"""Training masks over which mean and deviation of mask latents are estimated."""

VALIDATION_WINDOWS = 12
"""Synthetic windows, of the held-out anatomies, on which training from label maps is validated."""


@dataclass(frozen=True)
class TrainingData:
    """What a source provides: training examples, prepared validation cases, class names, a summary, a shape prior."""

    examples: Examples
    validation: list[PreparedCase]
    labels: dict[int, str]
    channels: tuple[str, ...]
    summary: dict[str, Any]
    split: Split
    shape: ShapePrior | None = None


def train_segmenter(
    config: SegmenterConfig,
    data: Path,
    run: Path,
    *,
    resume: bool = False,
    init: str | Path | None = None,
    max_steps: int | None = None,
    time_limit_min: float | None = None,
    device: str = "auto",
    seed: int = 0,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_prepare: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Trains the segmenter of ``config`` on the folder ``data`` and returns the model directory.

    Where the time ends before an autoencoder of masks is trained, its model directory is returned.
    Ctrl-C leaves a resume file and a loadable model behind.

    Args:
        config: the whole configuration.
        data: a Decathlon or image-mask folder, or a folder of label maps (data.source brain-labelmaps).
        run: the run directory, new unless ``resume``.
        resume: continue an interrupted run with the configuration that it was started with.
        init: a trained model (folder or installed name) whose weights the run starts from instead of random ones; the
            model card names it.
        max_steps: stop at this step; the learning rate follows config.training.max_steps. An autoencoder of masks that
            comes first is not shortened.
        time_limit_min: stop after so many minutes of this call.
        device: auto, cpu, cuda, cuda:N or mps.
        seed: of weights, order, augmentation, times and noise.
        on_progress: called after every step.
        on_prepare: called after every prepared case with (done, total).

    Raises:
        UsageError: the run exists and ``resume`` is off, or it was started with another configuration or never.
        InputError: unusable data or resume file.
        ModelError: ``init`` is missing or another network.
    """
    runtime = Runtime(device, config.training.precision)
    source = _brain_labelmaps if config.data.source == "brain-labelmaps" else _scans
    origin = _origin(init, run, resume)
    if runtime.is_main:
        noted = {"seed": seed, **({} if origin is None else {"init": origin})}
        require_startable(run, config, noted, resume)
        found = source(config, data, run, seed, on_prepare)
        # Only now: what is refused above can be corrected and started again in the same folder.
        start_run(run, config, noted, resume)
        keep_sides(run / "split.json", asdict(found.split), data, resume)
    runtime.wait()
    if not runtime.is_main:  # all is in the cache by now
        found = source(config, data, run, seed, lambda done, total: None)
    torch.manual_seed(derive_seed(seed, "weights"))
    model = build.segmenter(config, len(found.labels))
    if origin is not None and not (run / "checkpoints" / "last.pt").is_file():  # which holds later ones
        _load_weights(model, origin)
    deadline = None if time_limit_min is None else time.monotonic() + 60 * time_limit_min
    ceiling: dict[str, float] = {}
    if isinstance(model, LatentMaskDiffusion):
        first = run / "autoencoder"
        ceiling = _train_mask_autoencoder(
            model.autoencoder, config, found, first, runtime, seed, resume, deadline, on_progress
        )
        if runtime.any(_minutes_left(deadline) == 0):  # it may be unfinished: nothing may be built on it
            return first / "model"
    arranged(model.network, config.training.channels_last, config.training.compile)
    target = run / "model"

    def save(averaged: nn.Module, step: int, numbers: Mapping[str, float]) -> None:
        card = _card(config, found, seed, step, numbers)
        if ceiling:
            card["metrics"]["autoencoder's ceiling"] = ceiling
        if origin is not None:
            card["training"]["init"] = origin
        weights = averaged.state_dict()
        if found.shape is not None:
            card[build.SHAPE_PRIOR] = {"spacing_mm": found.shape.spacing_mm}
            weights[build.SHAPE_PRIOR] = (255 * found.shape.share).round().to(torch.uint8)
        save_model(target, card, weights, model_card(card))

    numbers = fit(
        model,
        Draws(found.examples, seed),
        training_options(config.training),
        Callbacks(lambda averaged: validate(averaged, config, found, runtime), save, on_progress),
        TrainingRun(run, seed, resume, max_steps, _minutes_left(deadline)),
        runtime,
    )
    if numbers and runtime.is_main:
        calibrate(target, config, found, runtime)
    return target


def _train_mask_autoencoder(
    autoencoder: MaskAutoencoder,
    config: SegmenterConfig,
    data: TrainingData,
    run: Path,
    runtime: Runtime,
    seed: int,
    resume: bool,
    deadline: float | None,
    on_progress: Callable[[Progress], None],
) -> dict[str, float]:
    """Trains the first stage of latent mask diffusion in its own run folder, and returns its ceiling.

    The ceiling is the Dice of validation masks against their own reconstructions, per class: no segmenter whose masks
    come out of this autoencoder can be expected to do better.
    """
    section = config.mask_autoencoder
    autoencoder.requires_grad_(True)
    draws = Draws(data.examples, seed)
    size = min(len(data.examples), STANDARDISE_CASES)

    def validate(averaged: nn.Module) -> dict[str, float]:
        dice: dict[int, list[float]] = {label: [] for label in data.labels if label}
        for case in data.validation:
            with torch.no_grad():
                kept = torch.cat([_kept(averaged, mask, runtime) for mask in _masks(case.label, config.network.dims)])
            whole = torch.cat(list(_masks(case.label, config.network.dims)))
            for label, found in label_overlap(kept.numpy(), whole.numpy(), dice).items():
                dice[label].append(found.dice)
        means = {label: float(torch.tensor(values).nanmean()) for label, values in dice.items()}
        known = {data.labels[label]: mean for label, mean in means.items() if mean == mean}
        return {"score": sum(known.values()) / max(1, len(known)), **known}

    def save(averaged: nn.Module, step: int, numbers: Mapping[str, float]) -> None:
        kept = cast(MaskAutoencoder, averaged)
        labels = [draws[i]["label"][None].to(runtime.device) for i in range(size)]
        standardise(kept.codec, [kept.channels_of(one) for one in labels])
        card = {
            "task": "mask autoencoder",
            "config": config.model_dump(mode="json"),
            "training": {"seed": seed, "step": step},
            "metrics": {"validation": dict(numbers)},
            "versions": versions(),
        }
        save_model(run / "model", card, kept.state_dict(), "# Mask autoencoder\n")

    changed = config.training.model_copy(
        update={"max_steps": section.max_steps, "learning_rate": section.learning_rate, "warmup_steps": 50}
    )
    fit(
        autoencoder,
        draws,
        training_options(changed),
        Callbacks(validate, save, on_progress),
        TrainingRun(
            run, seed, resume and (run / "checkpoints" / "last.pt").is_file(), time_limit_min=_minutes_left(deadline)
        ),
        runtime,
    )
    saved = load_model_files(run / "model")
    autoencoder.load_state_dict(saved.weights)
    autoencoder.requires_grad_(False)
    return {name: float(value) for name, value in saved.card["metrics"]["validation"].items() if name != "score"}


def _kept(autoencoder: nn.Module, masks: Tensor, runtime: Runtime) -> Tensor:
    """Masks (B, *S) after the autoencoder."""
    labels = masks.long().to(runtime.device)
    found = autoencoder.decode(autoencoder.encode(labels), labels.shape[1:])  # type: ignore[operator]
    return cast(Tensor, found.argmax(1).cpu())


def _masks(label: Tensor, dims: int) -> Sequence[Tensor]:
    """A case's labels (I, J, K) as batches: the volume, or all slices across the third axis."""
    return [label[None]] if dims == 3 else [label.movedim(-1, 0)]


def _minutes_left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, (deadline - time.monotonic()) / 60)


def calibrate(target: Path, config: SegmenterConfig, data: TrainingData, runtime: Runtime) -> Calibration:
    """Fits temperatures and the usual agreement on the validation cases and stores them in the model ``target``.

    They hold for the configuration's sampler and steps, on the model's grid, before any largest part or shape prior.
    """
    saved = load_model_files(target)
    model, _ = restore_segmenter(saved)
    arranged(model.to(runtime.device).network, config.training.channels_last, compiled=False)
    sampler = build.sampler(config.inference.sampler)
    times = spaced(build.noise_schedule(config.diffusion.schedule), config.inference.steps)
    windows = Windows(config.inference.window, config.inference.overlap)
    fit = TemperatureFit(config.inference.sampler, len(times) - 1)
    for case in data.validation:
        seeds = [derive_seed(derive_seed(0, case.name), member) for member in range(_members(config))]
        with runtime.accelerator.autocast(), torch.no_grad():
            image = case.image.to(runtime.device)
            members = segment(model, image, seeds, sampler, times, windows, config.network.dims)
        fit.add(members.float().cpu(), case.label)
    calibration = fit.result()
    card = {**saved.card, "calibration": asdict(calibration)}
    save_model(target, card, saved.weights, model_card(card))
    return calibration


def _members(config: SegmenterConfig) -> int:
    return 1 if config.method == "baseline" else MEMBERS


def validate(model: nn.Module, config: SegmenterConfig, data: TrainingData, runtime: Runtime) -> dict[str, float]:
    """Segments the validation cases with the configuration's sampler and steps; Dice per class on the model's grid.

    "score" is the mean over classes of the mean over cases; a class absent from a case and its prediction is left out.
    """
    sampler = build.sampler(config.inference.sampler)
    times = spaced(build.noise_schedule(config.diffusion.schedule), config.inference.steps)
    windows = Windows(config.inference.window, config.inference.overlap)
    labels = [label for label in data.labels if label]
    dice: dict[int, list[float]] = {label: [] for label in labels}
    for case in data.validation:
        with runtime.accelerator.autocast(), torch.no_grad():
            probabilities = segment(
                model,  # type: ignore[arg-type]
                case.image.to(runtime.device),
                [derive_seed(0, case.name)],
                sampler,
                times,
                windows,
                config.network.dims,
            )[0]
        overlap = label_overlap(probabilities.argmax(0).cpu().numpy(), case.label.numpy(), labels)
        for label in labels:
            dice[label].append(overlap[label].dice)
    means = {label: float(torch.tensor(values).nanmean()) for label, values in dice.items()}
    known = {label: mean for label, mean in means.items() if mean == mean}
    score = sum(known.values()) / len(known) if known else 0.0
    return {"score": score, **{f"dice_{data.labels[label].replace(' ', '_')}": mean for label, mean in known.items()}}


def _scans(
    config: SegmenterConfig, data: Path, run: Path, seed: int, on_prepare: Callable[[int, int], None]
) -> TrainingData:
    if config.inference.shape_prior_mm is not None:
        raise UsageError("inference.shape_prior_mm is for data.source brain-labelmaps")
    folder = find_cases(data)
    labels = dict(enumerate(["background", *config.data.labels])) if config.data.labels else folder.labels
    if len(labels) < 2 or sorted(labels) != list(range(len(labels))):
        raise UsageError(f"{data}: the names of labels 1, 2, ... are unknown; set data.labels in the configuration")
    if folder.labels and not config.data.merge_labels and set(folder.labels) != set(labels):
        raise UsageError(
            f"{data}: dataset.json names labels {', '.join(map(str, sorted(folder.labels)))}, but data.labels of the "
            f"configuration 0 to {len(labels) - 1}; name all of them, or set data.merge_labels"
        )
    split = split_by_hash(folder.cases, config.data.test_cases, config.data.validation_cases)
    used = [case for case in folder.cases if case.name not in split.test]
    prepared = prepare(
        used,
        build.preprocessing(config.preprocessing),
        config.data.channels,
        len(labels),
        run / "cache",
        on_prepare,
        config.data.merge_labels,
        folder.labels,
        slices=config.network.dims == 2,
    )
    augmenter = Augmenter(build.augmentation(config.augmentation), config.network.dims)
    training = [case for case in prepared if case.name in split.train]
    require_every_class(training, labels, data)
    examples = MaskExamples(training, config.data.window, config.data.foreground_share, augmenter)
    summary = {
        "cases": len(split.train),
        "validation_cases": len(split.validation),
        "test_cases": len(split.test),
        "training_shapes": _ranges([tuple(case.label.shape) for case in training]),
    }
    validation = [case for case in prepared if case.name in split.validation]
    return TrainingData(examples, validation, labels, folder.channels, summary, split)


def _brain_labelmaps(
    config: SegmenterConfig, data: Path, run: Path, seed: int, on_prepare: Callable[[int, int], None]
) -> TrainingData:
    spacing = config.preprocessing.spacing_mm
    if spacing is None or len(set(spacing)) != 1 or config.data.channels != 1 or config.network.dims != 3:
        raise UsageError("data.source brain-labelmaps needs isotropic preprocessing.spacing_mm, 1 channel and 3D")
    files = find_scans(data)
    cases = [Case(scan_name(file), file, file, scan_name(file)) for file in files]
    split = split_by_hash(cases, config.data.test_cases, config.data.validation_cases)
    maps: dict[str, LabelMap] = {}
    for case in cases:
        if case.name not in split.test:
            maps[case.name] = load_label_map(case.label)
            on_prepare(len(maps), len(cases) - len(split.test))
    training = [maps[name] for name in split.train]
    examples = SyntheticBrains(training, config.data.window, spacing[0], config.data.examples_per_map)
    held_out = SyntheticBrains([maps[name] for name in split.validation], config.data.window, spacing[0])
    validation = []
    for i in range(VALIDATION_WINDOWS):
        name = f"{held_out.maps[i % len(held_out)].name}-{i}"
        example = held_out.example(i, torch.Generator().manual_seed(derive_seed("validation", name)))
        validation.append(PreparedCase(name, example["image"], example["label"].to(torch.uint8)))
    summary = {
        "label_maps": len(split.train),
        "validation_label_maps": len(split.validation),
        "test_label_maps": len(split.test),
        "examples": "synthesised, never the same twice",
    }
    shape = None
    if config.inference.shape_prior_mm is not None:
        shape = average_shape([tissues(anatomy) > 0 for anatomy in training], 1.0)
    return TrainingData(examples, validation, dict(enumerate(TISSUES)), ("T1",), summary, split, shape)


def _origin(init: str | Path | None, run: Path, resume: bool) -> dict[str, str] | None:
    """Name and sum of the weights that a run starts from, or was started from."""
    if init is not None:
        return {"model": str(init), "sha256": load_model_files(init).sha256}
    if not resume or not (run / "config.yaml").is_file():
        return None
    return cast("dict[str, str] | None", yaml.safe_load((run / "config.yaml").read_text()).get("init"))


def _load_weights(model: nn.Module, origin: Mapping[str, str]) -> None:
    """Gives ``model`` the weights of a trained one."""
    saved = load_model_files(origin["model"])
    if saved.sha256 != origin["sha256"]:
        raise ModelError(f"{saved.path}: is not the model any more that the run was started from; start a new run")
    try:
        model.load_state_dict({k: v for k, v in saved.weights.items() if k != build.SHAPE_PRIOR})
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{saved.path}: its network is not that of the configuration ({reason})") from error


def _ranges(shapes: list[tuple[int, ...]]) -> list[list[int]]:
    return [[min(axis), max(axis)] for axis in zip(*shapes, strict=True)]


def _card(
    config: SegmenterConfig, data: TrainingData, seed: int, step: int, numbers: Mapping[str, float]
) -> dict[str, Any]:
    return {
        "task": "mask",
        "method": config.method,
        "dims": config.network.dims,
        "labels": {str(value): name for value, name in data.labels.items()},
        "channels": list(data.channels),
        "config": config.model_dump(mode="json"),
        "training": {"seed": seed, "step": step, "data": data.summary, "held_out": data.split.held_out()},
        "metrics": {"validation": dict(numbers)},
        "licence": "see the training data",
        "versions": versions(),
    }
