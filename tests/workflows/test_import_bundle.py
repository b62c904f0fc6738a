"""`medseg models import --from monai-bundle`: networks of the model zoo, without executing their configuration."""

from __future__ import annotations

import json
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.networks.nets import AutoencoderKL, DiffusionModelUNet
from monai.networks.schedulers import DDPMScheduler

from medseg_diffusion import load_model
from medseg_diffusion.errors import InputError, ModelError, UsageError
from medseg_diffusion.networks.foreign.bundle import read_bundle
from medseg_diffusion.workflows.import_bundle import import_bundle
from tests.helpers.bundles import AUTOENCODER, SCHEDULER, UNET, write_bundle
from tests.helpers.cli import error_lines, medseg

DENOISER = {"_target_": "x.DiffusionModelUNet", **UNET}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("old", [False, True])
def test_the_denoiser_of_a_bundle_answers_like_the_original(old: bool, tmp_path: Path) -> None:
    unet, _ = write_bundle(tmp_path / "bundle", old)
    if old:  # MONAI's own reader of such weights agrees that these are they
        theirs = DiffusionModelUNet(**UNET).eval()
        theirs.load_old_state_dict(torch.load(tmp_path / "bundle" / "models" / "model.pt", weights_only=True))
        torch.testing.assert_close(dict(theirs.state_dict()), dict(unet.state_dict()))
    result = medseg(
        "models",
        "import",
        tmp_path / "bundle",
        "--from",
        "monai-bundle",
        "-o",
        tmp_path / "m",
        "--set",
        "part=denoiser",
    )
    assert result.exit_code == 0, result.output
    model = load_model(tmp_path / "m", "cpu")
    x, t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 999])
    with torch.no_grad():
        torch.testing.assert_close(model.network(x, t), unet(x, t), rtol=1e-4, atol=1e-4)
    kind = DDPMScheduler(1000, schedule="scaled_linear_beta", beta_start=0.0015, beta_end=0.0195)
    torch.testing.assert_close(model.module.schedule.alpha_bar[1:].float(), kind.alphas_cumprod, rtol=1e-3, atol=1e-6)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("old", [False, True])
def test_the_autoencoder_of_a_bundle_answers_like_the_original(old: bool, tmp_path: Path) -> None:
    """As those of the zoo: without attention, and with the groups and the eps of the bundle."""
    _, codec = write_bundle(tmp_path / "bundle", old)
    if old:
        theirs = AutoencoderKL(**AUTOENCODER).eval()
        theirs.load_old_state_dict(
            torch.load(tmp_path / "bundle" / "models" / "model_autoencoder.pt", weights_only=True)
        )
        torch.testing.assert_close(dict(theirs.state_dict()), dict(codec.state_dict()))
    import_bundle(tmp_path / "bundle", tmp_path / "m", {"part": "autoencoder"})
    ours = load_model(tmp_path / "m", "cpu").module
    image = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(image), codec.encode(image)[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            ours.decode(ours.encode(image)), codec.decode(codec.encode(image)[0]), rtol=1e-4, atol=1e-4
        )


