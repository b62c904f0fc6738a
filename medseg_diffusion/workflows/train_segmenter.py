"""`medseg train-segmenter`: train a segmenter on labelled scans or label maps.

RUN/config.yaml     resolved configuration
RUN/split.json      which case is on which side
RUN/log.csv         one row per validation; RUN/steps.csv has every step
RUN/checkpoints/    step-000123.pt: the state to resume the run bit-exactly
RUN/model/          the best model by validation, always loadable
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from types import MappingProxyType
from typing import Any, cast, get_args

import torch
import yaml
from torch import Tensor, nn

from medseg_diffusion import build
from medseg_diffusion.config.load import Overrides, load_segmenter_config
from medseg_diffusion.config.segmenter import SegmenterConfig
from medseg_diffusion.data.file_lists import Data, FileList, folder_or_files
from medseg_diffusion.data.mask_examples import PreparedCase
from medseg_diffusion.device import with_memory_format
from medseg_diffusion.diffusion.noise import derive_seed
from medseg_diffusion.errors import ModelError
from medseg_diffusion.methods.ablation import Replacement, without_x_t
from medseg_diffusion.methods.ensemble import Ensemble
from medseg_diffusion.methods.seen import Seen
from medseg_diffusion.methods.segment import Segmenter, segment
from medseg_diffusion.methods.windows import Windows
from medseg_diffusion.metrics.ambiguity import SAMPLES, ReaderAgreement, ReaderSummary
from medseg_diffusion.metrics.overlap import label_overlap
from medseg_diffusion.models.card import common_entries, render_card
from medseg_diffusion.models.classes import TISSUES
from medseg_diffusion.models.segmenter import restore_segmenter
from medseg_diffusion.models.store import X_T, load_model_files, save_model
from medseg_diffusion.tasks.latent_mask import LatentMaskDiffusion
from medseg_diffusion.tasks.mask import FeedForward
from medseg_diffusion.training.health import Predictions
from medseg_diffusion.training.job import Job, arranged
from medseg_diffusion.training.lock import holding_runs
from medseg_diffusion.training.progress import OnProgress, silent
from medseg_diffusion.training.resume import Checkpoints
from medseg_diffusion.training.runtime import Runtime
from medseg_diffusion.training.trainer import Callbacks, Outcome, Progress, require_trainable

from . import finder_stage, mask_autoencoder_stage
from .calibrate_segmenter import store_calibration
from .segmenter_data import SegmenterData, segmenter_data
from .training_scans import add_seen, seen_entry

CASES_OF_X_T, MEMBERS_OF_X_T = 20, 5
"""Numbers of validation cases, and of members of each, with which the worth of x_t is measured."""


# many: one keyword for each option of the command
@holding_runs()
def train_segmenter(
    config: SegmenterConfig | str | Path,
    data: Data,
    run: str | Path,
    *,
    overrides: Overrides = MappingProxyType({}),
    resume: bool = False,
    init: str | Path | None = None,
    max_steps: int | None = None,
    time_limit_min: float | None = None,
    device: str = "auto",
    seed: int = 0,
    on_progress: OnProgress = silent,
    on_step: Callable[[Progress], None] = lambda progress: None,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
) -> Path:
    """Train the segmenter of ``config`` on labelled scans and return the model directory.

    If the time limit ends the training of a first stage (mask autoencoder, finder), its model directory is returned.
    Ctrl-C leaves a resume file and a loadable model.

    Args:
        config: Name of a preset (`presets`), YAML file, or a configuration.
        data: A Decathlon or image-mask folder, or a folder of label maps (data.source brain-labelmaps); or a
            list whose entries are pairs (image, label) or mappings with "image", "label" and, if known, "patient" and
            "name". An entry's image may be several files, one for each channel, and its label several readers' files.
        run: The run directory, new unless ``resume``.
        overrides: Values for single keys of the configuration, such as {"training.max_steps": 100}.
        resume: Continue an interrupted run with the same configuration.
        init: Trained model (folder or installed name) whose weights the run starts from, instead of random weights; the
            model card names it. If both have a finder, so does that.
        max_steps: Stop at this step; the learning rate still follows config.training.max_steps. The training of a first
            stage (mask autoencoder, finder) is not shortened.
        time_limit_min: Stop the training this many minutes after the data are prepared; its calibration follows.
        device: auto, cpu, cuda, cuda:N or mps.
        seed: Seed of weights, order, augmentation, times and noise.
        on_progress: Called with a text and the share done, 0 to 1, in the preparation and after every step.
        on_step: Called with the numbers of every step.
        on_outcome: Called at the end of every training of the run.

    Raises:
        UsageError: A configuration that is unknown or of another kind, a run that exists while ``resume`` is off, or a
            resumed run that does not exist or has another configuration.
        InputError: Unusable data or resume file.
        ModelError: ``init`` is missing, or has another network.
    """
    config, files, run = load_segmenter_config(config, overrides), folder_or_files(data), Path(run)
    job = Job(run, resume, max_steps, time_limit_min, device, seed, on_progress, on_step, on_outcome)
    runtime = Runtime(device, config.training.precision, config.training.sharding)
    origin = _origin(init, job)
    notes = {} if origin is None else {"init": origin}
    prepared = _prepare(config, files, job, runtime, notes)
    with runtime.main_first():
        model, finder = _networks(config, prepared, job, runtime, origin)
        if runtime.is_main:
            job.start(config, notes, asdict(prepared.split), str(files))
    job = job.clock_started()
    ceiling: dict[str, float] = {}
    if isinstance(model, LatentMaskDiffusion):
        stage = job.first_stage(mask_autoencoder_stage.FOLDER)
        ceiling = mask_autoencoder_stage.train_mask_autoencoder(model.autoencoder, config, prepared, stage, runtime)
        if runtime.any(job.minutes_left == 0):  # the autoencoder may be unfinished, so the denoiser cannot start
            return stage.model
    if finder is not None:
        stage = job.first_stage(finder_stage.FOLDER)
        finder_stage.train_finder(finder, config, prepared, stage, runtime)
        if runtime.any(job.minutes_left == 0):
            return stage.model
    arranged(model.network, config.training)
    seen = _seen(prepared, config, job) if runtime.is_main else None

    def save(averaged: nn.Module, step: int, numbers: Mapping[str, float]) -> None:
        card = _card(config, prepared, job, step, numbers, origin, ceiling) | seen_entry(seen)
        weights = averaged.state_dict()
        if finder is not None:
            weights |= {build.FINDER + name: value for name, value in finder.state_dict().items()}
        if prepared.shape is not None:
            card[build.SHAPE_PRIOR] = {"spacing_mm": prepared.shape.spacing_mm}
            weights[build.SHAPE_PRIOR] = (255 * prepared.shape.share).round().to(torch.uint8)
        job.save(card, weights)

    def check(averaged: nn.Module) -> dict[str, float]:
        return validate(averaged, config, prepared, runtime, job.on_prepare)

    callbacks = Callbacks(check, save, job.step_done)
    outcome = job.fit(model, prepared.examples, config.training, callbacks, runtime)
    if outcome.best and runtime.is_main:
        if prepared.calibration and not prepared.several_readers:
            cases, named = prepared.calibration, prepared.named_labels
            store_calibration(job.model, cases, named, str(runtime.device), job.on_prepare)
        measure_x_t(job.model, config, prepared, runtime, job.on_prepare)
        add_seen(job.model, seen)  # the best weights may be of an earlier call, which measured less
    return job.model


def _prepare(
    config: SegmenterConfig, data: Path | FileList, job: Job, runtime: Runtime, notes: Mapping[str, Any]
) -> SegmenterData:
    """Prepare the data, unless the run cannot be started."""
    cache, on_gpu = job.run / "cache", runtime.device.type == "cuda"
    if runtime.is_main:
        job.require_startable(config, notes)
        prepared = segmenter_data(config, data, cache, lambda done, total: job.on_prepare("cases", done, total), on_gpu)
    runtime.wait()
    if not runtime.is_main:  # the main process has filled the cache
        prepared = segmenter_data(config, data, cache, lambda done, total: None, on_gpu)
    return prepared


def _networks(
    config: SegmenterConfig, data: SegmenterData, job: Job, runtime: Runtime, origin: Mapping[str, str] | None
) -> tuple[build.Segmenter, FeedForward | None]:
    """The segmenter and its finder as the training starts from them; an error if they cannot be trained."""
    job.seed_weights()
    model, finder = build.segmenter(config, len(data.labels)), build.finder(config)
    require_trainable(model, config.training.batch_size, runtime)
    if config.finder is not None and finder is not None:
        require_trainable(finder, config.finder.batch_size, runtime)
    if origin is not None and not Checkpoints(job.run).files():  # a resume file has later weights
        _load_weights(model, finder, origin)
    return model, finder


def validate(
    model: nn.Module,
    config: SegmenterConfig,
    data: SegmenterData,
    runtime: Runtime,
    on_prepare: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, float]:
    """Segment the validation cases with the configuration's sampler and steps; return the Dice per class on the grid.

    "score" is the mean over classes of the mean over cases. If a class is absent from a case and from its prediction,
    the case is left out of the mean of this class. With several readers, samples are compared with them instead:
    `_compare_with_readers`.
    """
    predict = _predictor(cast(Segmenter, model), config, runtime)
    if data.several_readers:
        return _compare_with_readers(predict, data.validation, len(data.labels), on_prepare)
    labels = [label for label in data.labels if label]
    dice: dict[int, list[float]] = {label: [] for label in labels}
    predictions = Predictions()
    for done, case in enumerate(data.validation):
        on_prepare("validation: case", done, len(data.validation))
        predicted = predict(case, [derive_seed(0, case.name)])[0].argmax(0)
        predictions.add(predicted, expected=bool((case.label > 0).any()))
        overlap = label_overlap(predicted.cpu().numpy(), case.label.numpy(), labels)
        for label in labels:
            dice[label].append(overlap[label].dice)
    means = {label: float(torch.tensor(values).nanmean()) for label, values in dice.items()}
    defined = {label: mean for label, mean in means.items() if mean == mean}
    score = sum(defined.values()) / len(defined) if defined else 0.0
    named = {f"dice_{data.labels[label].replace(' ', '_')}": mean for label, mean in defined.items()}
    return {"score": score, **named, **predictions.numbers()}


def _compare_with_readers(
    predict: Callable[[PreparedCase, list[int]], Tensor],
    cases: Sequence[PreparedCase],
    classes: int,
    on_prepare: Callable[[str, int, int], None],
) -> dict[str, float]:
    """The numbers of `ReaderSummary` for `SAMPLES` samples of every case; "score" is 1 - the energy distance."""
    agreements, predictions = [], Predictions()
    for done, case in enumerate(cases):
        on_prepare("validation: case", done, len(cases))
        seeds = [derive_seed(derive_seed(0, case.name), member) for member in range(SAMPLES)]
        samples = predict(case, seeds).argmax(1).cpu()
        predictions.add(samples, expected=any(bool((label > 0).any()) for label in case.labels))
        agreements.append(ReaderAgreement.of(list(samples.numpy()), [label.numpy() for label in case.labels], classes))
    numbers = {name: value for name, value in ReaderSummary.of(agreements).numbers().items() if math.isfinite(value)}
    return {"score": 1 - numbers["energy_distance"], **numbers, **predictions.numbers()}


def measure_x_t(
    target: Path,
    config: SegmenterConfig,
    data: SegmenterData,
    runtime: Runtime,
    on_prepare: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> None:
    """Measure what the noise of the model ``target`` is worth, and store it in its card as `X_T`.

    With x_t and with each replacement of it (`methods.ablation`), `MEMBERS_OF_X_T` members of up to `CASES_OF_X_T`
    validation cases are sampled: their mean pairwise Dice, and the mean Dice of their mean with the first reader.
    Nothing is replaced in a model of one step, which sees only noise anyway, and nothing is measured for a feed-forward
    model.
    """
    if config.method == "baseline":
        return
    saved = load_model_files(target)
    model, _ = restore_segmenter(saved)
    with_memory_format(model.to(runtime.device).network, config.training.channels_last)
    predict = _predictor(model, config, runtime)
    cases, steps = data.validation[:CASES_OF_X_T], len(_times(config)) - 1

    def measured(what: str) -> dict[str, float | None]:
        pairwise, dice = [], []
        for done, case in enumerate(cases):
            on_prepare(what, done, len(cases))
            seeds = [derive_seed(derive_seed(0, case.name), member) for member in range(MEMBERS_OF_X_T)]
            ensemble = Ensemble.of(predict(case, seeds).float().cpu())
            agreement = [value for value in ensemble.members().pairwise_dice().tolist() if value == value]
            pairwise.append(fmean(agreement) if agreement else 1.0)  # members that are all empty agree
            overlap = label_overlap(ensemble.mean.argmax(0).numpy(), case.label.numpy(), range(1, len(data.labels)))
            dice += [one.dice for one in overlap.values() if one.dice == one.dice]
        return {"pairwise_dice": round(fmean(pairwise), 4), "dice": round(fmean(dice), 4) if dice else None}

    rows = {"own": measured("the members' agreement: case")}
    if steps > 1 and build.samplers(config):
        for replacement in get_args(Replacement):
            with without_x_t(model.network, replacement, config.method == "categorical"):
                rows[replacement] = measured(f"the worth of the noise ({replacement}): case")
    entry: dict[str, Any] = {"steps": steps, "members": MEMBERS_OF_X_T, "cases": len(cases), "rows": rows}
    if data.several_readers:
        entry["several_readers"] = True
    card = {**saved.card, X_T: entry}
    save_model(target, card, saved.weights, render_card(card))


def _predictor(
    model: Segmenter, config: SegmenterConfig, runtime: Runtime
) -> Callable[[PreparedCase, list[int]], Tensor]:
    """Make a function from a case and N seeds to class probabilities (N, K, I, J, K')."""
    sampler, times = build.sampler(config.inference.sampler), _times(config)
    windows = Windows(config.inference.window, config.inference.overlap)

    def predict(case: PreparedCase, seeds: list[int]) -> Tensor:
        image = case.image.to(runtime.device)
        with runtime.accelerator.autocast(), torch.no_grad():
            return segment(model, image, seeds, sampler, times, windows, config.network.dims)

    return predict


def _times(config: SegmenterConfig) -> list[int]:
    return build.times(config, config.inference.steps)


def _origin(init: str | Path | None, job: Job) -> dict[str, str] | None:
    """Name and checksum of the weights that a run starts from, or was started from."""
    if init is not None:
        return {"model": str(init), "sha256": load_model_files(init).sha256}
    if not job.resume or not job.started:
        return None
    return cast("dict[str, str] | None", yaml.safe_load((job.run / "config.yaml").read_text()).get("init"))


def _load_weights(model: nn.Module, finder: nn.Module | None, origin: Mapping[str, str]) -> None:
    """Load the weights of a trained model into ``model``, and into ``finder`` if that model has one, too."""
    saved = load_model_files(origin["model"])
    if saved.sha256 != origin["sha256"]:
        raise ModelError(f"{saved.path}: has changed since the run was started from it; start a new run")
    try:
        model.load_state_dict(build.segmenter_weights(saved.weights))
        if finder is not None and (own := build.finder_weights(saved.weights)):
            finder.load_state_dict(own)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{saved.path}: its network is not that of the configuration ({reason})") from error


def _seen(data: SegmenterData, config: SegmenterConfig, job: Job) -> Seen | None:
    """What the training scans measured: before the training, so that models of stopped runs know it, too."""
    steps = config.training.max_steps if job.max_steps is None else min(job.max_steps, config.training.max_steps)
    examples = steps * config.training.batch_size
    return data.measure(examples, lambda done, total: job.on_prepare("measuring the training scans", done, total))


def _card(
    config: SegmenterConfig,
    data: SegmenterData,
    job: Job,
    step: int,
    numbers: Mapping[str, float],
    origin: Mapping[str, str] | None,
    ceiling: Mapping[str, float],
) -> dict[str, Any]:
    tissues = {tissue: list(names) for tissue, names in data.tissues.items()}
    entries = common_entries(
        config,
        task="mask",
        method=config.method,
        dims=config.network.dims,
        channels=data.channels,
        labels=data.labels,
        training={
            "seed": job.seed,
            "step": step,
            "data": data.summary,
            "held_out": data.split.held_out(),
            **({} if origin is None else {"init": dict(origin)}),
        },
        metrics={"validation": dict(numbers), **({"autoencoder's ceiling": dict(ceiling)} if ceiling else {})},
    )
    return entries | ({TISSUES: tissues} if tissues else {})
