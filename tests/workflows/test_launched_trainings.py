"""Every training command in two processes, as torchrun, srun and our own launcher start them, and in one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from pydantic import BaseModel

from medseg_diffusion.models.store import load_model_files
from medseg_diffusion.training.history import read_history
from medseg_diffusion.workflows.train_anomaly import train_anomaly
from medseg_diffusion.workflows.train_generator import train_generator
from medseg_diffusion.workflows.train_pixel_classifier import train_pixel_classifier
from medseg_diffusion.workflows.train_segmenter import train_segmenter
from tests.helpers import anomaly, generators, pixel_classifiers, training
from tests.helpers.commands import LAUNCHERS, ended


def written(folder: Path, config: BaseModel) -> Path:
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return file


def run_two(launcher: str, words: list[object], run: Path) -> dict[str, object]:
    """What the first of two processes prints, as JSON; the other one prints nothing."""
    results = ended(LAUNCHERS[launcher]([*words, "-o", run, "--device", "cpu", "--json"]))
    assert [code for code, _, _ in results] == [0] * len(results), results
    printed = "".join(out for _, out, _ in results)
    return json.loads(printed[printed.index("{") :])  # type: ignore[no-any-return]


def assert_trained_alike(two: Path, one: Path) -> None:
    """The losses of a run in two processes and of one in a single process."""
    np.testing.assert_allclose(read_history(two).loss, read_history(one).loss, rtol=2e-5)


@pytest.mark.parametrize(
    "launcher", [pytest.param(name, marks=[pytest.mark.slow] if name != "srun" else []) for name in LAUNCHERS]
)
def test_a_segmenter(launcher: str, block_scans: Path, tmp_path: Path) -> None:
    config = training.config()
    config = config.model_copy(update={"network": config.network.model_copy(update={"dropout": 0.0})})
    words = ["train-segmenter", written(tmp_path, config), "--data", block_scans]
    result = run_two(launcher, words, tmp_path / "two")
    train_segmenter(config, block_scans, tmp_path / "one", device="cpu")
    assert_trained_alike(tmp_path / "two", tmp_path / "one")
    assert not torch.distributed.is_initialized(), "a process alone needs no others"
    assert result["model"] == str(tmp_path / "two" / "model")
    (trained,) = result["trainings"]  # type: ignore[misc]
    assert (trained["steps"], trained["planned"], trained["ended"]) == (4, 4, "finished")


@pytest.mark.slow
def test_a_generator(pictures: Path, tmp_path: Path) -> None:
    config = generators.small_config("pixel")
    words = ["train-generator", written(tmp_path, config), "--data", pictures]
    result = run_two("srun", words, tmp_path / "two")
    train_generator(config, pictures, tmp_path / "one", device="cpu")
    assert_trained_alike(tmp_path / "two", tmp_path / "one")
    assert str(result["next"]).startswith(f"medseg sample {tmp_path / 'two' / 'model'} -n ")


@pytest.mark.slow
def test_an_anomaly_model(anomaly_scans: Path, tmp_path: Path) -> None:
    config = anomaly.small_config("pixel")
    words = ["train-anomaly", written(tmp_path, config), "--healthy", anomaly_scans, "--exclude-labelled", 2]
    result = run_two("torchrun", words, tmp_path / "two")
    one = train_anomaly(config, anomaly_scans, tmp_path / "one", exclude_labelled=2, device="cpu")
    assert_trained_alike(tmp_path / "two" / "generator", tmp_path / "one" / "generator")
    (row,) = result["calibration"]  # type: ignore[misc]
    assert row["threshold"] == pytest.approx(one.calibration["partial-noise"].automatic, rel=1e-2)
    assert set(load_model_files(tmp_path / "two").weights) == set(load_model_files(tmp_path / "one").weights)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "--gpus 2"])
def test_pixel_classifiers(launcher: str, box_scans: Path, box_generators: dict[int, Path], tmp_path: Path) -> None:
    """Nothing depends on which process did what: the models are equal bit by bit."""
    config = pixel_classifiers.quick(copies=2)
    words = ["train-pixel-classifier", written(tmp_path, config), "--data", box_scans, "--labelled", 3]
    result = run_two(launcher, [*words, "--generator", box_generators[2]], tmp_path / "two")
    one = train_pixel_classifier(config, box_generators[2], box_scans, 3, tmp_path / "one", device="cpu")
    weights = [load_model_files(tmp_path / name).weights for name in ("one", "two")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert one.test is not None and result["test"] == json.loads(json.dumps(one.test.table()))
    assert {path.name for path in (tmp_path / "two").iterdir()} == {"config.yaml", "labelled.json", "model", "test"}


def test_a_training_alone_opens_no_port(block_scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where torchrun or srun has started this single process."""
    from medseg_cli.main import app
    from typer.testing import CliRunner

    def refused(*args: object, **options: object) -> None:
        raise AssertionError("a process group was made")

    monkeypatch.setattr(torch.distributed, "init_process_group", refused)
    command = ["train-segmenter", str(written(tmp_path, training.config())), "--data", str(block_scans)]
    for name, alone in {
        "torchrun": {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
        "srun": {"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"},
        "salloc": {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"},
    }.items():
        with monkeypatch.context() as patch:
            for key, value in alone.items():
                patch.setenv(key, value)
            words = [*command, "-o", str(tmp_path / name), "--device", "cpu", "--max-steps", "1"]
            result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.output
        assert not torch.distributed.is_initialized()
        warned = "srun has not started this process: it trains alone" in result.stderr
        assert warned == (name == "salloc")
