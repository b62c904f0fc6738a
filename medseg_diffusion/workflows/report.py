"""`medseg report`: a page about a training run, also while it goes on. Nothing in the run folder is changed.

RUN/report.html   the page, unless -o names another file
"""

from __future__ import annotations

import json
import math
import shlex
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from medseg_diffusion.config.load import command_of
from medseg_diffusion.errors import InputError
from medseg_diffusion.files import require_replaceable, write_files
from medseg_diffusion.metrics.training_history import History
from medseg_diffusion.reports.run_page import Picture, RunSummary, State, TrainedNetwork, run_page
from medseg_diffusion.training.history import is_logged, read_history
from medseg_diffusion.training.job import FIRST_STAGE_WARMUP
from medseg_diffusion.training.trainer import TrainingOptions, learning_rate
from medseg_diffusion.volumes.paths import refuse_scan_name

QUIET_SECONDS = 600.0
"""A training that has logged nothing for so long, and for twice its longest step with a validation, has been stopped.
Entries reach the disk every two minutes."""
PICTURES = 8
"""Pictures that are shown of each network."""
PICTURE_PIXELS = 512
"""Largest side of a picture on the page."""
_FIRST_STAGE = "autoencoder"
_FINDER = "finder"
_MASKS = "Autoencoder of masks (first stage)"
_ORGAN = "Finder of the organ (first stage)"
_PARTS = ("generator", "classifier")
"""Folders of the networks of an anomaly model."""


def report(run: str | Path, output: str | Path | None = None, *, command: str = "") -> tuple[Path, RunSummary]:
    """Write the page about a run and return its path and what it says.

    Args:
        run: Run folder of a training.
        output: File of the page; None for report.html in the run folder.
        command: The command line, for the page.

    Raises:
        InputError: The folder is no run.
        UsageError: The page cannot be written.
    """
    run = Path(run)
    target = Path(output or run / "report.html")
    _config(run)  # a folder that is no run is refused as such
    require_replaceable(target)
    refuse_scan_name(target)
    now = time.time()
    summary = run_summary(run, now)
    write_files(target.parent, {target.name: run_page(summary, now=now, command=command)})
    return target, summary


def run_summary(run: Path, now: float) -> RunSummary:
    """What a run folder holds.

    Args:
        run: The folder.
        now: The present, seconds since the epoch: a training is going on if it has logged something lately.

    Raises:
        InputError: The folder is no run.
    """
    config, text = _config(run)
    networks = [_network(*part, now) for part in _networks(run, config)]
    card = _card(run / "model")
    state = _state_of_run(run, networks)
    return RunSummary(
        name=run.resolve().name,
        folder=str(run),
        kind=_kind(config),
        description=str(config.get("description") or ""),
        networks=networks,
        state=state,
        config=text,
        sides=_sides(run, card),
        data=_data(run, card),
        model=_model(run / "model", card),
        metrics=_metrics(card),
        commands=_commands(run, config, state),
        warnings=_warnings(networks),
    )


def _config(run: Path) -> tuple[dict[str, Any], str]:
    """The content and the text of config.yaml: that of the run, or of a first stage that has begun alone.

    It is not checked as configurations are: older versions knew other keys.
    """
    places = [run / "config.yaml", run / _FIRST_STAGE / "config.yaml"]
    expected, remedy = "a run folder", "name the folder that was given to -o of a training"
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        found = "a model, not the run that trained it" if (run / "model.json").is_file() else "no config.yaml"
        raise InputError(run, found if run.is_dir() else "no folder", expected, remedy)
    try:
        text = file.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(file, "no YAML", "the configuration of a run", "restore it") from error
    if not isinstance(content, dict) or not isinstance(content.get("method"), str):
        raise InputError(file, "no method", "the configuration of a run", remedy)
    return content, text


def _trainer(method: str) -> str:
    """The command that trains a method; for one of another version, that of segmenters."""
    try:
        return command_of(method)
    except KeyError:
        return "train-segmenter"


def _of_images(method: str) -> bool:
    return _trainer(method) == "train-generator"


