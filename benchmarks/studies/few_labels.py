"""Compares classifiers of a generator's activations with two methods without the generator, for few labels.

    python benchmarks/studies/few_labels.py DATA GENERATOR OUT [--unit slice] [--labelled 1 2 5] [--seeds 0 1 2] \
        [--minutes 5] [--set augmentation.flip_axes=[1]]

For every number of labels and every seed, all methods use the same labelled images and the same held-out cases:

"label-efficient"  `medseg train-pixel-classifier`
"from scratch"     a network with the generator's architecture, trained only on the labelled images for --minutes (Dice
                   and cross-entropy); the step with the best Dice on 8 validation cases is used
"raw pixels"       the same classifiers on intensity and coordinates, for at least 3,000 steps

The augmentation of labelled images is the same for all three methods.

The output is config.yaml, scores.csv (one row per run, with its minutes of training without validations), table.md and
curves.png. A call with the same options continues an interrupted one. Run only one call per OUT at a time. Results
depend on the speed of the machine, so set OMP_NUM_THREADS to the number of free cores.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from medseg_diffusion import build
from medseg_diffusion.config.load import load_config
from medseg_diffusion.config.pixel_classifier import PixelClassifierConfig
from medseg_diffusion.data.augmentation import Augmenter
from medseg_diffusion.data.cases import Case
from medseg_diffusion.data.draws import Draws
from medseg_diffusion.device import autocast, with_memory_format
from medseg_diffusion.diffusion.noise import derive_seed
from medseg_diffusion.files import whole_file
from medseg_diffusion.methods.label_efficient import ClassifierOptions, PixelSegmentation, fit_classifiers
from medseg_diffusion.methods.labelled_pixels import PixelSampling, labelled_pixels
from medseg_diffusion.methods.segment import Segmenter, segment
from medseg_diffusion.methods.windows import Windows
from medseg_diffusion.metrics.overlap import label_overlap
from medseg_diffusion.models.generator import Generator, restore_generator
from medseg_diffusion.models.pixel_segmenter import pixel_preprocessing, restore_pixel_segmentation
from medseg_diffusion.models.store import load_model_files
from medseg_diffusion.networks.unet import UNet
from medseg_diffusion.sampling.ddim import DDIM
from medseg_diffusion.sampling.loop import Sampler
from medseg_diffusion.tasks.mask import FeedForward, MaskEncoding
from medseg_diffusion.training.run import start_run
from medseg_diffusion.training.runtime import Runtime
from medseg_diffusion.training.trainer import Callbacks, TrainingOptions, TrainingRun, fit
from medseg_diffusion.volumes.fitting import from_generator_grid, to_generator_grid
from medseg_diffusion.volumes.io import read_labels, read_volume
from medseg_diffusion.volumes.preprocessing import Placement, Preprocessing
from medseg_diffusion.workflows.labelled_units import LabelledData, Labelling, labelled_units
from medseg_diffusion.workflows.train_pixel_classifier import train_pixel_classifier

METHODS = ("label-efficient", "from scratch", "raw pixels")
VALIDATION_CASES = 8
VALIDATIONS = 6
WARM, TIMED = 10, 40
RAW_STEPS = 3000
"""Minimum number of steps on raw pixels; the stopping rule would otherwise end their training too early."""


class RawPixels:
    """Intensity and coordinates, with the interface of `Activations`."""

    noise = torch.zeros(1)

    def __call__(self, images: Tensor) -> list[Tensor]:
        size = images.shape[2:]
        axes = torch.meshgrid(*[torch.linspace(-1, 1, n) for n in size], indexing="ij")
        return [torch.cat([images, torch.stack(axes).expand(len(images), *[-1] * (1 + len(size)))], 1)]


class Fitted(nn.Module):
    """A feed-forward model on the generator's grid, for images of any size."""

    def __init__(self, model: FeedForward, size: Sequence[int]) -> None:
        super().__init__()
        self.model, self.size = model, tuple(size)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        loss: Tensor = self.model(batch)
        return loss

    def probabilities(
        self, image: Tensor, seeds: Sequence[Sequence[int]], sampler: Sampler, times: Sequence[int]
    ) -> Tensor:
        probabilities = self.model.probabilities(
            to_generator_grid(image.clamp(-1, 1), self.size), seeds, sampler, times
        )
        return from_generator_grid(probabilities.flatten(1, 2), image.shape[2:]).unflatten(1, probabilities.shape[1:3])


