"""`medseg benchmark-segmenter` from trained models to table and plot; training stores a calibration."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from medseg_cli.main import app
from typer.testing import CliRunner

from medseg_diffusion.config.segmenter import SegmenterConfig
from medseg_diffusion.data.cases import digest
from medseg_diffusion.errors import InputError, UsageError
from medseg_diffusion.models.load import load_segmenter
from medseg_diffusion.models.store import load_model_files, save_model
from medseg_diffusion.workflows.benchmark_segmenter import BenchmarkOptions, benchmark_segmenter
from medseg_diffusion.workflows.calibrate_segmenter import calibrate_segmenter
from medseg_diffusion.workflows.train_segmenter import train_segmenter


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight small scans with a bright block, and its mask."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for part in ("images", "labels"):
        (folder / part).mkdir()
    for i in range(8):
        label = np.zeros((9, 8, 8), np.uint8)
        label[2 : 5 + i % 3, 2:6, 3:7] = 1
        image = label + 0.2 * generator.standard_normal(label.shape)
        nib.save(nib.Nifti1Image(image.astype(np.float32), np.eye(4)), folder / "images" / f"case{i}.nii.gz")
        nib.save(nib.Nifti1Image(label, np.eye(4)), folder / "labels" / f"case{i}.nii.gz")
    return folder


def small(method: str) -> dict[str, Any]:
    return {
        "method": method,
        "data": {
            "window": [8, 8, 8],
            "labels": ["block"],
            "test_cases": 2,
            "validation_cases": 3,
            "calibration_cases": 1,
        },
        "network": {"channels": 8, "channel_mult": [1, 2]},
        "diffusion": {"head": "logits", "scale": 0.5, "dice_ce_weight": 1.0},
        "training": {"batch_size": 2, "max_steps": 4, "validate_every": 2, "precision": "fp32"},
        "inference": {"steps": 2},
    }


@pytest.fixture(scope="module")
def models(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    made = {}
    for method in ("ensemdiff", "baseline"):
        config = SegmenterConfig.model_validate(small(method))
        made[method] = train_segmenter(config, data, folder / method, device="cpu").parent
    return made


def test_training_stores_a_calibration(models) -> None:
    diffusion, baseline = (load_model_files(models[name]).card["calibration"] for name in ("ensemdiff", "baseline"))
    assert (diffusion["sampler"], diffusion["steps"], diffusion["ensemble"]) == ("dpm++", 2, 1)
    assert diffusion["cases"] == diffusion["patients"] == 1 and diffusion["agreement"] is None
    assert (baseline["sampler"], baseline["ensemble"], baseline["agreement"]) == ("", 1, None)
    for name in models:
        assert load_segmenter(models[name], "cpu").aggregation.calibration is not None


def test_one_factor_changes_at_a_time(models, data, tmp_path: Path) -> None:
    seen = []
    rows = benchmark_segmenter(
        [str(models["ensemdiff"]), str(models["baseline"])],
        data,
        tmp_path,
        BenchmarkOptions(steps=[1, 3], ensembles=[1, 2], samplers=["heun"], device="cpu"),
        on_progress=lambda what, share: seen.append(what),
    )
    settings = [(row.setting.factor, row.setting.sampler, row.setting.steps, row.setting.ensemble) for row in rows]
    assert settings == [
        ("steps", "dpm++", 1, 1), ("steps", "dpm++", 3, 1), ("ensemble", "dpm++", 2, 1), ("ensemble", "dpm++", 2, 2),
        ("sampler", "heun", 2, 1), ("feed-forward", "", 1, 1),
    ]  # fmt: skip
    assert [row.evaluations for row in rows] == [1, 3, 2, 4, 3, 1], "Heun's method evaluates twice in its first step"
    counts = [what.rpartition(": ")[2] for what in seen]
    assert counts == ["1 of 3", "2 of 3", "3 of 3"] * 6, "no setting comes twice here"
    for row in rows:
        assert row.cases == 3 and 0 <= row.mean_dice <= 1 and 0 <= row.ece <= 1 and row.seconds > 0
        assert row.iou["block"].mean <= row.dice["block"].mean
    written = list(csv.DictReader((tmp_path / "benchmark.csv").read_text().splitlines()))
    assert len(written) == 6 and written[1]["steps"] == "3"
    by_case = list(csv.DictReader((tmp_path / "cases.csv").read_text().splitlines()))
    assert len(by_case) == 6 * 3 and {row["class"] for row in by_case} == {"block"}
    first = [float(row["dice"]) for row in by_case if row["steps"] == "1" and row["factor"] == "steps"]
    assert np.mean(first) == pytest.approx(rows[0].dice["block"].mean)
    case = by_case[0]["case"]
    truth = np.asarray(nib.load(data / "labels" / f"{case}.nii.gz").dataobj)
    assert float(by_case[0]["reference_ml"]) == pytest.approx(truth.sum() / 1000)
    assert json.loads((tmp_path / "benchmark.json").read_text())[5]["setting"]["factor"] == "feed-forward"
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 2 and "dpm++, 3 steps, 1 sample" in page and "feed-forward" in page


def test_a_setting_is_measured_once_and_settings_can_be_chosen(models, data, tmp_path: Path) -> None:
    seen: list[str] = []
    rows = benchmark_segmenter(
        [str(models["ensemdiff"])],
        data,
        tmp_path,
        BenchmarkOptions(steps=[2], ensembles=[1], samplers=["dpm++"], device="cpu"),
        on_progress=lambda what, share: seen.append(what),
    )
    assert [row.setting.factor for row in rows] == ["steps", "ensemble", "sampler"] and len(seen) == 3
    assert len({row.mean_dice for row in rows}) == 1
    arguments = ["benchmark-segmenter", str(models["ensemdiff"]), "--data", str(data), "-o", str(tmp_path), "-n", "1"]
    result = CliRunner().invoke(app, [*arguments, "--setting", "ddpm:4:2", "--device", "cpu", "--json"])
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)
    assert (row["factor"], row["sampler"], row["evaluations"]) == ("setting", "ddpm", 8)
    result = CliRunner().invoke(app, [*arguments, "--setting", "default", "--device", "cpu", "--json"])
    (row,) = json.loads(result.stdout)
    own = load_segmenter(str(models["ensemdiff"]), "cpu").inference
    assert (row["sampler"], row["steps"], row["ensemble"]) == (own.sampler, own.steps, own.ensemble)
    assert CliRunner().invoke(app, [*arguments, "--setting", "ddpm:4"]).exit_code == 2
    seen.clear()
    with pytest.raises(UsageError, match="sampler 'pndm' is unknown"):
        benchmark_segmenter(
            [str(models["ensemdiff"])],
            data,
            tmp_path,
            BenchmarkOptions(samplers=["pndm"], device="cpu"),
            on_progress=lambda what, share: seen.append(what),
        )
    assert not seen, "found before anything is measured"


def test_a_distance_that_does_not_exist_is_an_empty_field(models, data, tmp_path: Path) -> None:
    """An untrained network marks nothing, so that there is no distance."""
    saved = load_model_files(models["baseline"])
    zeros = {name: torch.zeros_like(weight) for name, weight in saved.weights.items()}
    save_model(tmp_path / "model", saved.card, zeros, "# card")
    arguments = ["benchmark-segmenter", str(tmp_path / "model"), "--data", str(data), "-o", str(tmp_path), "-n", "1"]
    result = CliRunner().invoke(app, [*arguments, "--device", "cpu"])
    assert result.exit_code == 0, result.output
    for table in ("benchmark.csv", "cases.csv"):
        with (tmp_path / table).open(newline="") as file:
            (row,) = csv.DictReader(file)
        distances = [value for key, value in row.items() if "hd95" in key.lower() and "missing" not in key.lower()]
        assert distances and set(distances) == {""}
    assert "nan" not in result.output


def test_both_calibration_errors_are_reported(models, data, tmp_path: Path) -> None:
    """The temperature holds for the model's own sampler, steps and ensemble; elsewhere the two are the same."""
    own, other = benchmark_segmenter(
        [str(models["ensemdiff"])],
        data,
        tmp_path,
        BenchmarkOptions(settings=[("dpm++", 2, 1), ("dpm++", 2, 2)], device="cpu"),
    )
    assert own.ece != own.ece_uncalibrated and other.ece == other.ece_uncalibrated
    assert load_model_files(models["ensemdiff"]).card["calibration"]["temperature"] != 1