def _kind(config: Mapping[str, Any]) -> str:
    method = config["method"]
    if method == "anomaly":
        return f"Anomaly model ({', '.join(map(str, config.get('detectors') or ['anomaly']))})"
    if method in ("autoencoder", "upsampler"):
        return str(method).capitalize() + " of images"
    if method == "classifier":
        return "Classifier of noised images"
    if method == "label-efficient":
        return "Pixel classifier (label-efficient)"
    return f"{'Generator' if _of_images(method) else 'Segmenter'} ({method})"


# ---- networks --------------------------------------------------------------------------------------------------------


def _networks(run: Path, config: Mapping[str, Any]) -> Iterator[tuple[Path, str, Mapping[str, Any]]]:
    """Folder, title and training section of every network that has logged something or begun, in their order."""
    method = config["method"]
    if method == "anomaly":
        for name in _PARTS:
            if isinstance(config.get(name), dict):
                for folder, title, section in _networks(run / name, config[name]):
                    yield (
                        folder,
                        name.capitalize() if folder == run / name else f"{name.capitalize()}: {title}",
                        section,
                    )
        return
    if method == "label-efficient":
        return
    first, section = run / _FIRST_STAGE, _section(config)
    if method == "latent-mask" and is_logged(first):
        yield first, _MASKS, _of_first_stage(section, config.get("mask_autoencoder"))
    elif (first / "config.yaml").is_file():
        yield first, "Autoencoder (first stage)", _section(_config(first)[0])
    if is_logged(run / _FINDER):
        yield run / _FINDER, _ORGAN, _of_first_stage(section, config.get("finder"))
    if (run / "config.yaml").is_file():
        yield run, _title(method), section


def _score(title: str, history: History) -> str:
    """What the score of a network's validations is."""
    if title == _MASKS:
        return "The score is the mean Dice of validation masks against their reconstructions."
    if title == _ORGAN:
        return "The score is the mean Dice of the organ in coarse validation windows."
    if "Autoencoder" in title:
        return "The score is the step: an adversarial loss trades reconstruction for sharpness. The last weights count."
    if title != "Segmenter":
        return "The score is minus the loss."
    several = any("energy_distance" in row for row in history.validations)
    return f"The score is {'1 minus the energy distance' if several else 'the mean Dice over the classes'}."


def _title(method: str) -> str:
    names = {"autoencoder": "Autoencoder", "classifier": "Classifier", "upsampler": "Upsampler"}
    return names.get(method, "Generator" if _of_images(method) else "Segmenter")


def _section(config: Mapping[str, Any]) -> dict[str, Any]:
    section = config.get("training")
    return dict(section) if isinstance(section, dict) else {}


def _of_first_stage(section: Mapping[str, Any], own: Any) -> dict[str, Any]:
    """The training section of a segmenter's first stage, whose own section is ``own``."""
    changed = {key: own[key] for key in ("max_steps", "learning_rate") if key in own} if isinstance(own, dict) else {}
    return {**section, **changed, "warmup_steps": FIRST_STAGE_WARMUP}


def _network(folder: Path, title: str, section: Mapping[str, Any], now: float) -> TrainedNetwork:
    history = read_history(folder)
    options = _options(section)
    steps = np.unique(np.linspace(0, options.max_steps - 1, 200).astype(int))
    steps = np.union1d(steps, [step for step in (options.warmup_steps,) if step < options.max_steps])
    rates = [learning_rate(int(step), options) for step in steps]
    pictures = sorted(folder.glob("samples/*.png"))
    return TrainedNetwork(
        title,
        history,
        options.max_steps,
        _state(history, options.max_steps, now),
        ((steps + 1).tolist(), rates),
        tuple(_pictures(pictures, history)),
        len(pictures),
        reconstructions="Autoencoder" in title,
        validates_loss=title not in ("Segmenter", _MASKS, _ORGAN),
        score=_score(title, history),
    )


def _options(section: Mapping[str, Any]) -> TrainingOptions:
    """The options of the training; values of another kind, in a file that was changed by hand, are left out."""
    known: dict[str, Any] = {}
    for name, default in vars(TrainingOptions()).items():
        value = section.get(name)
        if isinstance(value, type(default)) or (isinstance(default, float) and isinstance(value, int)):
            known[name] = value
    return TrainingOptions(**known)