class Units:
    """Labelled images as training examples, augmented."""

    def __init__(self, images: Sequence[Tensor], masks: Sequence[Tensor], augmenter: Augmenter) -> None:
        self.images, self.masks, self.augmenter = images, masks, augmenter

    def __len__(self) -> int:
        return len(self.images)

    def example(self, index: int, generator: torch.Generator) -> Mapping[str, Tensor]:
        image, label = self.augmenter(self.images[index], self.masks[index], generator)
        return {"image": image.contiguous(), "label": label.contiguous()}


@cache
def scan(case: Case, preprocessing: Preprocessing) -> tuple[Tensor, Placement, Tensor]:
    """Read a held-out case: the image on the generator's voxel grid, the map back to the scan, and the labels."""
    image, placement = preprocessing.apply(read_volume(case.image, channels=None))
    return image, placement, read_labels(case.label).data[0]


def dice(model: Segmenter, generator: Generator, cases: Sequence[Case], labels: Sequence[int]) -> float:
    """Mean Dice over cases and classes, on the scans' own grids."""
    shape = generator.config.data.shape
    preprocessing, channels = pixel_preprocessing(generator), generator.config.data.channels
    windows = Windows(shape if len(shape) == 3 else None)
    scores = []
    for case in cases:
        image, placement, reference = scan(case, preprocessing)
        image = image.expand(channels, -1, -1, -1)
        with torch.no_grad(), autocast(torch.device("cpu"), generator.config.training.precision):
            probabilities = segment(model, image, [0], DDIM(), [1, 0], windows, len(shape))[0]
        native = placement.restore(probabilities.float(), [1.0] + [0.0] * (len(probabilities) - 1)).argmax(0)
        overlap = label_overlap(native.numpy(), reference.numpy(), labels)
        scores += [overlap[label].dice for label in labels]
    return float(torch.tensor(scores).nanmean())


