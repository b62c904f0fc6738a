"""`medseg benchmark-segmenter` from trained models to table and plot; training stores a calibration."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from medseg_cli.main import app
from typer.testing import CliRunner

from medseg_diffusion.benchmark_segmenter import benchmark_segmenter
from medseg_diffusion.checkpoint import load_model_files
from medseg_diffusion.config import SegmenterConfig
from medseg_diffusion.errors import InputError
from medseg_diffusion.pipeline import SegmentationModel
from medseg_diffusion.train import train_segmenter


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


@pytest.fixture(scope="module")
def models(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    made = {}
    for method in ("ensemdiff", "baseline"):
        config = SegmenterConfig.model_validate(
            {
                "method": method,
                "data": {"window": [8, 8, 8], "labels": ["block"], "test_cases": 2, "validation_cases": 3},
                "network": {"channels": 8, "channel_mult": [1, 2]},
                "diffusion": {"head": "logits", "scale": 0.5, "dice_ce_weight": 1.0},
                "training": {"batch_size": 2, "max_steps": 4, "validate_every": 2, "precision": "fp32"},
                "inference": {"steps": 2},
            }
        )
        made[method] = train_segmenter(config, data, folder / method, device="cpu").parent
    return made


def test_training_stores_a_calibration(models) -> None:
    diffusion, baseline = (load_model_files(models[name]).card["calibration"] for name in ("ensemdiff", "baseline"))
    assert (diffusion["sampler"], diffusion["steps"], diffusion["cases"]) == ("dpm++", 2, 3)
    assert len(diffusion["temperatures"]) == 5 and 0 <= diffusion["agreement"] <= 1
    assert len(baseline["temperatures"]) == 1 and baseline["agreement"] is None
    for name in models:
        assert SegmentationModel(models[name], "cpu").calibration is not None


def test_one_factor_changes_at_a_time(models, data, tmp_path: Path) -> None:
    seen = []
    rows = benchmark_segmenter(
        [str(models["ensemdiff"]), str(models["baseline"])],
        data,
        tmp_path,
        steps=[1, 3],
        ensembles=[1, 2],
        samplers=["ddim"],
        device="cpu",
        on_progress=lambda what, done, total: seen.append((done, total)),
    )
    settings = [(row.setting.factor, row.setting.sampler, row.setting.steps, row.setting.ensemble) for row in rows]
    assert settings == [
        ("steps", "dpm++", 1, 1), ("steps", "dpm++", 3, 1), ("ensemble", "dpm++", 2, 1), ("ensemble", "dpm++", 2, 2),
        ("sampler", "ddim", 2, 1), ("feed-forward", "", 1, 1),
    ]  # fmt: skip
    assert [row.evaluations for row in rows] == [1, 3, 2, 4, 2, 1]
    assert seen == [(1, 3), (2, 3), (3, 3)] * 6
    for row in rows:
        assert row.cases == 3 and 0 <= row.mean_dice <= 1 and 0 <= row.ece <= 1 and row.seconds > 0
        assert row.iou["block"].mean <= row.dice["block"].mean
    written = list(csv.DictReader((tmp_path / "benchmark.csv").read_text().splitlines()))
    assert len(written) == 6 and written[1]["steps"] == "3"
    assert json.loads((tmp_path / "benchmark.json").read_text())[5]["setting"]["factor"] == "feed-forward"
    assert (tmp_path / "benchmark.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_reports_the_test_side(models, data, tmp_path: Path) -> None:
    arguments = ["benchmark-segmenter", str(models["baseline"]), "--data", str(data), "-o", str(tmp_path), "-n", "0"]
    result = CliRunner().invoke(app, [*arguments, "--side", "test", "--device", "cpu", "--json"])
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)
    assert row["evaluations"] == 1 and row["factor"] == "feed-forward"
    wrong = CliRunner().invoke(app, [*arguments, "--steps", "1,many"])
    assert wrong.exit_code == 2


def test_a_folder_that_cannot_be_split_as_the_model_was_is_refused(models, tmp_path: Path) -> None:
    """Two cases cannot give two to testing and three to validation: it is not this model's data."""
    with pytest.raises(InputError, match="found 2 patients"):
        benchmark_segmenter([str(models["baseline"])], few(tmp_path), tmp_path / "out", device="cpu")


def few(folder: Path) -> Path:
    for part in ("images", "labels"):
        (folder / part).mkdir()
        for name in ("a", "b"):
            nib.save(nib.Nifti1Image(np.ones((8, 8, 8), np.uint8), np.eye(4)), folder / part / f"{name}.nii.gz")
    return folder
