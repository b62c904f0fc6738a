"""`medseg train-segmenter`: runs that are resumed, interrupted or started from weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml

from medseg_diffusion.config.load import load_segmenter_config
from medseg_diffusion.config.segmenter import SegmenterConfig
from medseg_diffusion.errors import InputError, ModelError, UsageError
from medseg_diffusion.models.segmenter import restore_segmenter
from medseg_diffusion.models.store import load_model_files
from medseg_diffusion.training.runtime import Runtime
from medseg_diffusion.training.trainer import Outcome, Progress
from medseg_diffusion.workflows.train_segmenter import train_segmenter
from tests.helpers.training import assert_same, config, finish, resume_file, start_two


def test_a_segmenter_trains_resumes_and_loads(block_scans: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train_segmenter(config(), block_scans, whole, device="cpu") == whole / "model"
    train_segmenter(config(), block_scans, parts, device="cpu", max_steps=2)
    train_segmenter(config(), block_scans, parts, device="cpu", resume=True)
    assert_same(resume_file(parts), resume_file(whole))
    saved = load_model_files(whole)
    model, restored = restore_segmenter(saved)
    assert restored == config() and saved.card["labels"] == {"0": "background", "1": "block"}
    best = load_model_files(parts).weights
    torch.testing.assert_close(dict(model.state_dict()), best, rtol=0, atol=0)
    split = yaml.safe_load((whole / "split.json").read_text())
    assert [len(split[side]) for side in ("train", "validation", "test")] == [4, 1, 1]
    with pytest.raises(UsageError, match="holds a run already; add --resume"):
        train_segmenter(config(), block_scans, whole, device="cpu")
    with pytest.raises(UsageError, match="was started with another training"):
        train_segmenter(config(learning_rate=1e-5), block_scans, whole, device="cpu", resume=True)
    # A run of a version that did not know every key yet went on as the defaults say, and with nothing else.
    content = yaml.safe_load((parts / "config.yaml").read_text())
    assert content["preprocessing"].pop("size", "missing") is None and content["augmentation"].pop("intensity") == 0.15
    assert content.pop("anchor_loss")
    (parts / "config.yaml").write_text(yaml.safe_dump(content))
    train_segmenter(config(), block_scans, parts, device="cpu", resume=True)
    other = config().model_copy(update={"augmentation": config().augmentation.model_copy(update={"intensity": 0.2})})
    with pytest.raises(UsageError, match="was started with another augmentation"):
        train_segmenter(other, block_scans, parts, device="cpu", resume=True)


def test_a_run_that_was_stopped_before_its_first_resume_file_starts_again(
    block_scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its own configuration, which the refusal recommends."""
    run = tmp_path / "run"

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("medseg_diffusion.workflows.train_segmenter.arranged", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train_segmenter(config(), block_scans, run, device="cpu", seed=3)
    with pytest.raises(UsageError, match=rf"resume with {run / 'config.yaml'} and seed 3, or use another folder"):
        train_segmenter(config(batch_size=1), block_scans, run, device="cpu", seed=3, resume=True)
    train_segmenter(load_segmenter_config(run / "config.yaml"), block_scans, run, device="cpu", seed=3, resume=True)
    assert resume_file(run)["state"]["step"] == 4
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(InputError, match="found no resume file"):
        train_segmenter(config(), block_scans, run, device="cpu", seed=3, resume=True)


def test_what_is_refused_before_the_training_can_be_started_again(block_scans: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"

    def interrupt(what: str, share: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(InputError, match="no such folder"):
        train_segmenter(config(), tmp_path / "none", run, device="cpu")
    with pytest.raises(KeyboardInterrupt):
        train_segmenter(config(), block_scans, run, device="cpu", on_progress=interrupt)
    train_segmenter(config(), block_scans, run, device="cpu")
    assert resume_file(run)["state"]["step"] == 4


@pytest.mark.parametrize(
    ("section", "changes", "match"),
    [
        ("diffusion", {"log_snr": [50, 60]}, r"diffusion\.log_snr"),
        ("diffusion", {"schedule": {"name": "linear", "num_steps": 5}}, "schedule"),
        ("network", {"num_res_blocks": [1]}, "network"),
        ("training", {"batch_size": 4}, "batch_size 4 must be a multiple of the 3 processes"),
    ],
)
def test_what_cannot_be_trained_leaves_no_run_behind(
    section: str,
    changes: dict[str, Any],
    match: str,
    block_scans: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So that the corrected call can be started in the same folder."""
    content = config(batch_size=3).model_dump(mode="json")
    content[section] |= changes
    monkeypatch.setattr(Runtime, "world_size", property(lambda self: 3))
    with pytest.raises(UsageError, match=match):
        train_segmenter(SegmenterConfig.model_validate(content), block_scans, tmp_path / "run", device="cpu")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["cache"]


def test_resuming_what_was_never_started_is_refused(block_scans: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no run; drop --resume to start it"):
        train_segmenter(config(), block_scans, tmp_path / "run", device="cpu", resume=True)
    assert not (tmp_path / "run").exists()


def test_two_processes_train_a_segmenter(block_scans: Path, tmp_path: Path) -> None:
    """One of them makes the run folder and prepares the cases for both."""
    run = tmp_path / "run"
    finish(start_two(f"train_segmenter_in({str(run)!r}, {str(block_scans)!r})"))
    assert resume_file(run)["state"]["step"] == 4
    assert load_model_files(run).card["x_t"]["cases"] == 1
    assert not list(run.rglob("*.tmp"))


def test_a_run_does_not_go_on_with_cases_on_other_sides(block_scans: Path, tmp_path: Path) -> None:
    """Split anew, a case that was trained on might be tested on."""
    data, run = shutil.copytree(block_scans, tmp_path / "data"), tmp_path / "run"
    train_segmenter(config(), data, run, device="cpu", max_steps=2)
    before = (run / "split.json").read_text()
    name = json.loads(before)["test"][0]
    for part in ("images", "labels"):
        (data / part / f"{name}.nii.gz").rename(tmp_path / f"{part}.nii.gz")
    with pytest.raises(InputError, match="other cases than when the run was started"):
        train_segmenter(config(), data, run, device="cpu", resume=True)
    assert (run / "split.json").read_text() == before
    for part in ("images", "labels"):
        (tmp_path / f"{part}.nii.gz").rename(data / part / f"{name}.nii.gz")
    train_segmenter(config(), data, run, device="cpu", resume=True)


def test_held_out_cases_without_the_class_leave_a_model(block_scans: Path, tmp_path: Path) -> None:
    data, settings = shutil.copytree(block_scans, tmp_path / "data"), config(calibration_cases=1)
    train_segmenter(settings, data, tmp_path / "first", device="cpu", max_steps=2)
    split = json.loads((tmp_path / "first" / "split.json").read_text())
    for name in (*split["validation"], *split["calibration"]):
        file = data / "labels" / f"{name}.nii.gz"
        nib.save(nib.Nifti1Image(np.zeros((9, 8, 8), np.uint8), np.eye(4)), file)
    run = train_segmenter(settings, data, tmp_path / "run", device="cpu")
    assert load_model_files(run).card["calibration"]["ece"] == [None, None]
    assert "from 1 scans of 1 calibration patient |" in (run / "README.md").read_text()


def test_ctrl_c_leaves_a_segmenter_that_can_be_used(block_scans: Path, tmp_path: Path) -> None:
    def interrupt(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_segmenter(config(), block_scans, tmp_path / "run", device="cpu", on_step=interrupt)
    model, _ = restore_segmenter(load_model_files(tmp_path / "run"))
    assert not model.training
    assert resume_file(tmp_path / "run")["state"]["step"] == 1


def test_a_run_starts_from_the_weights_of_a_trained_model(block_scans: Path, tmp_path: Path) -> None:
    first = train_segmenter(config(), block_scans, tmp_path / "first", device="cpu")
    second = train_segmenter(
        config(learning_rate=1e-9), block_scans, tmp_path / "second", device="cpu", seed=1, init=first
    )
    before, after = load_model_files(first), load_model_files(second)
    for name, weights in before.weights.items():
        torch.testing.assert_close(after.weights[name], weights, rtol=1e-3, atol=1e-6)
    sums = (first / "SHA256SUMS").read_text()
    assert after.card["training"]["init"]["model"] == str(first)
    assert after.card["training"]["init"]["sha256"] in sums
    # What it started from is not forgotten when it goes on, nor needed.
    content = yaml.safe_load((tmp_path / "second" / "config.yaml").read_text())
    assert content["init"] == after.card["training"]["init"]
    half = tmp_path / "half"
    train_segmenter(config(), block_scans, half, device="cpu", seed=1, init=first, max_steps=2)
    (half / "checkpoints").rename(half / "kept")
    started = restore_segmenter(load_model_files(first))[0].state_dict()
    seen: list[dict[str, torch.Tensor]] = []

    def no_steps(model: torch.nn.Module, *arguments: Any) -> Outcome:
        seen.append(dict(model.state_dict()))
        return Outcome(half, 0, 4, "max_steps", {})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("medseg_diffusion.training.job.fit", no_steps)
        train_segmenter(
            load_segmenter_config(half / "config.yaml"), block_scans, half, device="cpu", seed=1, resume=True
        )
    for name, weights in started.items():
        torch.testing.assert_close(seen[0][name], weights)
    (half / "kept").rename(half / "checkpoints")
    moved = first.rename(tmp_path / "elsewhere")
    again = train_segmenter(config(), block_scans, half, device="cpu", seed=1, resume=True)
    assert load_model_files(again).card["training"]["init"]["model"] == str(first)
    first = moved
    wider = config().model_copy(update={"network": config().network.model_copy(update={"channels": 16})})
    with pytest.raises(ModelError, match="its network is not that of the configuration"):
        train_segmenter(wider, block_scans, tmp_path / "third", device="cpu", init=first)
    assert not (tmp_path / "third" / "config.yaml").exists()
