"""Short trainings on a GPU: the published generators of Tiny ImageNet with pictures and scores, or the brain model.

    python benchmarks/gpu_training.py generators OUT --data tiny-imagenet-200.zip [--minutes 2] [--rehearse]
    python benchmarks/gpu_training.py brain OUT --data brain_labelmaps [--minutes 8] [--rehearse]

generators: autoencoder-tiny-imagenet for a quarter of the minutes, then ldm-tiny-imagenet on its cached latents and
adm-tiny-imagenet for the minutes each, as their presets say. OUT/NAME.png shows samples, OUT/scores.json has the scores
of all (FID and others, features of EfficientNet-Lite0 unless Inception's weights are there), OUT/NAME.csv the losses.

brain: ensemdiff-brain-tissue-small on label maps. First some steps are timed, so that the learning rate reaches its end
in time. OUT/model is the model with weights in float16; its resume file, which is larger, is not kept.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from common import quiet, write_numbers

from medseg_diffusion.config.generator import GeneratorConfig, ImageAutoencoderConfig
from medseg_diffusion.config.load import load_config
from medseg_diffusion.config.segmenter import SegmenterConfig
from medseg_diffusion.errors import MedsegError
from medseg_diffusion.models.image_source import SampleOptions
from medseg_diffusion.training.trainer import Progress
from medseg_diffusion.workflows.evaluate_generator import GeneratorEvaluationOptions, evaluate_generator
from medseg_diffusion.workflows.export_model import export_model
from medseg_diffusion.workflows.sample import sample
from medseg_diffusion.workflows.train_generator import train_generator
from medseg_diffusion.workflows.train_segmenter import train_segmenter

LATENT, PIXEL, AUTOENCODER = "ldm-tiny-imagenet", "adm-tiny-imagenet", "autoencoder-tiny-imagenet"
SMALLEST = {
    "network.channels=8", "network.channel_mult=[1, 1]", "network.num_res_blocks=1", "network.attention_factors=[]",
    "network.norm_groups=4",
}  # fmt: skip
"""Changes of a preset's network in a rehearsal."""


class Steps:
    """Notes the last step, loss and time of a training."""

    def __init__(self) -> None:
        self.began, self.first, self.at, self.step, self.loss = time.monotonic(), 0.0, 0.0, 0, float("nan")

    def __call__(self, progress: Progress) -> None:
        self.at = time.monotonic()
        self.first = self.first or self.at
        self.step, self.loss = progress.step, progress.loss

    def numbers(self) -> dict[str, float]:
        """Seconds before the first step, steps, and seconds per step after it."""
        each = (self.at - self.first) / max(1, self.step - 1)
        return {"steps": self.step, "loss": self.loss, "seconds_per_step": each, "before_s": self.first - self.began}


def generators(options: argparse.Namespace, runs: Path) -> dict[str, Any]:
    device = "cpu" if options.rehearse else "cuda"
    minutes, limit = options.minutes, (2 if options.rehearse else None)
    result: dict[str, Any] = {"trainings": {}}
    models: list[Path] = []
    autoencoder: Path | None = None
    for name, share in ((AUTOENCODER, 1 / 4), (LATENT, 1.0), (PIXEL, 1.0)):
        config = load_config(name, changes(name) if options.rehearse else ())
        assert isinstance(config, GeneratorConfig | ImageAutoencoderConfig)
        steps = Steps()
        model = train_generator(
            config, options.data, runs / name, autoencoder=autoencoder if name == LATENT else None, max_steps=limit,
            time_limit_min=share * minutes, device=device, on_step=steps,
        )  # fmt: skip
        result["trainings"][name] = {"minutes": share * minutes, **steps.numbers()}
        if (runs / name / "log.csv").exists():
            shutil.copyfile(runs / name / "log.csv", options.out / f"{name}.csv")
        if name == AUTOENCODER:
            autoencoder = model
            pictures = sorted((runs / name / "samples").glob("*.png"))
            shutil.copyfile(pictures[-1], options.out / f"{name}.png")
        else:
            models.append(runs / name)
            sampling = SampleOptions(4 if options.rehearse else 64, batch_size=64, device=device)
            sample(model, runs / f"{name}-samples", sampling)
            shutil.copyfile(runs / f"{name}-samples" / "grid.png", options.out / f"{name}.png")
        write(options, result)
    result["scores"] = scored(options, models, runs / "scores", device)
    return result