def _state(history: History, max_steps: int, now: float) -> State:
    if history.step >= max_steps:
        return "finished"
    longest = history.step_seconds[np.isfinite(history.step_seconds)].max(initial=0.0)
    return "going on" if now - history.written < max(QUIET_SECONDS, 2 * longest) else "stopped"


def _state_of_run(run: Path, networks: list[TrainedNetwork]) -> State:
    if any(network.state == "going on" for network in networks):
        return "going on"
    finished = all(network.state == "finished" for network in networks)
    return "finished" if finished and (run / "model" / "model.json").is_file() else "stopped"


def _pictures(files: list[Path], history: History) -> Iterator[Picture]:
    """Some of the pictures, evenly spread, with the step of their validation where each has one."""
    from PIL import Image

    rows = history.validations
    steps = [int(row["step"]) for row in rows] if len(rows) == len(files) else [None] * len(files)
    for i in np.unique(np.linspace(0, len(files) - 1, min(PICTURES, len(files))).round().astype(int)):
        with suppress(OSError), Image.open(files[i]) as image:
            small = image.convert("RGB")
            small.thumbnail((PICTURE_PIXELS, PICTURE_PIXELS))
            buffer = BytesIO()
            small.save(buffer, "PNG")
            yield Picture(int(i) + 1, steps[i], buffer.getvalue())


