"""`medseg train-pixel-classifier`: train a segmenter on a generator's activations for a few labelled images.

RUN/config.yaml     resolved configuration
RUN/labelled.json   the labelled images, and how they were chosen
RUN/model/          the segmenter, including its generator
RUN/test/           masks of the held-out cases and their references, with report.html, summary.json and cases.csv
"""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import Tensor

from medseg_diffusion import build
from medseg_diffusion.config.load import Overrides, load_pixel_config
from medseg_diffusion.config.pixel_classifier import PixelClassifierConfig
from medseg_diffusion.data.augmentation import Augmenter
from medseg_diffusion.data.cases import Case
from medseg_diffusion.data.file_lists import Data, FileList, folder_or_files
from medseg_diffusion.data.patients import FILE as PATIENTS_FILE
from medseg_diffusion.diffusion.noise import derive_seed
from medseg_diffusion.errors import UsageError
from medseg_diffusion.files import require_folder, write_json
from medseg_diffusion.methods.activations import Activations
from medseg_diffusion.methods.label_efficient import ClassifierOptions, choose_blocks, fit_classifiers
from medseg_diffusion.methods.labelled_pixels import LabelledPixels, PixelSampling, WorkerGroup, labelled_pixels
from medseg_diffusion.metrics.evaluation_summary import Evaluation
from medseg_diffusion.models.card import common_entries, render_card
from medseg_diffusion.models.generator import Generator, restore_generator
from medseg_diffusion.models.load import load_segmenter
from medseg_diffusion.models.pixel_segmenter import GENERATOR, pixel_activations, pixel_inference
from medseg_diffusion.models.store import SavedModel, load_model_files, parts_of_weights, save_model
from medseg_diffusion.networks.pixel_classifier import PixelClassifiers
from medseg_diffusion.training.job import Job
from medseg_diffusion.training.lock import holding_runs
from medseg_diffusion.training.progress import OnProgress, silent
from medseg_diffusion.training.runtime import Runtime
from medseg_diffusion.volumes.io import read_labels, read_volume, write_labels
from medseg_diffusion.volumes.outputs import SEGMENTATION

from .evaluate import EvaluateOptions, evaluate
from .labelled_units import LabelledData, Labelling, Select, Unit, labelled_units
from .training_scans import seen_entry


@dataclass(frozen=True)
class TrainedPixelClassifier:
    """The model directory, the labelled images, the generator's blocks, and the scores of the held-out cases.

    ``test`` is None without held-out cases.
    """

    model: Path
    labelled: tuple[str, ...]
    blocks: tuple[str, ...]
    test: Evaluation | None