def changes(name: str) -> list[str]:
    """What makes a preset small enough to rehearse it on a CPU."""
    common = ["training.batch_size=2", "training.workers=0", "training.validate_every=2", "training.warmup_steps=1"]
    if name == AUTOENCODER:
        network = ["network.channels=[8, 8]", "network.num_res_blocks=1", "network.norm_groups=4"]
        return [*common, *network, "loss.discriminator_channels=4", "loss.discriminator_layers=1"]
    heads = ["network.num_heads=null", "network.head_channels=8"]
    return [*common, *sorted(SMALLEST), *heads, "sampling.steps=2"]


def scored(options: argparse.Namespace, models: list[Path], folder: Path, device: str) -> Any:
    """The rows of `medseg evaluate-generator`; the reason if there are none."""
    count, steps = (10, 2) if options.rehearse else (500, 50)
    evaluation = GeneratorEvaluationOptions(
        (("ddim", steps),), SampleOptions(count=count, batch_size=250, device=device)
    )
    try:
        evaluate_generator([str(path) for path in models], options.data, folder, evaluation)
    except MedsegError as error:
        return {"left_out": str(error)}
    content = json.loads((folder / "scores.json").read_text())
    for row in content["rows"]:
        row["model"] = Path(row["model"]).name  # the folder of the runs is temporary
    return content


def brain(options: argparse.Namespace, runs: Path) -> dict[str, Any]:
    sys.path.insert(0, str(Path(__file__).parent / "studies"))
    import equal_time

    began = time.monotonic()
    workers = 0 if options.rehearse else max(0, (os.cpu_count() or 2) - 2)
    small = [*sorted(SMALLEST), "data.window=[16, 16, 16]", "inference.window=[32, 32, 32]", "data.examples_per_map=1",
             "data.test_cases=1", "data.validation_cases=1"]  # fmt: skip
    overrides = [f"training.workers={workers}", *(small if options.rehearse else ["training.batch_size=4"])]
    config = load_config("ensemdiff-brain-tissue-small", overrides)
    assert isinstance(config, SegmenterConfig)
    limit = 2 if options.rehearse else None
    if not options.rehearse:
        timed = equal_time.fitting_steps(config, options.data, options.minutes - 2)
        every = -(-timed // equal_time.VALIDATIONS)
        section = config.training.model_copy(update={"max_steps": timed, "validate_every": every})
        config = config.model_copy(update={"training": section})
    left = options.minutes - 1 - (time.monotonic() - began) / 60  # reading the maps, and saving, take the rest
    steps = Steps()
    model = train_segmenter(
        config, options.data, runs / "brain", max_steps=limit, time_limit_min=left,
        device="cpu" if options.rehearse else "cuda", on_step=steps,
    )  # fmt: skip
    shutil.rmtree(options.out / "model", ignore_errors=True)
    export_model(model, options.out / "model", half=True)  # 7.5 MB beside the results of other parts, not 15
    shutil.copyfile(runs / "brain" / "log.csv", options.out / "brain.csv")
    return {"config": config.model_dump(mode="json"), **steps.numbers()}


def write(options: argparse.Namespace, result: dict[str, Any]) -> None:
    write_numbers(options.out / f"{options.what}.json", result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("generators", "brain"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    options.minutes = options.minutes or {"generators": 2.0, "brain": 8.0}[options.what]
    options.out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as runs:
        result = {"generators": generators, "brain": brain}[options.what](options, Path(runs))
    write(options, result)


if __name__ == "__main__":
    with quiet():
        main()