@pytest.mark.filterwarnings("ignore:.*distinct times remain")
def test_a_calibration_is_found_again_where_times_coincide(data, tmp_path: Path) -> None:
    """Of 7 steps asked for, 6 are left of this schedule."""
    content = small("ensemdiff")
    content["diffusion"]["schedule"] = {"name": "cosine", "num_steps": 25}
    content["inference"]["steps"] = 7
    run = train_segmenter(SegmenterConfig.model_validate(content), data, tmp_path / "run", device="cpu").parent
    model = load_segmenter(run, "cpu")
    assert model.num_steps == 6
    assert (calibration := model.aggregation.calibration) is not None and calibration.steps == 6


@pytest.mark.parametrize("kind", ["grid", "label"])
def test_a_bad_case_is_named_before_anything_is_measured(kind, models, data, tmp_path: Path) -> None:
    copy = shutil.copytree(data, tmp_path / "data")
    split = json.loads((models["baseline"] / "split.json").read_text())
    file = copy / "labels" / f"{split['test'][-1]}.nii.gz"
    label = np.asarray(nib.load(file).dataobj)
    changed = label[:-1] if kind == "grid" else label * 3
    nib.save(nib.Nifti1Image(changed, np.eye(4)), file)
    message = r"found 8 x 8 x 8 voxels" if kind == "grid" else "found the values 0 and 3"
    with pytest.raises(InputError, match=message):
        benchmark_segmenter(
            [str(models["baseline"])], copy, tmp_path / "out", BenchmarkOptions(side="test", device="cpu")
        )
    assert not (tmp_path / "out").exists()


