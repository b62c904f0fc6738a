"""Few labels: classifiers of a generator's activations beside two that do without the generator.

    python benchmarks/few_labels.py DATA GENERATOR OUT [--unit slice] [--labelled 1 2 5] [--seeds 0 1 2] [--minutes 5]

For every number of labels and every seed, on the same labelled images and the same held-out cases:

"label-efficient"  `medseg train-pixel-classifier`
"from scratch"     the generator's own network, trained on the labelled images alone (Dice + cross-entropy, augmented)
                   for --minutes; the step with the best Dice on 8 validation cases is taken
"raw pixels"       the same classifiers on intensity and coordinates

Written: scores.csv, one row a run, which an interrupted call continues; table.md and curves.png.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from medseg_diffusion import build
from medseg_diffusion.checkpoint import load_model_files
from medseg_diffusion.config import PixelClassifierConfig, load_config
from medseg_diffusion.data.augmentation import Augmentation, Augmenter
from medseg_diffusion.data.cases import Case
from medseg_diffusion.data.draws import Draws
from medseg_diffusion.diffusion.noise import derive_seed
from medseg_diffusion.generator import Generator, restore_generator
from medseg_diffusion.methods.label_efficient import (
    ClassifierOptions,
    PixelSegmentation,
    fit_classifiers,
    labelled_pixels,
)
from medseg_diffusion.methods.segment import Segmenter, Windows, segment
from medseg_diffusion.metrics.overlap import label_overlap
from medseg_diffusion.networks.unet import UNet
from medseg_diffusion.sampling.ddim import DDIM
from medseg_diffusion.sampling.loop import Sampler
from medseg_diffusion.tasks.mask import FeedForward, MaskEncoding
from medseg_diffusion.train_pixel_classifier import LabelledData, labelled_units, train_pixel_classifier
from medseg_diffusion.training.runtime import Runtime, arranged
from medseg_diffusion.training.trainer import Callbacks, TrainingOptions, fit
from medseg_diffusion.volumes.fitting import fitted, unfitted
from medseg_diffusion.volumes.io import read_labels, read_volume

VALIDATION_CASES = 8
VALIDATIONS = 6


class RawPixels:
    """Intensity and coordinates where `Activations` would be."""

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
        found = self.model.probabilities(fitted(image.clamp(-1, 1), self.size), seeds, sampler, times)
        return unfitted(found.flatten(1, 2), image.shape[2:]).unflatten(1, found.shape[1:3])


class Units:
    """Labelled images as training examples, augmented."""

    def __init__(self, images: Sequence[Tensor], masks: Sequence[Tensor], dims: int) -> None:
        self.images, self.masks = images, masks
        self.augmenter = Augmenter(Augmentation(flip_axes=(1,) if dims == 2 else (0,)), dims)

    def __len__(self) -> int:
        return len(self.images)

    def example(self, index: int, generator: torch.Generator) -> Mapping[str, Tensor]:
        image, label = self.augmenter(self.images[index], self.masks[index], generator)
        return {"image": image.contiguous(), "label": label.contiguous()}


def dice(model: Segmenter, generator: Generator, cases: Sequence[Case], labels: Sequence[int]) -> float:
    """Mean over cases and classes of the Dice on the scans' own grids."""
    shape = generator.config.data.shape
    preprocessing = build.preprocessing(generator.config.preprocessing)
    windows = Windows(shape if len(shape) == 3 else None)
    found = []
    for case in cases:
        image, placement = preprocessing.apply(read_volume(case.image, channels=None))
        with torch.no_grad():
            probabilities = segment(model, image, [0], DDIM(), [1, 0], windows, len(shape))[0]
        native = placement.restore(probabilities, [1.0] + [0.0] * (len(probabilities) - 1)).argmax(0)
        overlap = label_overlap(native.numpy(), read_labels(case.label).data[0].numpy(), labels)
        found += [overlap[label].dice for label in labels]
    return float(torch.tensor(found).nanmean())


