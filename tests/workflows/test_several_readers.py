"""Several readers from the folder to the numbers: `train-segmenter` and `benchmark-segmenter`."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from medseg_cli.main import app
from PIL import Image
from typer.testing import CliRunner

from medseg_diffusion.config.segmenter import SegmenterConfig
from medseg_diffusion.data.cases import find_cases, split_by_hash
from medseg_diffusion.errors import UsageError
from medseg_diffusion.models.load import load_segmenter
from medseg_diffusion.models.store import load_model_files
from medseg_diffusion.workflows.benchmark_segmenter import BenchmarkOptions, BenchmarkRow, benchmark_segmenter
from medseg_diffusion.workflows.segment import SegmentOptions, segment
from medseg_diffusion.workflows.train_segmenter import train_segmenter

METHODS = ("ensemdiff", "categorical", "probabilistic-unet", "baseline")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six patients of three slices with a bright block; reader 2 finds nothing in every second slice."""
    folder, rows = tmp_path_factory.mktemp("data"), ["case,patient"]
    generator = np.random.default_rng(0)
    for part in ("images", "raters/1", "raters/2"):
        (folder / part).mkdir(parents=True)
    for patient in range(6):
        for i in range(3):
            name, mask = f"p{patient}-{i}", np.zeros((16, 16), np.uint8)
            mask[4 : 9 + patient % 3, 4:12] = 1
            image = (60 + 120 * mask + 20 * generator.random(mask.shape)).astype(np.uint8)
            Image.fromarray(image).save(folder / "images" / f"{name}.png")
            Image.fromarray(mask).save(folder / "raters" / "1" / f"{name}.png")
            Image.fromarray(mask * (i % 2)).save(folder / "raters" / "2" / f"{name}.png")
            rows.append(f"{name},patient-{patient}")
    (folder / "patients.csv").write_text("\n".join(rows))
    return folder


def config(method: str) -> SegmenterConfig:
    content: dict[str, Any] = {
        "method": method,
        "data": {"window": [16, 16], "labels": ["block"], "test_cases": 2, "validation_cases": 2},
        "preprocessing": {"orientation": None},
        "network": {"dims": 2, "channels": 8, "channel_mult": [1, 2], "norm_groups": 4},
        "probabilistic_unet": {"features": 8, "latent_channels": 2},
        "diffusion": {"schedule": {"name": "cosine", "num_steps": 50}},
        "training": {"batch_size": 2, "max_steps": 4, "validate_every": 2, "precision": "fp32"},
        "inference": {"sampler": "ddpm" if method == "categorical" else "dpm++", "steps": 3, "ensemble": 2},
    }
    return SegmenterConfig.model_validate(content)