# many: one keyword for each option of the command
@holding_runs()
def train_pixel_classifier(
    config: PixelClassifierConfig | str | Path,
    generator: str | Path,
    data: Data,
    labelled: int,
    run: str | Path,
    *,
    overrides: Overrides = MappingProxyType({}),
    unit: Unit = "case",
    select: Select = "hash",
    test: bool = True,
    device: str = "auto",
    seed: int = 0,
    on_progress: OnProgress = silent,
) -> TrainedPixelClassifier:
    """Train pixel classifiers on a generator's activations for a few labelled images, and score them.

    Several processes share the features of the labelled images and the classifiers. The main one writes and scores.

    Args:
        config: Name of a preset (`presets`), YAML file, or a configuration of method label-efficient.
        generator: Trained or imported generator, folder or installed name.
        data: Folder or list of labelled scans, as for `train_segmenter`. The labels of other cases than the
            chosen ones are used only for the scores and, with ``unit`` "slice", to find slices that show a class.
        labelled: Number K of labelled cases or slices.
        run: The run directory, new.
        overrides: Values for single keys of the configuration, such as {"classifier.members": 5}.
        unit: "case", or "slice" for single slices that show a class above background.
        select: "hash" or "diverse" (`Labelling`).
        test: Whether to segment and score the held-out cases.
        device: auto, cpu, cuda, cuda:N or mps.
        seed: Seed of the choice, the pixels and the classifiers.
        on_progress: Called with a text and the share done, 0 to 1.

    Raises:
        UsageError: A configuration that is unknown or of another kind, options that do not fit, or a run folder
            that is not empty.
        InputError: Unusable data, an empty class, or fewer labelled images than requested. If only a held-out case is
            unusable, the model has been written before.
        ModelError: No usable generator, or one without activations.
    """
    config, files, run = load_pixel_config(config, overrides), folder_or_files(data), Path(run)
    require_folder(run)
    runtime = Runtime(device)
    saved = load_model_files(generator)
    restored = restore_generator(saved, runtime.device)
    # An unusable generator is an error before any data is read.
    activations = _activations(config, restored, unit)
    job = Job(run, device=device, seed=seed, on_progress=on_progress)
    with _emptied_on_failure(run) if runtime.is_main else nullcontext():
        if runtime.is_main:
            job.start(config, {"generator_sha256": saved.sha256})
        training = _Training(config, restored, activations, saved, job, runtime)
        labelled_data, blocks = training.run(files, Labelling(labelled, unit, select, seed))
    scores = None
    if runtime.is_main and test and labelled_data.split.test:
        held_out = [case for case in labelled_data.folder.cases if case.name in labelled_data.split.test]
        scores = _score(job, held_out, labelled_data.labels, str(runtime.device))
        model = load_model_files(job.model)
        dice = {f"dice {labelled_data.labels[k].replace('_', ' ')}": v.mean for k, v in scores.dice.items()}
        # The mean over no case is NaN.
        card = {**model.card, "metrics": {"test": {name: mean for name, mean in dice.items() if mean == mean}}}
        save_model(job.model, card, model.weights, render_card(card))
    runtime.wait()
    return TrainedPixelClassifier(job.model, tuple(unit.name for unit in labelled_data.units), blocks, scores)


def _activations(config: PixelClassifierConfig, generator: Generator, unit: Unit) -> Activations:
    """The activations of the configuration's blocks; without blocks if these are chosen later."""
    dims = len(generator.config.data.shape)
    if unit == "slice" and dims == 3:
        raise UsageError("--unit slice: the generator makes volumes, so cases are labelled")
    if wrong := [axis for axis in config.augmentation.flip_axes if axis >= dims]:
        raise UsageError(f"augmentation.flip_axes: no axis {wrong[0]} in the generator's {dims}D")
    blocks = config.features.blocks
    return pixel_activations(generator, config, [] if blocks == "auto" else [f"decoder.{i}" for i in blocks])


@contextmanager
def _emptied_on_failure(run: Path) -> Iterator[None]:
    """Empty the folder ``run`` again if the block fails, so that the call can be repeated.

    Raises:
        UsageError: The folder is not empty at the start.
    """
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise UsageError(f"{run}: is not an empty folder; choose another one")
    existed = run.exists()
    try:
        yield
    except BaseException:
        for path in list(run.iterdir()) if existed else [run]:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        raise


