"""Trainings that are killed at random moments, again and again, and started again, in a process of their own.

Each training is a fork of a process that has imported everything and trained nothing, so that it starts at once.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from medseg_diffusion.config.load import parse_config
from medseg_diffusion.config.segmenter import SegmenterConfig
from medseg_diffusion.training.resume import Checkpoints
from medseg_diffusion.workflows.train_anomaly import train_anomaly
from medseg_diffusion.workflows.train_generator import train_generator
from medseg_diffusion.workflows.train_segmenter import train_segmenter
from tests.helpers import anomaly, generators, training

OFTEN = {"max_steps": 8, "validate_every": 4, "checkpoint_steps": 1, "warmup_steps": 1, "precision": "fp32"}


def segmenter(method: str) -> SegmenterConfig:
    content: dict[str, Any] = training.config(calibration_cases=1).model_dump(mode="json", exclude_unset=True)
    content |= {"method": method, "training": {"batch_size": 2, **OFTEN}}
    if method == "categorical":
        content["inference"] = {"steps": 2, "sampler": "ddpm"}
    if method == "latent-mask":
        content["mask_autoencoder"] = {"latent_channels": 2, "channels": [32, 32], "max_steps": 4}
    found = parse_config(content, "test")
    assert isinstance(found, SegmenterConfig)
    return found


def train(family: str, data: Path, run: Path, resume: bool) -> None:
    """One call of the training of a family."""
    options: dict[str, Any] = {"resume": resume, "device": "cpu"}
    if family in ("pixel", "latent"):
        changes: dict[str, Any] = {"training": {"batch_size": 2, "ema_decay": 0.5, **OFTEN}}
        if family == "latent":
            changes["autoencoder"] = str(data / "autoencoder.yaml")
        train_generator(generators.small_config(family, **changes), data / "pictures", run, **options)
    elif family == "anomaly":
        config = anomaly.small_config("pixel")
        section = config.generator.training.model_copy(update=OFTEN)
        changed = config.generator.model_copy(update={"training": section})
        config = config.model_copy(update={"generator": changed})
        train_anomaly(config, data / "lesions", run, exclude_labelled=2, **options)
    else:
        train_segmenter(segmenter(family), data / "blocks", run, **options)


def write_data(data: Path) -> None:
    """The scans and pictures of all families."""
    for name in ("pictures", "blocks", "lesions"):
        (data / name).mkdir(parents=True)
    generators.save_pictures(data / "pictures")
    training.write_scans(data / "blocks")
    anomaly.write_scans(data / "lesions")
    stage = generators.small_config(
        "autoencoder",
        loss={"perceptual": "gradient-ssim", "discriminator_channels": 8, "discriminator_layers": 1},
        training={"batch_size": 2, "ema_decay": 0.5, **OFTEN, "max_steps": 4},
    )
    (data / "autoencoder.yaml").write_text(json.dumps(stage.model_dump(mode="json")))


def forked(call: Callable[[], None]) -> int:
    """The number of a new process that makes the call."""
    number = os.fork()
    if number:
        return number
    try:
        call()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def steps_of(run: Path) -> int:
    """The steps that are done according to the resume files, over all stages of a run."""
    stages = [Checkpoints(run / name).files() for name in (".", "autoencoder", "generator")]
    return sum(int(files[0].stem[5:]) for files in stages if files)


def kill_again_and_again(family: str, data: Path, root: Path, kills: int) -> dict[str, Any]:
    """Trains without a kill into root/whole, and then into root/0, root/1, ... until so many processes were killed.

    Returns:
        The finished runs, the steps that were done at every kill, and the seconds of the run without a kill.
    """
    began = time.monotonic()
    _, status = os.waitpid(forked(lambda: train(family, data, root / "whole", False)), 0)
    assert status == 0
    seconds = time.monotonic() - began
    moments = random.Random(family)
    finished: list[str] = []
    places: list[int] = []
    while len(places) < kills or not finished or (root / f"{len(finished)}").exists():
        run = root / f"{len(finished)}"
        child = forked(lambda run=run: train(family, data, run, any(run.rglob("config.yaml"))))  # type: ignore[misc]
        # Every other kill comes at any time, the others some steps on, so that all parts of a run have their turn. Once
        # all the kills are done, the last run may come to its end.
        last_kill, at = len(places) >= kills, time.monotonic() + moments.uniform(0, seconds)
        target = None if last_kill or len(places) % 2 == 0 else steps_of(run) + moments.randint(1, 5)
        status = None
        while status is None and (last_kill or target is not None or time.monotonic() < at):
            ended, code = os.waitpid(child, os.WNOHANG)
            status = code if ended else None
            if target is not None and steps_of(run) >= target:
                target, at = None, time.monotonic() + moments.uniform(0, seconds / 16)
            time.sleep(0.002)
        if status is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            places.append(steps_of(run))
        else:
            assert status == 0, f"{run} failed when it was started again"
            finished.append(str(run))
    return {"finished": finished, "places": places, "seconds": seconds}


def main(family: str, data: str, root: str, kills: str) -> None:
    """Prints the result of `kill_again_and_again` as JSON in the last line."""
    # What a training would import: a fork has it already.
    import torch
    import torchmetrics.functional.image  # noqa: F401

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if not Path(data).exists():
        write_data(Path(data))
    Path(root).mkdir(parents=True)
    print(json.dumps(kill_again_and_again(family, Path(data), Path(root), int(kills))))


if __name__ == "__main__":
    main(*sys.argv[1:])
