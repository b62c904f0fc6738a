"""Segmenters after equal time: each preset is trained for as many steps as fit into --minutes on this machine.

    python benchmarks/equal_time.py DATA OUT PRESET... [--minutes 20] [--set diffusion.scale=0.2]

The learning rate has to reach its end in time, so steps and a validation are timed before a run starts. OUT/PRESET is
the run folder; an interrupted call goes on where it stopped, and finished runs are left alone.
`medseg benchmark-segmenter --side test` scores the runs.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from medseg_diffusion.config import SegmenterConfig, load_segmenter_config
from medseg_diffusion.methods.calibration import MEMBERS
from medseg_diffusion.train import train_segmenter
from medseg_diffusion.training.trainer import Progress

WARM, TIMED, TIMED_AUTOENCODER = 20, 60, 61
VALIDATIONS = 6
SPARE = 0.95


@dataclass
class Stopwatch:
    """Seconds per step of every stage of a training, told apart by its number of steps; the first ones are left out."""

    at: dict[int, list[float]] = field(default_factory=dict)

    def __call__(self, progress: Progress) -> None:
        self.at.setdefault(progress.max_steps, []).append(time.monotonic())

    def seconds_per_step(self, max_steps: int) -> float:
        marks = self.at[max_steps][WARM:]
        return median(later - earlier for earlier, later in pairwise(marks))

    def seconds_per_validation(self, max_steps: int) -> float:
        """There is one, after the last step."""
        before, after = self.at[max_steps][-2:]
        return after - before - self.seconds_per_step(max_steps)


def fitting_steps(config: SegmenterConfig, data: Path, minutes: float) -> int:
    """Steps of ``config`` that fit into ``minutes`` with validations, calibration and any autoencoder of masks."""
    stopwatch = Stopwatch()
    planned = config.training.max_steps
    timed = config.model_copy(update={"training": config.training.model_copy(update={"validate_every": planned})})
    seconds = SPARE * 60 * minutes
    if config.method == "latent-mask":
        first = config.mask_autoencoder.max_steps
        short = config.mask_autoencoder.model_copy(update={"max_steps": TIMED_AUTOENCODER})
        timed = timed.model_copy(update={"mask_autoencoder": short})
    with TemporaryDirectory() as folder:
        train_segmenter(timed, data, Path(folder) / "run", max_steps=TIMED, on_progress=stopwatch)
    if config.method == "latent-mask":
        seconds -= first * stopwatch.seconds_per_step(TIMED_AUTOENCODER)
    calibration = 1 if config.method == "baseline" else MEMBERS
    seconds -= (VALIDATIONS + calibration) * stopwatch.seconds_per_validation(TIMED)
    return max(1, int(seconds / stopwatch.seconds_per_step(TIMED)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("presets", nargs="+")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for preset in options.presets:
        run = options.out / Path(preset).stem
        if (run / "finished").exists():
            continue
        resume = (run / "config.yaml").exists()
        config = load_segmenter_config(run / "config.yaml" if resume else preset, () if resume else options.overrides)
        if not resume:
            steps = fitting_steps(config, options.data, options.minutes)
            every = -(-steps // VALIDATIONS)
            fit = [f"training.max_steps={steps}", f"training.validate_every={every}"]
            config = load_segmenter_config(preset, [*options.overrides, *fit])
            print(f"{preset}: {steps} steps in {options.minutes:g} minutes", flush=True)
        started = time.monotonic()
        train_segmenter(config, options.data, run, resume=resume, seed=options.seed)
        print(f"{preset}: took {(time.monotonic() - started) / 60:.1f} minutes", flush=True)
        (run / "finished").touch()


if __name__ == "__main__":
    main()
