"""Trains presets for equal time: each gets as many steps as fit into --minutes on this machine.

    python benchmarks/studies/equal_time.py DATA OUT PRESET... [--minutes 20] [--set diffusion.scale=0.2] [--exclude 3]

Presets can be segmenters or anomaly models. The learning rate must reach its end in time, so that some steps and a
validation are timed before a run starts. All networks of an anomaly model share its time (`SHARES`). OUT/PRESET is the
run folder. A repeated call continues an interrupted one and skips finished runs. `medseg benchmark-segmenter --side
test` scores segmenters, and benchmarks/studies/anomaly_models.py scores anomaly models.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TypeVar

import yaml

from medseg_diffusion import build
from medseg_diffusion.config.anomaly import AnomalyConfig
from medseg_diffusion.config.generator import GeneratorConfig, ImageAutoencoderConfig, NoisyClassifierConfig
from medseg_diffusion.config.load import load_config
from medseg_diffusion.config.segmenter import SegmenterConfig
from medseg_diffusion.data.healthy import healthy_source, packed_healthy
from medseg_diffusion.data.image_cache import PackedImages
from medseg_diffusion.models.store import home
from medseg_diffusion.training.trainer import Progress
from medseg_diffusion.workflows.train_anomaly import train_anomaly
from medseg_diffusion.workflows.train_generator import train_generator
from medseg_diffusion.workflows.train_segmenter import train_segmenter

WARM, TIMED, TIMED_AUTOENCODER = 20, 60, 61
VALIDATIONS = 6
SPARE = 0.95
SHARES = {"autoencoder": 0.4, "classifier": 0.2}
"""Share of an anomaly model's time for each of these networks; the generator gets the rest."""


Part = TypeVar("Part", GeneratorConfig, ImageAutoencoderConfig, NoisyClassifierConfig)


@dataclass
class Stopwatch:
    """Seconds per step of every stage of a training, without the first steps; a stage is known by its ``max_steps``."""

    at: dict[int, list[float]] = field(default_factory=dict)

    def __call__(self, progress: Progress) -> None:
        self.at.setdefault(progress.max_steps, []).append(time.monotonic())

    def seconds_per_step(self, max_steps: int) -> float:
        marks = self.at[max_steps][WARM:]
        return median(later - earlier for earlier, later in pairwise(marks))

    def seconds_per_validation(self, max_steps: int) -> float:
        """Seconds of the only validation, after the last step."""
        before, after = self.at[max_steps][-2:]
        return max(0.0, after - before - self.seconds_per_step(max_steps))


def fitting_steps(config: SegmenterConfig, data: Path, minutes: float) -> int:
    """Number of steps that fit into ``minutes``, with validations, calibration and the mask autoencoder if any."""
    stopwatch = Stopwatch()
    planned = config.training.max_steps
    timed = config.model_copy(update={"training": config.training.model_copy(update={"validate_every": planned})})
    seconds = SPARE * 60 * minutes
    if config.method == "latent-mask":
        first = config.mask_autoencoder.max_steps
        short = config.mask_autoencoder.model_copy(update={"max_steps": TIMED_AUTOENCODER})
        timed = timed.model_copy(update={"mask_autoencoder": short})
    with TemporaryDirectory() as folder:
        train_segmenter(timed, data, Path(folder) / "run", max_steps=TIMED, on_step=stopwatch)
    if config.method == "latent-mask":
        seconds -= first * stopwatch.seconds_per_step(TIMED_AUTOENCODER)
    members = config.inference.ensemble if config.samples_masks else 1
    calibration = members * config.data.calibration_cases / config.data.validation_cases
    seconds -= (VALIDATIONS + calibration) * stopwatch.seconds_per_validation(TIMED)
    return max(1, int(seconds / stopwatch.seconds_per_step(TIMED)))