def test_a_table_of_the_user_is_not_replaced(models, data, tmp_path: Path) -> None:
    (tmp_path / "cases.csv").write_text("case,patient\na,1\n")
    with pytest.raises(UsageError, match=r"cases\.csv: is no table of this command; move it"):
        benchmark_segmenter(models["baseline"], data, tmp_path, BenchmarkOptions(device="cpu"))
    assert [path.name for path in tmp_path.iterdir()] == ["cases.csv"]


def test_held_out_cases_are_those_of_the_model_in_any_folder(models, data, tmp_path: Path) -> None:
    """Splitting a part of the folder again would take training cases for held-out ones."""
    copy = shutil.copytree(data, tmp_path / "data")
    split = json.loads((models["baseline"] / "split.json").read_text())
    card = (models["baseline"] / "model" / "model.json").read_text()
    assert not any(name in card for name in split["test"]), "names could tell patients"
    for part in ("images", "labels"):
        for name in (*split["validation"], split["test"][0]):
            (copy / part / f"{name}.nii.gz").unlink()
    arguments = ([str(models["baseline"])], copy, tmp_path / "out")
    (row,) = benchmark_segmenter(*arguments, BenchmarkOptions(side="test", device="cpu"))
    assert [case["case"] for case in row.by_case] == list(split["test"][1:])
    with pytest.raises(UsageError, match="has no validation cases in it"):
        benchmark_segmenter(*arguments, BenchmarkOptions(device="cpu"))