@pytest.fixture(scope="module")
def models(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    runs = tmp_path_factory.mktemp("runs")
    return {method: train_segmenter(config(method), data, runs / method, device="cpu").parent for method in METHODS}


@pytest.mark.parametrize("method", METHODS)
def test_training_validates_distributions_and_splits_by_patient(models: dict[str, Path], method: str) -> None:
    run = models[method]
    rows = list(csv.DictReader((run / "log.csv").read_text().splitlines()))
    last = {name: float(value) for name, value in rows[-1].items()}
    assert last["score"] == pytest.approx(1 - last["energy_distance"], abs=1e-4)
    assert last["empty_readers"] == 0.0, "the middle slice of every patient has no empty mask"
    split = json.loads((run / "split.json").read_text())
    sides = [{name.split("-")[0] for name in split[side]} for side in ("train", "validation", "test")]
    assert [len(side) for side in sides] == [2, 2, 2] and len(set().union(*sides)) == 6
    card = load_model_files(run).card
    facts = card["training"]["data"]
    assert [facts[name] for name in ("patients", "validation_patients", "test_patients")] == [2, 2, 2]
    assert "calibration" not in card, "one reader's volumes say nothing about another's"
    measured = {"ensemdiff": ["own", "fresh", "shared", "zeros"], "probabilistic-unet": ["own"], "baseline": None}
    names = measured.get(method, measured["ensemdiff"])
    assert (list(card["x_t"]["rows"]) if names else "x_t" not in card) == (names or True)
    if names and len(names) > 1:
        assert card["x_t"]["rows"]["zeros"]["pairwise_dice"] == 1 or method == "ensemdiff"  # which adds noise in steps
        assert "in place of x_t" in (run / "model" / "README.md").read_text()


def test_rows_of_the_benchmark(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    options = BenchmarkOptions(steps=[3], ensembles=[1, 4], samplers=["dpm++", "ddpm"], side="test", device="cpu")
    rows = benchmark_segmenter([str(models[method]) for method in METHODS], data, tmp_path, options)
    settings: dict[str, list[tuple[str, str, int, int]]] = {method: [] for method in METHODS}
    for row in rows:
        one = row.setting
        settings[Path(row.model).name].append((one.factor, one.sampler, one.steps, one.ensemble))
    assert settings["categorical"] == [
        ("steps", "ddpm", 3, 1), ("ensemble", "ddpm", 3, 1), ("ensemble", "ddpm", 3, 4), ("sampler", "ddpm", 3, 1),
    ]  # fmt: skip
    assert settings["probabilistic-unet"] == [("ensemble", "", 1, 1), ("ensemble", "", 1, 4)]
    assert settings["baseline"] == [("feed-forward", "", 1, 2)]
    for row in rows:
        assert (row.cases, row.patients) == (6, 2) and row.dice["block"].n == 2
        assert row.readers is not None and row.readers.energy_distance.n == 2
        assert 0 <= row.readers.energy_distance.mean <= 2 and row.readers.empty_readers.mean == pytest.approx(1 / 3)
        assert "GED^2" in row.cells()


def test_without_x_t(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    options = BenchmarkOptions(
        settings=[("ddpm", 3, 4), ("ddpm", 1, 2)], without_x_t=True, one_per_patient=True, side="test", device="cpu"
    )
    both = [str(models["categorical"]), str(models["baseline"])]
    with pytest.warns(UserWarning, match="baseline: takes at most one step"):
        rows = benchmark_segmenter(both, data, tmp_path, options)
    ablated: dict[str, BenchmarkRow] = {r.setting.x_t: r for r in rows if r.setting.factor == "without x_t"}
    assert list(ablated) == ["own", "fresh", "shared", "zeros"] and len(rows) == 2 + 4 + 1
    assert all(row.setting.steps == 3 for row in ablated.values()), "one step sees only noise"
    assert ablated["own"].cases == ablated["own"].patients == 2
    # With the same input at every step, samples differ in nothing: the last step's probabilities are the mask.
    assert ablated["shared"].pairwise_dice == ablated["zeros"].pairwise_dice == 1
    # The given setting with x_t is measured once.
    assert ablated["own"].seconds == rows[0].seconds
    written = list(csv.DictReader((tmp_path / "benchmark.csv").read_text().splitlines()))
    assert [row["x_t"] for row in written[2:6]] == list(ablated)


def test_settings_that_do_not_fit_a_model(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    """A sampler of another kind is refused before anything is measured; without steps the ensemble size counts."""
    both = [str(models["ensemdiff"]), str(models["categorical"])]
    with pytest.raises(UsageError, match=r"dpm\+\+ is no sampler of this model; use ddpm"):
        benchmark_segmenter(both, data, tmp_path, BenchmarkOptions(settings=[("dpm++", 2, 2)], device="cpu"))
    assert not list(tmp_path.iterdir())
    options = BenchmarkOptions(settings=[("ddpm", 3, 4), ("ddpm", 5, 4)], without_x_t=True, cases=1, device="cpu")
    with pytest.warns(UserWarning, match="takes at most one step, so nothing is measured without x_t"):
        rows = benchmark_segmenter([str(models["probabilistic-unet"])], data, tmp_path, options)
    assert [(row.setting.factor, row.setting.sampler, row.setting.ensemble) for row in rows] == [("setting", "", 4)]


def test_readers_who_see_nothing_do_not_stop_a_training(data: Path, tmp_path: Path) -> None:
    """With empty masks everywhere some numbers do not exist; the card leaves them out."""
    copy = shutil.copytree(data, tmp_path / "data")
    validation = split_by_hash(find_cases(data).cases, test=2, validation=2).validation
    chosen = {case.patient for case in find_cases(data).cases if case.name in validation}
    for case in find_cases(copy).cases:
        if case.patient in chosen:
            for path in case.labels:
                Image.fromarray(np.zeros((16, 16), np.uint8)).save(path)
    model = train_segmenter(config("baseline"), copy, tmp_path / "run", device="cpu")
    assert all(math.isfinite(value) for value in load_model_files(model).card["metrics"]["validation"].values())


def test_the_command_takes_both_options(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    arguments = ["benchmark-segmenter", str(models["categorical"]), "--data", str(data), "-o", str(tmp_path)]
    options = ["--setting", "ddpm:2:2", "--without-x-t", "--one-per-patient", "--side", "test", "--quiet"]
    shown = CliRunner().invoke(
        app, [*arguments, "--steps", "2", "--ensembles", "1,2", "--samplers", "ddpm", "-n", "1", "--verbose"]
    )
    assert shown.exit_code == 0 and "members' Dice" in shown.output, shown.output
    result = CliRunner().invoke(app, [*arguments, *options, "--json"])
    assert result.exit_code == 0, result.output
    assert [row["x_t"] for row in json.loads(result.stdout)] == ["own", "own", "fresh", "shared", "zeros"]


def test_options_that_a_method_does_not_have_are_refused(models: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="ddim is no sampler of labels; use ddpm"):
        load_segmenter(models["categorical"], "cpu", sampler="ddim")
    with pytest.raises(UsageError, match="samples in one step; leave --steps and --sampler out"):
        load_segmenter(models["probabilistic-unet"], "cpu", steps=5)
    with pytest.raises(UsageError, match="is feed-forward; leave --steps and --sampler out"):
        load_segmenter(models["baseline"], "cpu", sampler="ddpm")


@pytest.mark.parametrize("method", ["categorical", "probabilistic-unet"])
def test_members_of_a_slice_are_written(models: dict[str, Path], data: Path, tmp_path: Path, method: str) -> None:
    scan = data / "images" / "p0-0.png"
    options = SegmentOptions(model=str(models[method]), ensemble=3, output=tmp_path, save_members=True, device="cpu")
    (result,) = segment([scan], options)
    assert result.status == "done", result.error
    assert (tmp_path / "p0-0_seg.png").is_file() and (tmp_path / "p0-0_members.nii.gz").is_file()


def test_the_card_says_that_one_step_sees_only_noise(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    sentence = "In one step the network sees noise alone"
    content = config("ensemdiff").model_dump(mode="json") | {"inference": {"steps": 1}}
    one_step = train_segmenter(SegmenterConfig.model_validate(content), data, tmp_path / "run", device="cpu")
    assert sentence in (one_step / "README.md").read_text()
    for method in ("ensemdiff", "categorical", "probabilistic-unet", "baseline"):
        assert sentence not in (models[method] / "model" / "README.md").read_text()