def from_scratch(
    data: LabelledData,
    generator: Generator,
    augmenter: Augmenter,
    validation: Sequence[Case],
    minutes: float,
    seed: int,
    run: Path,
) -> tuple[Fitted, float]:
    """Train a network on the labelled images; return it with its minutes of training."""
    config = generator.config
    dims, count = len(config.data.shape), len(data.labels)
    encoding = MaskEncoding(count)
    torch.manual_seed(derive_seed(seed, "weights"))
    network = UNet(in_channels=config.data.channels, out_channels=encoding.channels, **config.network.model_dump())
    model = Fitted(FeedForward(with_memory_format(network, channels_last=True), encoding), config.data.shape)
    images = [image for unit in data.units for image in unit.images]
    masks = [mask.long() for unit in data.units for mask in unit.labels]
    draws = Draws(Units(images, masks, augmenter), seed)
    batch = 8 if dims == 2 else 2
    runtime = Runtime("cpu", config.training.precision)
    best: dict[str, Tensor] = {}
    labels = [label for label in data.labels if label]
    validating = 0.0

    def validate(averaged: nn.Module) -> Mapping[str, float]:
        nonlocal validating
        began = time.monotonic()
        score = dice(averaged, generator, validation, labels)  # type: ignore[arg-type]
        validating += time.monotonic() - began
        return {"score": score}

    def save(averaged: nn.Module, step: int, numbers: Mapping[str, float]) -> None:
        best.update({name: value.clone() for name, value in averaged.state_dict().items()})

    options = TrainingOptions(
        batch_size=batch, max_steps=TIMED, warmup_steps=WARM, validate_every=TIMED,
        learning_rate=1e-3, ema_decay=0.99, weight_decay=1e-4, gradient_clip=1.0, workers=0, checkpoint_minutes=60.0,
    )  # fmt: skip
    # The learning rate must reach its end in time, so the steps of a copy are timed first, after a warm-up.
    marks: list[float] = []
    timing = Callbacks(
        lambda averaged: {"score": 0.0}, lambda *saved: None, lambda step: marks.append(time.monotonic())
    )
    fit(deepcopy(model), draws, options, timing, TrainingRun(run / "timing", seed), runtime)
    per_step = median(later - earlier for earlier, later in pairwise(marks[WARM:]))
    steps = max(50, int(60 * minutes / per_step))
    options = replace(
        options, max_steps=steps, warmup_steps=min(100, steps // 10), validate_every=-(-steps // VALIDATIONS)
    )
    started = time.monotonic()
    fit(model, draws, options, Callbacks(validate, save), TrainingRun(run, seed), runtime)
    took = (time.monotonic() - started - validating) / 60
    model.load_state_dict(best)
    return model.eval(), took


def raw_pixels(
    data: LabelledData, generator: Generator, augmenter: Augmenter, config: PixelClassifierConfig, seed: int
) -> Segmenter:
    images, masks = [unit.images for unit in data.units], [unit.labels for unit in data.units]
    raw, classes = RawPixels(), list(data.labels.values())
    sampling = PixelSampling(config.data.pixels_per_class, seed, config.data.copies, augmenter)
    pixels = labelled_pixels(raw, images, masks, classes, sampling)  # type: ignore[arg-type]
    options = ClassifierOptions(**config.classifier.model_dump())
    epochs = -(-RAW_STEPS * options.batch_size // len(pixels.labels))
    options = replace(options, min_steps=RAW_STEPS, max_epochs=epochs + options.max_epochs)
    classifiers = fit_classifiers(pixels, options, seed)
    shape, channels = generator.config.data.shape, generator.config.data.channels
    return EnsembleMean(PixelSegmentation(raw, classifiers, shape, channels))  # type: ignore[arg-type]


class EnsembleMean(nn.Module):
    """The mean of a model's ensemble, as its only member."""

    def __init__(self, model: PixelSegmentation) -> None:
        super().__init__()
        self.model = model

    def probabilities(
        self, image: Tensor, seeds: Sequence[Sequence[int]], sampler: Sampler, times: Sequence[int]
    ) -> Tensor:
        members = len(self.model.classifiers.members)
        every = self.model.probabilities(image, [list(range(members))] * len(image), sampler, times)
        return every.mean(1, keepdim=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("generator")
    parser.add_argument("out", type=Path)
    parser.add_argument("--config", default="label-efficient")
    parser.add_argument("--unit", choices=("case", "slice"), default="case")
    parser.add_argument("--labelled", type=int, nargs="+", default=[1, 2, 5, 20])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    return parser.parse_args()


def write_scores(rows: Sequence[Mapping[str, object]], file: Path) -> None:
    with whole_file(file) as temporary, temporary.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    config = load_config(options.config, options.overrides)
    assert isinstance(config, PixelClassifierConfig)
    saved = load_model_files(options.generator)
    generator = restore_generator(saved, "cpu")
    augmenter = Augmenter(build.augmentation(config.augmentation), len(generator.config.data.shape))
    notes = {"folder": str(options.data.resolve()), "unit": options.unit, "minutes": options.minutes}
    notes["threads"] = torch.get_num_threads()  # they decide how much is trained in a minute
    # `start_run` raises an error if OUT holds the scores of another configuration.
    notes["generator_sha256"] = saved.sha256
    start_run(options.out, config, notes, resume=(options.out / "config.yaml").is_file())
    file = options.out / "scores.csv"
    rows = list(csv.DictReader(file.open())) if file.is_file() else []
    done = {(row["method"], int(row["labelled"]), int(row["seed"])) for row in rows}

    def add(method: str, labelled: int, seed: int, score: float, minutes: float) -> None:
        rows.append({"method": method, "labelled": labelled, "seed": seed, "dice": f"{score:.5f}",
                     "training_minutes": f"{minutes:.2f}"})  # fmt: skip
        write_scores(rows, file)
        print(f"{method}, {labelled} labelled, seed {seed}: Dice {score:.3f}, {minutes:.1f} minutes", flush=True)

    for labelled in options.labelled:
        for seed in options.seeds:
            left = [method for method in METHODS if (method, labelled, seed) not in done]
            if not left:
                continue
            with TemporaryDirectory() as folder:
                here = Path(folder)
                data = labelled_units(
                    config, generator, options.data, Labelling(labelled, options.unit, "hash", seed), here / "cache"
                )
                cases = {case.name: case for case in data.folder.cases}
                test = [cases[name] for name in data.split.test]
                validation = [cases[name] for name in data.split.validation[:VALIDATION_CASES]]
                if not test or not validation:
                    raise SystemExit(f"{options.data}: no case to {'test on' if validation else 'choose a step with'}")
                labels = [label for label in data.labels if label]
                for method in left:
                    started = time.monotonic()
                    if method == "label-efficient":
                        result = train_pixel_classifier(
                            config, options.generator, options.data, labelled, here / "run", unit=options.unit,
                            test=False, device="cpu", seed=seed,
                        )  # fmt: skip
                        minutes = (time.monotonic() - started) / 60
                        few, _, _ = restore_pixel_segmentation(load_model_files(result.model))
                        model: Segmenter = EnsembleMean(few)
                    elif method == "from scratch":
                        model, minutes = from_scratch(
                            data, generator, augmenter, validation, options.minutes, seed, here / "scratch"
                        )
                    else:
                        model = raw_pixels(data, generator, augmenter, config, seed)
                        minutes = (time.monotonic() - started) / 60
                    add(method, labelled, seed, dice(model, generator, test, labels), minutes)
        draw(rows, options.out)


def draw(rows: Sequence[Mapping[str, object]], out: Path) -> None:
    """Write the table of means (with the range over seeds) and the curves, where all methods have the same seeds."""
    methods = [method for method in METHODS if any(row["method"] == method for row in rows)]
    have: dict[tuple[str, int], set[object]] = {}
    for row in rows:
        have.setdefault((str(row["method"]), int(str(row["labelled"]))), set()).add(row["seed"])
    counts = sorted({n for _, n in have})  # means over different numbers of seeds are not comparable
    counts = [n for n in counts if all(have.get((method, n)) == have.get((methods[0], n)) for method in methods)]
    lines = ["| labelled | " + " | ".join(methods) + " |", "|" + "---|" * (1 + len(methods))]
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    means: dict[str, list[float]] = {method: [] for method in methods}
    for count in counts:
        cells = []
        for method in methods:
            values = [float(str(r["dice"])) for r in rows if r["method"] == method and int(str(r["labelled"])) == count]
            means[method].append(sum(values) / len(values))
            cells.append(f"{means[method][-1]:.3f} ({min(values):.3f} to {max(values):.3f})")
        lines.append(f"| {count} | " + " | ".join(cells) + " |")
    for method in methods:
        axes.plot(counts, means[method], marker="o", label=method)
        points = [(int(str(r["labelled"])), float(str(r["dice"]))) for r in rows if r["method"] == method]
        places, scores = zip(*points, strict=True)
        axes.plot(places, scores, ".", alpha=0.5, color=axes.lines[-1].get_color())
    axes.set(xscale="log", xlabel="labelled", ylabel="mean Dice of the held-out cases", ylim=(0, 1))
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out / "curves.png", dpi=130)
    plt.close(figure)
    (out / "table.md").write_text("\n".join(lines) + "\n")
    print((out / "table.md").read_text())


if __name__ == "__main__":
    main()
