"""Exported models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from medseg_cli.main import app
from safetensors.torch import load_file
from typer.testing import CliRunner

from medseg_diffusion.errors import ModelError, UsageError
from medseg_diffusion.models.load import load_segmenter
from medseg_diffusion.models.store import load_model_files, save_model
from medseg_diffusion.workflows.export_model import export_model
from tests.helpers.cli import error_lines, medseg


def test_a_copy_is_half_as_large_says_where_it_comes_from_and_works(tmp_path: Path) -> None:
    saved = load_model_files("hippocampus-t1")
    save_model(tmp_path / "run" / "model", saved.card, saved.weights, "# bare")
    command = ["models", "export", str(tmp_path / "run"), "-o", str(tmp_path / "hippo"), "--half"]
    said = [
        "--command",
        "medseg train-segmenter X",
        "--data",
        "Some data, CC0",
        "--intended-use",
        "A copy.",
        "--licence",
        "CC0",
    ]
    result = CliRunner().invoke(app, [*command, *said])
    assert result.exit_code == 0, result.output
    readme = (tmp_path / "hippo" / "README.md").read_text()
    assert readme.startswith("# hippo\n") and all(text in readme for text in (said[1], said[3], said[5]))
    size = (tmp_path / "hippo" / "weights.safetensors").stat().st_size
    assert size < 0.51 * (tmp_path / "run" / "model" / "weights.safetensors").stat().st_size
    stored = load_file(tmp_path / "hippo" / "weights.safetensors")
    assert {value.dtype for value in stored.values() if value.is_floating_point()} == {torch.float16}
    copy = load_model_files(tmp_path / "hippo")
    assert copy.card["licence"] == "CC0"
    for name, value in saved.weights.items():  # these were stored in float16 before, so nothing is rounded again
        assert torch.equal(copy.weights[name], value)
    assert load_segmenter(tmp_path / "hippo", device="cpu").labels
    with pytest.raises(UsageError, match="exists; choose a new folder"):
        export_model("hippocampus-t1", tmp_path / "hippo")
    (tmp_path / "hippo.zip").touch()
    with pytest.raises(UsageError, match=r"hippo\.zip: exists; choose a new file"):
        export_model("hippocampus-t1", tmp_path / "hippo.zip")


def test_an_imported_model_is_not_ours_to_hand_on(tmp_path: Path) -> None:
    save_model(tmp_path / "theirs", {"task": "denoiser", "method": "pixel"}, {"a": torch.zeros(1)}, "")
    with pytest.raises(ModelError, match="an imported denoiser"):
        export_model(tmp_path / "theirs", tmp_path / "out")


@pytest.mark.parametrize(
    ("output", "option", "message"),
    [
        ("model.onnx", None, "is written with --onnx"),
        ("hf:me/model", "--monai-bundle", "is written as a folder"),
        ("model.zip", "--monai-bundle", "is written as a folder"),
    ],
)
def test_no_folder_gets_the_name_of_another_form(
    output: str, option: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = medseg("models", "export", "hippocampus-t1", "-o", output, *([option] if option else []))
    (line,) = error_lines(result)
    assert result.exit_code == 2 and message in line
    assert list(tmp_path.iterdir()) == []
