"""Model directories: what is written is read again, and nothing else is."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from medseg_diffusion.errors import ModelError
from medseg_diffusion.models import store as checkpoint
from medseg_diffusion.models.store import (
    SCHEMA_VERSION,
    find_model,
    list_models,
    load_card,
    load_model_files,
    name_of,
    save_model,
)

CARD = {"method": "ensemdiff", "labels": {"0": "background", "1": "tumour"}, "dims": 3}


def weights(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "layer.weight": torch.randn(4, 3, generator=generator),
        "layer.bias": torch.randn(4, generator=generator).double(),
        "transposed": torch.randn(3, 5, generator=generator).T,
        "calls": torch.tensor(7),
    }


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    save_model(path, CARD, weights(), "# A model\n")
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_weights_and_card_survive(tmp_path: Path, dtype) -> None:
    """Stored in the asked precision, read as float32; whole numbers are left alone."""
    save_model(tmp_path / "runs" / "model", CARD, weights(), "# A model\n", dtype)
    saved = load_model_files(tmp_path / "runs" / "model")
    assert saved.card == {**CARD, "schema_version": SCHEMA_VERSION}
    expected = {k: v.to(dtype).float() if v.is_floating_point() else v for k, v in weights().items()}
    torch.testing.assert_close(saved.weights, expected, rtol=0, atol=0)
    assert {v.dtype for k, v in saved.weights.items() if k != "calls"} == {torch.float32}


def test_half_precision_halves_the_file(tmp_path: Path) -> None:
    large = {"w": torch.zeros(10_000)}
    for name, dtype in (("full", torch.float32), ("half", torch.float16)):
        save_model(tmp_path / name, CARD, large, "", dtype)
    full, half = ((tmp_path / name / "weights.safetensors").stat().st_size for name in ("full", "half"))
    assert full - half == 20_000


def test_a_model_directory_holds_text_and_safetensors_only(model: Path) -> None:
    """No file of it may be a pickle, which could run code when it is read."""
    assert {path.name for path in model.iterdir()} == {"model.json", "weights.safetensors", "README.md", "SHA256SUMS"}
    content = (model / "weights.safetensors").read_bytes()
    header = int.from_bytes(content[:8], "little")
    assert set(json.loads(content[8 : 8 + header])) == set(weights())
    for name in ("model.json", "README.md", "SHA256SUMS"):
        (model / name).read_text(encoding="utf-8")
    assert model.stat().st_mode & 0o777 == 0o755


def test_the_sums_are_those_of_sha256sum(model: Path) -> None:
    lines = (model / "SHA256SUMS").read_text().splitlines()
    assert sorted(line.split("  ")[1] for line in lines) == ["README.md", "model.json", "weights.safetensors"]
    for line in lines:
        digest, name = line.split("  ")
        assert hashlib.sha256((model / name).read_bytes()).hexdigest() == digest


def test_a_newer_model_takes_the_place_of_the_older(model: Path) -> None:
    (model / "left-over.txt").write_text("from before")
    save_model(model, {**CARD, "step": 2}, weights(1), "# Another\n")
    saved = load_model_files(model)
    assert saved.card["step"] == 2
    torch.testing.assert_close(saved.weights["layer.weight"], weights(1)["layer.weight"], rtol=0, atol=0)
    assert not (model / "left-over.txt").exists()
    assert [path.name for path in model.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("failing", ["safetensors.torch.save", "medseg_diffusion.models.store._sha256"])
def test_a_failure_while_writing_leaves_the_old_model(model: Path, monkeypatch: pytest.MonkeyPatch, failing) -> None:
    def full(*arguments: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(failing, full)
    with pytest.raises(OSError, match="no space left"):
        save_model(model, {**CARD, "step": 2}, weights(1), "# Another\n")
    monkeypatch.undo()
    torch.testing.assert_close(load_model_files(model).weights["layer.weight"], weights()["layer.weight"])
    assert [path.name for path in model.parent.iterdir()] == ["model"], "nothing half-written stays behind"


def test_a_failure_while_replacing_leaves_the_old_model(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def locked(self: Path, target: Path) -> Path:
        if target == model and ".old" not in self.name:
            raise OSError("the folder is in use")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", locked)
    with pytest.raises(OSError, match="in use"):
        save_model(model, {**CARD, "step": 2}, weights(1), "# Another\n")
    assert load_card(model)["labels"] == CARD["labels"]


def test_a_card_that_is_not_json_leaves_the_old_model(model: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        save_model(model, {**CARD, "metrics": {"dice": float("nan")}}, weights(1), "")
    assert load_card(model)["labels"] == CARD["labels"]


@pytest.mark.parametrize("name", ["weights.safetensors", "README.md", "model.json"])
def test_a_damaged_file_is_refused_by_name(model: Path, name) -> None:
    path = model / name
    content = bytearray(path.read_bytes())
    content[-2] ^= 1 if name != "model.json" else 0
    if name == "model.json":
        content = bytearray(path.read_text().replace("tumour", "tumor").encode())
    path.write_bytes(content)
    with pytest.raises(ModelError, match=rf"{name}: its SHA-256 differs.*copy it again"):
        load_model_files(model)


@pytest.mark.parametrize("name", ["weights.safetensors", "README.md", "SHA256SUMS"])
def test_an_incomplete_model_is_refused_with_what_is_missing(model: Path, name) -> None:
    (model / name).unlink()
    for load in (load_model_files, load_card):
        with pytest.raises(ModelError, match=f"incomplete model, without {name}; copy the whole folder"):
            load(model)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"schema_version": "new"}'])
def test_an_unreadable_card_is_refused(model: Path, text) -> None:
    (model / "model.json").write_text(text)
    with pytest.raises(ModelError, match=r"model\.json: unreadable"):
        load_card(model)


def test_a_model_of_a_newer_version_is_refused_with_the_remedy(model: Path) -> None:
    card = json.loads((model / "model.json").read_text())
    (model / "model.json").write_text(json.dumps({**card, "schema_version": SCHEMA_VERSION + 1}))
    with pytest.raises(ModelError, match=f"format {SCHEMA_VERSION + 1}, .* up to {SCHEMA_VERSION}; upgrade"):
        load_model_files(model)


def test_a_run_directory_stands_for_its_model(model: Path) -> None:
    assert find_model(model.parent) == model
    assert find_model(str(model)) == model
    assert load_card(model.parent)["method"] == "ensemdiff"


def test_an_installed_model_is_found_by_name(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("MEDSEG_HOME", str(home))
    shutil.copytree(model, home / "models" / "tumour-t1")
    (home / "models" / ".tumour-t1.old").mkdir()
    (home / "models" / "notes").mkdir()
    assert find_model("tumour-t1") == home / "models" / "tumour-t1"
    [info] = [info for info in list_models() if info.source == "user"]
    assert (info.name, info.method, info.labels) == ("tumour-t1", "ensemdiff", ("background", "tumour"))
    assert info.megabytes == pytest.approx((model / "weights.safetensors").stat().st_size / 1e6)


def test_a_users_model_hides_a_packaged_one_of_the_same_name(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {"user": tmp_path / "user", "package": tmp_path / "package"}
    monkeypatch.setattr(checkpoint, "model_folders", lambda: folders)
    for folder in folders.values():
        shutil.copytree(model, folder / "same")
    shutil.copytree(model, folders["package"] / "other")
    assert [(info.name, info.source) for info in list_models()] == [("same", "user"), ("other", "package")]
    assert find_model("same") == folders["user"] / "same"


def test_a_model_that_is_nowhere_is_refused_with_the_installed_ones(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "model_folders", lambda: {"user": tmp_path / "none", "package": tmp_path / "here"})
    with pytest.raises(ModelError, match=r"brain: found no model there.*installed: none; give a model folder"):
        find_model("brain")
    shutil.copytree(model, tmp_path / "here" / "tumour-t1")
    with pytest.raises(ModelError, match="installed: tumour-t1"):
        find_model(tmp_path / "nothing")


def test_packaged_models_are_looked_for_beside_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDSEG_HOME", str(tmp_path))
    folders = checkpoint.model_folders()
    assert folders["user"] == tmp_path / "models"
    assert folders["package"] == Path(checkpoint.__file__).parents[1] / "pretrained"


def test_the_current_folder_has_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run" / "model").mkdir(parents=True)
    for folder, name in ((tmp_path / "run", "run"), (tmp_path / "run" / "model", "run")):
        monkeypatch.chdir(folder)
        assert name_of(Path(".")) == name_of(folder) == name
