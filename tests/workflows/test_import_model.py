"""`medseg models import`: from a published file to a model directory that answers like the original."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from medseg_cli.main import app
from monai.networks.schedulers import DDPMScheduler
from typer.testing import CliRunner

from medseg_diffusion import load_model
from medseg_diffusion.diffusion.noise import generators
from medseg_diffusion.errors import ModelError, UsageError
from medseg_diffusion.models.image_source import ImageSource, SampleOptions
from medseg_diffusion.sampling.dpm_solver import DPMSolver
from medseg_diffusion.sampling.loop import sample, spaced
from medseg_diffusion.workflows.import_model import import_model
from tests.helpers import published
from tests.helpers.published import saved

TIMES = torch.tensor([0, 999])


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_from_the_command_line_to_the_originals_output(tmp_path: Path) -> None:
    theirs = published.OpenAI(classes=5, out_channels=6)
    file = saved(tmp_path / "64x64.pt", theirs.state)
    command = ["models", "import", "--from", "guided-diffusion", str(file), "-o", str(tmp_path / "adm")]
    result = CliRunner().invoke(app, [*command, "--set", "num_heads=2", "--set", "schedule=cosine"])
    assert result.exit_code == 0, result.output
    assert "legacy order" in result.stderr and "noise" in result.stderr and "linear schedule" not in result.stderr
    model = load_model(tmp_path / "adm", "cpu")
    x, y = normal(1, 2, 3, 8, 8), torch.tensor([0, 3])
    with torch.no_grad():
        found = model.network(x, TIMES, class_labels=y)
        torch.testing.assert_close(found, theirs(x, TIMES, y), rtol=1e-4, atol=1e-4)
    card = model.card
    assert card["config"]["learned_variance"] is True and card["config"]["schedule"]["name"] == "cosine"
    assert card["training"]["imported"] == "64x64.pt" and len(card["training"]["sha256"]) == 64
    listed = CliRunner().invoke(app, ["models", "show", str(tmp_path / "adm"), "--json"])
    assert json.loads(listed.stdout)["task"] == "denoiser"


def test_an_imported_denoiser_is_sampled_like_any_other(tmp_path: Path) -> None:
    theirs = published.OpenAI(out_channels=3)
    import_model(saved(tmp_path / "a.pt", theirs.state), "improved-diffusion", tmp_path / "m", {"num_heads": 2})
    denoiser = load_model(tmp_path / "m", "cpu").module
    times = spaced(denoiser.schedule, 4)
    out = sample(denoiser, DPMSolver(), normal(2, 2, 3, 8, 8), times, generators=generators([1, 2]))
    assert out.shape == (2, 3, 8, 8) and bool(out.isfinite().all())


def test_an_imported_model_draws_images_once_its_size_is_known(tmp_path: Path) -> None:
    file = saved(tmp_path / "a.pt", published.OpenAI(classes=5, out_channels=6).state)
    import_model(file, "guided-diffusion", tmp_path / "m", {"num_heads": 2, "size": 8})
    source = ImageSource(tmp_path / "m", SampleOptions(steps=3, device="cpu", label=4))
    assert source.draw([0, 1]).shape == (2, 8, 8, 3)
    with pytest.raises(UsageError, match="--class 5: the model has classes 0 to 4"):
        ImageSource(tmp_path / "m", SampleOptions(device="cpu", label=5))
    with pytest.raises(UsageError, match="--guidance needs"):
        ImageSource(tmp_path / "m", SampleOptions(device="cpu", guidance=2.0))
    import_model(file, "guided-diffusion", tmp_path / "n", {"num_heads": 2})
    with pytest.raises(ModelError, match="--set size=256"):
        ImageSource(tmp_path / "n", SampleOptions(device="cpu"))


def test_a_classifier_and_an_autoencoder(tmp_path: Path) -> None:
    classifier = published.OpenAI(heads=1, attention=(False, True), out_channels=7, classifier_side=8)
    file = saved(tmp_path / "c.pt", classifier.state)
    import_model(file, "guided-diffusion", tmp_path / "c", {"head_channels": 64})
    x = normal(3, 2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(
            load_model(tmp_path / "c", "cpu").network(x, TIMES), classifier(x, TIMES), rtol=1e-4, atol=1e-4
        )
        autoencoder = published.LatentAutoencoder()
        import_model(
            saved(tmp_path / "ae.ckpt", {"state_dict": autoencoder.state}), "latent-diffusion", tmp_path / "ae"
        )
        model = load_model(tmp_path / "ae", "cpu")
        torch.testing.assert_close(model.module.encode(x), autoencoder.moments(x)[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(UsageError, match="an autoencoder has no timesteps"):
        model.network(x, TIMES)


@pytest.mark.parametrize(("num_steps", "power"), [(1000, 0.5), (400, 1.0)])
def test_the_schedule_of_a_checkpoint_is_kept(tmp_path: Path, num_steps, power) -> None:
    betas = torch.linspace(0.0015**power, 0.0155**power, num_steps, dtype=torch.float64) ** (1 / power)
    unet = published.OpenAI(in_channels=4, out_channels=4, scale_shift=False, context=8)
    state: dict[str, Any] = {f"model.diffusion_model.{name}": value for name, value in unet.state.items()}
    file = saved(tmp_path / "ldm.ckpt", {"state_dict": {**state, "betas": betas.float()}})
    import_model(file, "latent-diffusion", tmp_path / "m", {"num_heads": 2})
    found = load_model(tmp_path / "m", "cpu").module.schedule.alpha_bar
    torch.testing.assert_close(found[1:], (1 - betas).cumprod(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["linear", "scaled-linear"])
def test_ends_of_betas_are_those_of_the_source(tmp_path: Path, name) -> None:
    """MONAI and latent-diffusion take them as they are; guided-diffusion scales them to the number of steps."""
    state = published.OpenAI(in_channels=4, out_channels=4, scale_shift=False, context=8).state
    settings = {"num_heads": 2, "num_steps": 500, "schedule": name, "beta_start": 0.001, "beta_end": 0.0195}
    import_model(saved(tmp_path / "a.pt", state), "latent-diffusion", tmp_path / "m", settings)
    kind = {"linear": "linear_beta", "scaled-linear": "scaled_linear_beta"}[name]
    theirs = DDPMScheduler(500, schedule=kind, beta_start=0.001, beta_end=0.0195)
    found = load_model(tmp_path / "m", "cpu").module.schedule.alpha_bar[1:]
    torch.testing.assert_close(found.float(), theirs.alphas_cumprod, rtol=1e-3, atol=1e-6)


def test_latents_are_never_drawn_as_colours(tmp_path: Path) -> None:
    """A first stage of three channels: only the source tells its latents from pixels."""
    state = published.OpenAI(in_channels=3, out_channels=3, scale_shift=False).state
    import_model(saved(tmp_path / "a.pt", state), "latent-diffusion", tmp_path / "m", {"num_heads": 2, "size": 8})
    with pytest.raises(ModelError, match="an imported model that needs an autoencoder, which is not part of it"):
        ImageSource(tmp_path / "m", SampleOptions(device="cpu"))


@pytest.mark.parametrize("source", ["latent-diffusion", "monai", "guided-diffusion"])
def test_a_state_dict_of_something_else_is_one_line(tmp_path: Path, source) -> None:
    file = saved(tmp_path / "a.pt", {"layer.weight": torch.zeros(3, 3), "layer.bias": torch.zeros(3)})
    result = CliRunner().invoke(app, ["models", "import", "--from", source, str(file), "-o", str(tmp_path / "m")])
    assert result.exit_code == 4 and len(result.stderr.splitlines()) == 1, result.stderr


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_heads": "two"}, "--set num_heads=two: expected a whole number above 0"),
        ({"num_heads": 2, "norm_eps": "small"}, "--set norm_eps=small: expected a number"),
        ({"num_heads": 2, "colour": "red"}, "--set colour: unknown; known: beta_end"),
        ({"num_heads": 2, "schedule": "quadratic"}, "--set schedule.name: .*'linear'"),
        ({"num_heads": 2, "schedule": "cosine", "beta_end": 0.1}, "a cosine schedule has no beta_start"),
        ({}, "--set head_channels=N"),
    ],
)
def test_bad_settings_leave_nothing_behind(tmp_path: Path, settings, message) -> None:
    file = saved(tmp_path / "a.pt", published.OpenAI().state)
    with pytest.raises(UsageError, match=message):
        import_model(file, "guided-diffusion", tmp_path / "m", settings)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt"]


def test_what_shapes_cannot_tell_of_an_upsampler_is_asked(tmp_path: Path) -> None:
    file = saved(tmp_path / "up.pt", published.OpenAI(in_channels=6, out_channels=6).state)
    with pytest.raises(UsageError, match="add --set learned_variance=true or false"):
        import_model(file, "guided-diffusion", tmp_path / "m", {"num_heads": 2})
    settings = {"num_heads": 2, "learned_variance": True}
    import_model(file, "guided-diffusion", tmp_path / "m", settings)
    assert load_model(tmp_path / "m", "cpu").card["config"]["learned_variance"] is True


def test_an_existing_folder_is_never_overwritten(tmp_path: Path) -> None:
    file = saved(tmp_path / "a.pt", published.OpenAI().state)
    (tmp_path / "m").mkdir()
    with pytest.raises(UsageError, match="exists; choose a new folder"):
        import_model(file, "guided-diffusion", tmp_path / "m", {"num_heads": 2})


def test_a_bad_file_is_one_line_with_its_exit_code(tmp_path: Path) -> None:
    file = saved(tmp_path / "a.pt", {"layer.weight": torch.ones(2)})
    command = ["models", "import", "--from", "guided-diffusion", str(file), "-o", str(tmp_path / "m")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 4
    assert "a.pt: not a guided-diffusion network" in result.stderr and "no known architecture" in result.stderr
    assert result.stderr.count("\n") == 1
    assert CliRunner().invoke(app, [*command[:3], "elsewhere", *command[4:]]).exit_code == 2