@dataclass(frozen=True, eq=False)
class _Training:
    """Trains pixel classifiers and writes RUN/model."""

    config: PixelClassifierConfig
    generator: Generator
    activations: Activations
    saved: SavedModel
    job: Job
    runtime: Runtime

    def run(self, data: Path | FileList, labelling: Labelling) -> tuple[LabelledData, tuple[str, ...]]:
        """Train, and return the labelled images and the names of the generator's blocks."""
        config, job, runtime = self.config, self.job, self.runtime
        cache = job.run / "cache"
        together = WorkerGroup(runtime.rank, runtime.world_size, runtime.wait)
        with runtime.main_first():
            chosen = labelled_units(config, self.generator, data, labelling, cache, job.on_prepare)
        images, masks = [unit.images for unit in chosen.units], [unit.labels for unit in chosen.units]
        classes = list(chosen.labels.values())
        activations = self.activations
        if config.features.blocks == "auto":
            job.on_prepare("choice of the generator's blocks", 0, 1)
            activations = activations.with_blocks(choose_blocks(activations, images, masks, classes, job.seed))
        pixels = labelled_pixels(
            activations,
            images,
            masks,
            classes,
            PixelSampling(
                config.data.pixels_per_class, job.seed, config.data.copies, self._change(len(chosen.channels))
            ),
            cache / "features.npy",
            lambda done, total: job.on_prepare("features of labelled images", done, total),
            together,
        )
        classifiers = fit_classifiers(
            pixels,
            ClassifierOptions(**config.classifier.model_dump()),
            job.seed,
            self.generator.device,
            lambda done, total: job.on_prepare("classifiers", done, total),
            together,
        )
        self._exchange(classifiers)
        if runtime.is_main:
            self._write(chosen, activations.blocks, labelling, pixels, classifiers)
            del pixels
            shutil.rmtree(cache, ignore_errors=True)
        return chosen, activations.blocks

    def _exchange(self, classifiers: PixelClassifiers) -> None:
        """Give every process the members that others have trained."""
        self.runtime.wait()  # an error in another process is told here
        for i, member in enumerate(classifiers.members):
            for tensor in member.state_dict().values():
                broadcast(tensor, from_process=i % self.runtime.world_size)

    def _write(
        self,
        chosen: LabelledData,
        blocks: Sequence[str],
        labelling: Labelling,
        pixels: LabelledPixels,
        classifiers: PixelClassifiers,
    ) -> None:
        job = self.job
        content = {"unit": labelling.unit, "select": labelling.select, "seed": job.seed}
        write_json(job.run / "labelled.json", {**content, "labelled": [unit.name for unit in chosen.units]})
        plural = "s" if labelling.count > 1 else ""
        summary = {
            "labelled": f"{labelling.count} {labelling.unit}{plural}, chosen by {labelling.select}",
            "pixels": len(pixels.labels),
        }
        card = self._card(chosen, blocks, summary)
        job.save(card, classifiers.state_dict() | parts_of_weights({GENERATOR: self.saved.weights}))

    def _change(self, channels: int) -> Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]:
        """The augmentation of a labelled image; grey images stay grey."""
        dims = len(self.generator.config.data.shape)
        augmenter = Augmenter(build.augmentation(self.config.augmentation), dims)

        def change(image: Tensor, label: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            changed, mask = augmenter(image[:channels], label, generator)
            return changed.expand_as(image), mask

        return change

    def _card(self, chosen: LabelledData, blocks: Sequence[str], summary: dict[str, Any]) -> dict[str, Any]:
        config = self.config
        card = common_entries(
            config,
            task="mask",
            method=config.method,
            dims=len(self.generator.config.data.shape),
            channels=chosen.channels,
            labels=chosen.labels,
            training={
                "seed": self.job.seed,
                "generator_sha256": self.saved.sha256,
                "data": summary,
                "held_out": chosen.split.held_out(),
            },
            metrics={},
        )
        ensemble = pixel_inference(self.generator, config).ensemble
        return (
            card | seen_entry(chosen.seen) | {"blocks": list(blocks), "ensemble": ensemble, GENERATOR: self.saved.card}
        )


def _score(job: Job, cases: Sequence[Case], labels: dict[int, str], device: str) -> Evaluation:
    """Segment the held-out cases and compare the masks with their references."""
    model = load_segmenter(job.model, device)
    folder = job.run / "test"
    masks, references = folder / "masks", folder / "references"
    for target in (masks, references):
        target.mkdir(parents=True)
    for done, case in enumerate(cases, 1):
        volume = read_volume(case.image, channels=model.channels)
        segmentation = model.segment(volume, derive_seed(job.seed, case.name))
        name = case.name.replace("/", "__")
        write_labels(segmentation.labels, volume, masks / (name + SEGMENTATION["segmentation"]))
        reference = read_labels(case.label)
        write_labels(reference.data[0], reference, references / f"{name}.nii.gz")
        job.on_prepare("held-out cases", done, len(cases))
    foreground = {value: name for value, name in labels.items() if value}
    patients = folder / PATIENTS_FILE
    with patients.open("w", encoding="utf-8", newline="") as file:
        rows = ((case.name.replace("/", "__"), case.patient) for case in cases)
        csv.writer(file, lineterminator="\n").writerows([("case", "patient"), *rows])
    return evaluate(masks, references, folder, EvaluateOptions(labels=foreground, patients=patients, seed=job.seed))