def fitting_anomaly(
    config: AnomalyConfig, data: Path, exclude: int | None, unhealthy: Path | None, minutes: float, autoencoder: Path
) -> AnomalyConfig:
    """``config`` with the steps that fit into ``minutes``; the autoencoder's configuration goes to ``autoencoder``."""
    section = config.generator.data
    source = healthy_source(data, exclude, unhealthy, (section.test_images, section.validation_images))
    preprocessing = build.image_preprocessing(config.generator.preprocessing, section.shape)
    images = packed_healthy(source, home() / "images", section.shape, section.channels, preprocessing)
    shares: dict[str, float] = {}
    generator = config.generator
    first: Path | None = None
    with TemporaryDirectory() as folder:
        if generator.autoencoder is not None:
            shares["autoencoder"] = SHARES["autoencoder"]
            settings = load_config(generator.autoencoder)
            assert isinstance(settings, ImageAutoencoderConfig)
            settings = settings.model_copy(update={"data": section, "preprocessing": generator.preprocessing})
            settings = fitting_part(settings, images, 60 * minutes * shares["autoencoder"], Path(folder))
            autoencoder.parent.mkdir(parents=True, exist_ok=True)
            autoencoder.write_text(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False))
            generator = generator.model_copy(update={"autoencoder": str(autoencoder)})
            first = Path(folder) / settings.method / "model"
        if config.classifier is not None:
            shares["classifier"] = SHARES["classifier"]
            part = fitting_part(config.classifier, images, 60 * minutes * shares["classifier"], Path(folder))
            config = config.model_copy(update={"classifier": part})
        rest = 60 * minutes * (1 - sum(shares.values()))
        return config.model_copy(update={"generator": fitting_part(generator, images, rest, Path(folder), first)})


def fitting_part(
    config: Part, images: PackedImages, seconds: float, folder: Path, autoencoder: Path | None = None
) -> Part:
    """One network's configuration with the steps that fit into ``seconds``, and `VALIDATIONS` of them."""
    planned = config.training.max_steps
    section = config.training.model_copy(update={"validate_every": planned})
    timed = config.model_copy(update={"training": section})
    stopwatch = Stopwatch()
    train_generator(timed, images, folder / config.method, max_steps=TIMED, autoencoder=autoencoder, on_step=stopwatch)
    left = SPARE * seconds - VALIDATIONS * stopwatch.seconds_per_validation(TIMED)
    steps = max(1, int(left / stopwatch.seconds_per_step(TIMED)))
    print(f"{config.method}: {steps} steps", flush=True)
    section = section.model_copy(update={"max_steps": steps, "validate_every": -(-steps // VALIDATIONS)})
    return config.model_copy(update={"training": section})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("presets", nargs="+")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--exclude", type=int, help="anomaly models: as --exclude-labelled of medseg train-anomaly")
    parser.add_argument("--unhealthy", type=Path, help="anomaly models: as --unhealthy of medseg train-anomaly")
    options = parser.parse_args()
    for preset in options.presets:
        run = options.out / Path(preset).stem
        if (run / "finished").exists():
            continue
        resume = (run / "config.yaml").exists()
        config = load_config(run / "config.yaml" if resume else preset, () if resume else options.overrides)
        started = time.monotonic()
        if isinstance(config, AnomalyConfig):
            unhealthy = options.unhealthy if config.needs_unhealthy else None
            if not resume:
                first = run.with_name(f"{run.name}-autoencoder.yaml")
                config = fitting_anomaly(config, options.data, options.exclude, unhealthy, options.minutes, first)
            started = time.monotonic()
            train_anomaly(
                config, options.data, run, exclude_labelled=options.exclude, unhealthy=unhealthy, resume=resume,
                seed=options.seed,
            )  # fmt: skip
        else:
            assert isinstance(config, SegmenterConfig)
            if not resume:
                steps = fitting_steps(config, options.data, options.minutes)
                every = -(-steps // VALIDATIONS)
                fit = [f"training.max_steps={steps}", f"training.validate_every={every}"]
                loaded = load_config(preset, [*options.overrides, *fit])
                assert isinstance(loaded, SegmenterConfig)
                config = loaded
                print(f"{preset}: {steps} steps in {options.minutes:g} minutes", flush=True)
            started = time.monotonic()
            train_segmenter(config, options.data, run, resume=resume, seed=options.seed)
        print(f"{preset}: took {(time.monotonic() - started) / 60:.1f} minutes", flush=True)
        (run / "finished").touch()


if __name__ == "__main__":
    main()