def test_the_test_side_calibrates_only_a_model_without_a_calibration_side(models, data, tmp_path: Path) -> None:
    """Its ECE on these patients would stand as that of patients which the model has not seen."""
    split = json.loads((models["baseline"] / "split.json").read_text())
    options = BenchmarkOptions(side="test", device="cpu")
    calibrate_segmenter(models["baseline"], data, tmp_path / "one", device="cpu")
    assert load_model_files(tmp_path / "one").card["calibrated_on"]["digests"] == [digest(split["calibration"][0])]
    (row,) = benchmark_segmenter(tmp_path / "one", data, tmp_path / "clean", options)
    assert row.calibrated_on == 0 and "was calibrated on" not in (tmp_path / "clean" / "report.html").read_text()

    for part in ("images", "labels"):
        shutil.copytree(data / part, tmp_path / "data" / part)
        (tmp_path / "data" / part / f"{split['calibration'][0]}.nii.gz").unlink()
    calibrate_segmenter(models["baseline"], tmp_path / "data", tmp_path / "two", device="cpu")
    with pytest.warns(UserWarning, match="2 of the 2 cases calibrated it; its ECE is too good"):
        (row,) = benchmark_segmenter(tmp_path / "two", data, tmp_path / "out", options)
    assert row.calibrated_on == 2
    assert "two was calibrated on 2 of its 2 cases: its ECE looks" in (tmp_path / "out" / "report.html").read_text()


def test_the_command_reports_the_test_side(models, data, tmp_path: Path) -> None:
    arguments = ["benchmark-segmenter", str(models["baseline"]), "--data", str(data), "-o", str(tmp_path), "-n", "0"]
    result = CliRunner().invoke(app, [*arguments, "--side", "test", "--device", "cpu", "--json"])
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)
    assert row["evaluations"] == 1 and row["factor"] == "feed-forward"
    wrong = CliRunner().invoke(app, [*arguments, "--steps", "1,many"])
    assert wrong.exit_code == 2


def test_a_summary_in_markdown_is_printed_alone_or_written(models, data, tmp_path: Path) -> None:
    arguments = ["benchmark-segmenter", str(models["baseline"]), "--data", str(data), "-o", str(tmp_path), "-n", "2"]
    result = CliRunner().invoke(app, [*arguments, "--device", "cpu", "--markdown", "-"])
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("### Benchmark of segmenters\n\n1 model on 2 cases of 2 patients")
    assert "| feed-forward | 1 |" in result.stdout
    file = tmp_path / "summary.md"
    result = CliRunner().invoke(app, [*arguments, "--device", "cpu", "--markdown", str(file), "--json"])
    assert result.exit_code == 0 and json.loads(result.stdout) and file.read_text().startswith("### Benchmark")
    assert CliRunner().invoke(app, [*arguments, "--markdown", "-", "--json"]).exit_code == 2


def test_a_stopped_benchmark_leaves_a_page_of_what_was_measured(models, data, tmp_path: Path) -> None:
    def stop(what: str, share: float) -> None:
        if "3 steps" in what:
            raise KeyboardInterrupt

    options = BenchmarkOptions(steps=[1, 3], ensembles=[1], samplers=[], cases=1, device="cpu")
    with pytest.raises(KeyboardInterrupt):
        benchmark_segmenter([str(models["ensemdiff"])], data, tmp_path, options, on_progress=stop)
    assert "Only 1 of 3 rows have been measured" in (tmp_path / "report.html").read_text()


def test_a_folder_that_cannot_be_split_as_the_model_was_is_refused(models, tmp_path: Path) -> None:
    """Its cases are none of those that the model held out: it is not this model's data."""
    with pytest.raises(UsageError, match="has no validation cases in it"):
        benchmark_segmenter([str(models["baseline"])], few(tmp_path), tmp_path / "out", BenchmarkOptions(device="cpu"))


def few(folder: Path) -> Path:
    for part in ("images", "labels"):
        (folder / part).mkdir()
        for name in ("a", "b"):
            nib.save(nib.Nifti1Image(np.ones((8, 8, 8), np.uint8), np.eye(4)), folder / part / f"{name}.nii.gz")
    return folder