def _warnings(networks: list[TrainedNetwork]) -> list[str]:
    """What went wrong, as far as the numbers show it."""
    said = []
    for network in networks:
        history = network.history
        if (bad := int((~np.isfinite(history.loss)).sum())) and len(history.steps):
            said.append(f"{network.title}: {bad} of {len(history.steps)} steps have no finite loss.")
        best, rows = history.best, history.validations
        if best is not None and len(rows) > 3 and best["step"] <= rows[len(rows) // 2 - 1]["step"]:
            said.append(
                f"{network.title}: the score has not improved since step {int(best['step']):,}, in the first half of "
                "the validations."
            )
    return said


# ---- data and model --------------------------------------------------------------------------------------------------


def _card(model: Path) -> dict[str, Any]:
    """The model's card; empty before there is one."""
    return _json(model / "model.json")


def _json(file: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        content = json.loads(file.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {}
    return {}


def _entry(card: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """A mapping inside the card; empty where there is none."""
    for key in keys:
        stored = card.get(key)
        card = stored if isinstance(stored, dict) else {}
    return dict(card)


def _sides(run: Path, card: Mapping[str, Any]) -> dict[str, tuple[int | None, int | None]]:
    """Side of the split -> patients and cases."""
    split, data = _json(run / "split.json"), _entry(card, "training", "data")
    if split and all(isinstance(names, list) for names in split.values()):  # side -> cases
        patients = {side: data.get("patients" if side == "train" else f"{side}_patients") for side in split}
        known = {side: count if isinstance(count, int) else None for side, count in patients.items()}
        return {side: (known[side], len(names)) for side, names in split.items()}
    counts = [side for side in split.values() if isinstance(side, str)]  # patient -> side
    return {side: (counts.count(side), None) for side in ("train", "validation", "test") if side in counts}


def _data(run: Path, card: Mapping[str, Any]) -> dict[str, str]:
    known = _entry(card, "training", "data")
    if (run / "split.json").is_file():  # the table of its sides has them
        known = {name: value for name, value in known.items() if not name.endswith(("cases", "patients"))}
    facts = {name.replace("_", " "): _plain(value) for name, value in known.items()}
    labelled = _json(run / "labelled.json").get("labelled")
    if isinstance(labelled, list):
        facts["labelled images"] = ", ".join(map(str, labelled))
    labels = [str(name) for value, name in _entry(card, "labels").items() if value != "0"]
    return facts | ({"classes": ", ".join(labels)} if labels else {})


def _plain(value: Any) -> str:
    if isinstance(value, list) and value and all(isinstance(item, list) for item in value):
        return ", ".join(" x ".join(map(str, item)) for item in value)
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _model(model: Path, card: Mapping[str, Any]) -> dict[str, str]:
    if not card:
        return {}
    facts = {"path": str(model)}
    weights = model / "weights.safetensors"
    if weights.is_file():
        facts["size"] = f"{weights.stat().st_size / 1e6:.1f} MB"
    if isinstance(step := _entry(card, "training").get("step"), int):
        facts["weights"] = f"of step {step:,}"
    if calibration := _entry(card, "calibration"):
        facts["calibrated"] = "yes" if "temperature" in calibration else ", ".join(calibration)
    if versions := _entry(card, "versions"):
        facts["trained with"] = ", ".join(f"{name} {number}" for name, number in versions.items())
    if licence := card.get("licence"):
        facts["licence"] = str(licence)
    return facts


def _metrics(card: Mapping[str, Any]) -> dict[str, float]:
    """Measure -> value, such as "validation dice anterior"."""
    return {
        f"{side} {name}".replace("_", " "): float(value)
        for side, numbers in _entry(card, "metrics").items()
        if isinstance(numbers, dict)
        for name, value in numbers.items()
        if name != "score" and isinstance(value, int | float) and math.isfinite(value)
    }


# ---- commands --------------------------------------------------------------------------------------------------------


def _commands(run: Path, config: Mapping[str, Any], state: State) -> dict[str, str]:
    """What it is for -> the command line. Capital letters stand for paths that a run does not store."""
    if state == "finished":
        return _uses(run, config)
    if config["method"] == "label-efficient":  # such a run cannot be resumed
        return {}
    purpose = "Should it be stopped, continue with" if state == "going on" else "Continue with"
    return {purpose: _resume(run, config)}


def _resume(run: Path, config: Mapping[str, Any]) -> str:
    method, own = config["method"], run / "config.yaml"
    parts = ["medseg", _trainer(method), str(own) if own.is_file() else "CONFIG"]
    parts += ["--healthy" if method == "anomaly" else "--data", "DATA"]
    if isinstance(noted := config.get("exclude_labelled"), int):
        parts += ["--exclude-labelled", str(noted)]
    if method == "anomaly" and _entry(config, "generator", "condition").get("classes", "none") != "none":
        parts += ["--unhealthy", "UNHEALTHY"]
    if config.get("autoencoder_sha256") and not (run / _FIRST_STAGE).is_dir():
        parts += ["--autoencoder", "AUTOENCODER"]
    if config.get("seed"):
        parts += ["--seed", str(config["seed"])]
    return shlex.join([*parts, "-o", str(run), "--resume"])


def _uses(run: Path, config: Mapping[str, Any]) -> dict[str, str]:
    name, method = shlex.quote(str(run)), config["method"]
    # A path that ends with a name, which "." does not.
    beside = shlex.quote(f"{run.resolve() if run.name in ('', '..') else run}-results")
    if method == "anomaly":
        return {"Find anomalies": f"medseg anomaly SCAN -m {name} -o {beside}"}
    if method == "autoencoder":
        return {
            "Train a latent generator with it": f"medseg train-generator CONFIG --data DATA --autoencoder {name} -o RUN"
        }
    if method == "classifier":
        return {"Guide a generator by it": f"medseg sample GENERATOR --classifier {name} -n 16 -o {beside}"}
    if method == "upsampler":
        return {"Enlarge the images of a generator": f"medseg sample GENERATOR --upsampler {name} -n 16 -o {beside}"}
    if method == "patched":
        return {}
    if _of_images(method):
        return {
            "Sample": f"medseg sample {name} -n 16 -o {beside}",
            "Score it": f"medseg evaluate-generator {name} --reference DATA -o {beside}",
        }
    uses = {"Segment": f"medseg segment SCAN -m {name} -o {beside}"}
    if method != "label-efficient":
        uses["Choose sampler, steps and ensemble"] = f"medseg benchmark-segmenter {name} --data DATA -o {beside}"
        uses["Measure it on the test side"] = (
            f"medseg benchmark-segmenter {name} --data DATA --side test -n 0 --setting SAMPLER:STEPS:N -o {beside}"
        )
    return uses