def from_scratch(
    found: LabelledData, generator: Generator, validation: Sequence[Case], minutes: float, seed: int, run: Path
) -> FeedForward:
    config = generator.config
    dims, count = len(config.data.shape), len(found.labels)
    encoding = MaskEncoding(count)
    torch.manual_seed(derive_seed(seed, "weights"))
    network = UNet(in_channels=config.data.channels, out_channels=encoding.channels, **config.network.model_dump())
    model = Fitted(FeedForward(arranged(network, True, False), encoding), config.data.shape)
    images = [image for unit in found.units for image in unit.images]
    masks = [mask.long() for unit in found.units for mask in unit.labels]
    draws = Draws(Units(images, masks, dims), seed)
    batch = 8 if dims == 2 else 2
    runtime = Runtime("cpu", "fp32")
    best: dict[str, Tensor] = {}
    labels = [label for label in found.labels if label]

    def validate(averaged: nn.Module) -> Mapping[str, float]:
        return {"score": dice(averaged, generator, validation, labels)}  # type: ignore[arg-type]

    def save(averaged: nn.Module, step: int, numbers: Mapping[str, float]) -> None:
        best.update({name: value.clone() for name, value in averaged.state_dict().items()})

    # The learning rate has to reach its end in time, so steps are timed first.
    started = time.monotonic()
    for i in range(3):
        parts = [draws[i * batch + j] for j in range(batch)]
        model({name: torch.stack([part[name] for part in parts]) for name in parts[0]}).backward()
    steps = max(50, int(60 * minutes / ((time.monotonic() - started) / 3)))
    model.zero_grad()
    options = TrainingOptions(
        batch_size=batch, max_steps=steps, warmup_steps=min(100, steps // 10), validate_every=-(-steps // VALIDATIONS),
        learning_rate=1e-3, ema_decay=0.99, weight_decay=1e-4, gradient_clip=1.0, workers=0, checkpoint_minutes=60.0,
    )  # fmt: skip
    fit(model, draws, options, Callbacks(validate, save), run, runtime, seed=seed)
    model.load_state_dict(best)
    return model.eval()  # type: ignore[return-value]


def raw_pixels(found: LabelledData, generator: Generator, config: PixelClassifierConfig, seed: int) -> Segmenter:
    images = [image for unit in found.units for image in unit.images]
    masks = [mask.long() for unit in found.units for mask in unit.labels]
    raw = RawPixels()
    pixels = labelled_pixels(raw, images, masks, len(found.labels), config.data.pixels_per_class, seed)  # type: ignore[arg-type]
    classifiers = fit_classifiers(pixels, ClassifierOptions(**config.classifier.model_dump()), seed)
    return First(PixelSegmentation(raw, classifiers, generator.config.data.shape))  # type: ignore[arg-type]


class First(nn.Module):
    """All members of an ensemble as one."""

    def __init__(self, model: PixelSegmentation) -> None:
        super().__init__()
        self.model = model

    def probabilities(
        self, image: Tensor, seeds: Sequence[Sequence[int]], sampler: Sampler, times: Sequence[int]
    ) -> Tensor:
        members = len(self.model.classifiers.members)
        every = self.model.probabilities(image, [list(range(members))] * len(image), sampler, times)
        return every.mean(1, keepdim=True)


def main() -> None:
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
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    config = load_config(options.config, options.overrides)
    assert isinstance(config, PixelClassifierConfig)
    generator = restore_generator(load_model_files(options.generator), "cpu")
    file = options.out / "scores.csv"
    rows = list(csv.DictReader(file.open())) if file.is_file() else []
    done = {(row["method"], int(row["labelled"]), int(row["seed"])) for row in rows}

    def add(method: str, labelled: int, seed: int, score: float, seconds: float) -> None:
        rows.append({"method": method, "labelled": labelled, "seed": seed, "dice": f"{score:.5f}",
                     "seconds": f"{seconds:.0f}"})  # fmt: skip
        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        print(f"{method}, {labelled} labelled, seed {seed}: Dice {score:.3f}, {seconds:.0f} s", flush=True)

    for labelled in options.labelled:
        for seed in options.seeds:
            with TemporaryDirectory() as folder:
                here = Path(folder)
                found = labelled_units(
                    config, generator, options.data, labelled, here / "cache", options.unit, "hash", seed
                )
                cases = {case.name: case for case in found.folder.cases}
                test = [cases[name] for name in found.split.test]
                validation = [cases[name] for name in found.split.validation[:VALIDATION_CASES]]
                labels = [label for label in found.labels if label]
                for method in ("label-efficient", "from scratch", "raw pixels"):
                    if (method, labelled, seed) in done:
                        continue
                    started = time.monotonic()
                    if method == "label-efficient":
                        result = train_pixel_classifier(
                            config, options.generator, options.data, labelled, here / "run", unit=options.unit,
                            test=False, device="cpu", seed=seed,
                        )  # fmt: skip
                        seconds = time.monotonic() - started
                        from medseg_diffusion.segmenter import restore_pixel_segmentation

                        model, _, _ = restore_pixel_segmentation(load_model_files(result.model))
                        score = dice(First(model), generator, test, labels)
                    elif method == "from scratch":
                        scratch = from_scratch(found, generator, validation, options.minutes, seed, here / "scratch")
                        seconds = time.monotonic() - started
                        score = dice(scratch, generator, test, labels)
                    else:
                        raw = raw_pixels(found, generator, config, seed)
                        seconds = time.monotonic() - started
                        score = dice(raw, generator, test, labels)
                    add(method, labelled, seed, score, seconds)
    draw(rows, options.out)


def draw(rows: Sequence[Mapping[str, object]], out: Path) -> None:
    """The table of means (smallest to largest over seeds), and the curves."""
    methods = list(dict.fromkeys(str(row["method"]) for row in rows))
    counts = sorted({int(str(row["labelled"])) for row in rows})
    lines = ["| labelled | " + " | ".join(methods) + " |", "|" + "---|" * (1 + len(methods))]
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    means: dict[str, list[float]] = {method: [] for method in methods}
    for count in counts:
        cells = []
        for method in methods:
            own = [float(str(r["dice"])) for r in rows if r["method"] == method and int(str(r["labelled"])) == count]
            means[method].append(sum(own) / len(own))
            cells.append(f"{means[method][-1]:.3f} ({min(own):.3f} to {max(own):.3f})")
        lines.append(f"| {count} | " + " | ".join(cells) + " |")
    for method in methods:
        axes.plot(counts, means[method], marker="o", label=method)
        points = [(int(str(r["labelled"])), float(str(r["dice"]))) for r in rows if r["method"] == method]
        places, scores = zip(*points, strict=True)
        axes.plot(places, scores, ".", alpha=0.5, color=axes.lines[-1].get_color())
    axes.set(xscale="log", xlabel="labelled", ylabel="mean Dice of the held-out cases", ylim=(0, 1))
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out / "curves.png", dpi=130)
    plt.close(figure)
    (out / "table.md").write_text("\n".join(lines) + "\n")
    print((out / "table.md").read_text())


if __name__ == "__main__":
    main()