def test_a_bundle_of_one_network_needs_no_choice_and_yaml_is_read(tmp_path: Path) -> None:
    write_bundle(tmp_path / "bundle")
    (tmp_path / "bundle" / "configs" / "inference.json").unlink()
    (tmp_path / "bundle" / "configs" / "inference.yaml").write_text(
        "heads: [0, 32]\nnetwork_def:\n  _target_: monai.networks.nets.DiffusionModelUNet\n  channels: $[32, 64]\n"
        "  attention_levels: [false, true]\n  num_head_channels: '@heads'\n"
    )
    path, assumed = import_bundle(tmp_path / "bundle", tmp_path / "m")
    card = json.loads((path / "model.json").read_text())
    assert card["config"]["network"]["head_channels"] == 32
    assert any("schedule" in sentence for sentence in assumed), "this bundle names none"


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"network_def": {"_target_": "x.UNet"}, "autoencoder_def": {}}, "names no DiffusionModelUNet"),
        ({"network_def": {**DENOISER, "num_head_channels": "$__import__('os').getpid()"}},
         "num_head_channels: .*is code, which is not executed"),
        ({"network_def": {**DENOISER, "norm_eps": "%other.json#eps"}}, "norm_eps: .* is code"),
        ({"network_def": {**DENOISER, "channels": "@nowhere#1"}}, "refers to nothing"),
        ({"network_def": {**DENOISER, "channels": "@loop"}, "loop": "@loop"}, "is code"),
        ({"network_def": {**DENOISER, "channels": [32]}}, "differ in length"),
        ({"network_def": {**DENOISER, "channels": 32}}, "expected lists"),
        ({"network_def": {**DENOISER, "channels": "@l0"}, **{f"l{i}": [f"@l{i + 1}"] * 64 for i in range(6)},
          "l6": [1]}, "expected a number or a list of numbers"),  # 64^7 references
        ({"network_def": {**DENOISER, "num_head_channels": [0, 7]}}, "must be multiples"),
        ({"network_def": {**DENOISER, "norm_num_groups": {"a": 1}}}, "expected a number"),
        ({"noise_scheduler": {**SCHEDULER, "_target_": "x.RFlowScheduler"}}, "not a schedule of Gaussian diffusion"),
        ({"noise_scheduler": {**SCHEDULER, "schedule": "cosine"}}, "cannot be imported; known"),
        ({"noise_scheduler": {**SCHEDULER, "beta_start": "$float('0.1')"}}, "beta_start: .*is code"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_one_line(entries: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_bundle(tmp_path / "bundle", **entries)
    with pytest.raises(ModelError, match=message):
        import_bundle(tmp_path / "bundle", tmp_path / "m", {"part": "denoiser"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]


def test_what_a_bundle_leaves_out_is_as_in_monai(tmp_path: Path) -> None:
    write_bundle(tmp_path / "bundle", network_def={"_target_": "monai.networks.nets.DiffusionModelUNet"})
    assert read_bundle(tmp_path / "bundle", "denoiser").settings["head_channels"] == 8
    default = signature(DiffusionModelUNet).parameters
    assert default["channels"].default == (32, 64, 64, 64) and default["num_head_channels"].default == 8
    assert default["attention_levels"].default == (False, False, True, True)


def test_a_schedule_without_a_number_of_steps_has_that_of_monai(tmp_path: Path) -> None:
    """It is read nevertheless, and a schedule of learning rates is not taken for it."""
    scheduler = {name: value for name, value in SCHEDULER.items() if name != "num_train_timesteps"}
    rates = {"_target_": "x.WarmupScheduler", "optimizer": "@optimizer"}
    write_bundle(tmp_path / "bundle", a_rates=rates, noise_scheduler=scheduler)
    settings = read_bundle(tmp_path / "bundle", "denoiser").settings
    assert (settings["num_steps"], settings["schedule"], settings["beta_end"]) == (1000, "scaled-linear", 0.0195)
    assert signature(DDPMScheduler).parameters["num_train_timesteps"].default == 1000


def test_other_folders_and_choices_are_one_line(tmp_path: Path) -> None:
    write_bundle(tmp_path / "bundle")
    with pytest.raises(UsageError, match="choose with --set part=NAME"):
        import_bundle(tmp_path / "bundle", tmp_path / "m")
    with pytest.raises(UsageError, match=r"--set part=vae: .* holds"):
        import_bundle(tmp_path / "bundle", tmp_path / "m", {"part": "vae"})
    (tmp_path / "empty").mkdir()
    result = medseg("models", "import", tmp_path / "empty", "--from", "monai-bundle", "-o", tmp_path / "m")
    assert result.exit_code == 3 and len(error_lines(result)) == 1
    for content in ("{", "[1]", "[" * 10**5):
        (tmp_path / "bundle" / "configs" / "inference.json").write_text(content)
        with pytest.raises(InputError):
            import_bundle(tmp_path / "bundle", tmp_path / "m", {"part": "denoiser"})
    assert not (tmp_path / "m").exists()


def test_missing_weights_are_named(tmp_path: Path) -> None:
    """The zoo's large files are downloaded apart."""
    write_bundle(tmp_path / "bundle")
    (tmp_path / "bundle" / "models" / "model.pt").unlink()
    with pytest.raises(ModelError, match=r"model_autoencoder.pt, without the weights of the denoiser"):
        import_bundle(tmp_path / "bundle", tmp_path / "m", {"part": "denoiser"})
