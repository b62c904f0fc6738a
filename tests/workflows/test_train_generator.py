"""`medseg train-generator`: a training step of every preset, resuming, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from medseg_diffusion.config.generator import GeneratorConfig
from medseg_diffusion.config.load import load_config, presets
from medseg_diffusion.errors import InputError, ModelError, UsageError
from medseg_diffusion.models.store import load_model_files
from medseg_diffusion.training.runtime import Runtime
from medseg_diffusion.workflows.train_generator import train_generator
from tests.helpers.generators import OTHERS, QUIET, save_labelled_volumes, small_config

pytestmark = QUIET

TOO_LARGE = ("autoencoder-heads", "ldm-heads")  # tests/test_build.py takes a step of these without memory
IMAGES = [name for name in presets() if not isinstance(load_config(name), OTHERS) and name not in TOO_LARGE]
SMALL = [name for name in IMAGES if name.endswith("-small") and "heads" not in name]  # a step of a head takes a minute


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in SMALL else (pytest.mark.slow,)) for n in IMAGES])
def test_a_preset_trains_for_a_step_and_is_a_loadable_model(name, pictures, image_models, tmp_path: Path) -> None:
    small_data = ["data.validation_images=2", "data.test_images=0"]
    config = load_config(name, ["training.batch_size=2", "training.workers=0", *small_data])
    assert not isinstance(config, OTHERS)
    if isinstance(config, GeneratorConfig) and config.condition.mask:
        pictures = tmp_path / "labelled"
        save_labelled_volumes(pictures, (20, 20, 20), len(config.data.labels))
    elif len(config.data.shape) == 3:
        pictures = tmp_path / "scans"  # apart from the pictures of the first stage's run
        pictures.mkdir()
        for i in range(4):
            pixels = np.random.default_rng(i).random((20, 20, 20)).astype(np.float32)
            nib.save(nib.Nifti1Image(pixels, np.eye(4)), pictures / f"{i}.nii.gz")
    if isinstance(config, GeneratorConfig) and config.autoencoder is not None:
        # The first stage of 64 x 64 images, untrained, stands for the preset's own.
        first = load_config(str(config.autoencoder), ["training.batch_size=2", "training.workers=0", *small_data])
        codec = train_generator(first, pictures, tmp_path / "first", max_steps=1, device="cpu")  # type: ignore[arg-type]
    else:
        codec = None
    path = train_generator(config, pictures, tmp_path / "run", autoencoder=codec, max_steps=1, device="cpu")
    assert load_model_files(path).card["config"]["method"] == config.method
    assert (tmp_path / "run" / "log.csv").is_file()


def test_training_resumes_exactly(pictures, tmp_path: Path) -> None:
    config = small_config("pixel")
    whole = train_generator(config, pictures, tmp_path / "whole", device="cpu")
    train_generator(config, pictures, tmp_path / "parts", max_steps=1, device="cpu")
    parts = train_generator(config, pictures, tmp_path / "parts", resume=True, device="cpu")
    first, second = (load_model_files(path).weights for path in (whole, parts))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_patched_generator_of_few_times_is_validated(pictures, tmp_path: Path) -> None:
    """The pictures of a validation are restored from half of its times, not from time 500."""
    config = small_config("patched", diffusion={"target": "x0", "schedule": {"name": "cosine", "num_steps": 99}})
    train_generator(config, pictures, tmp_path / "run", max_steps=1, device="cpu")
    assert [file.name for file in (tmp_path / "run" / "samples").iterdir()] == ["001.png"]


def test_options_that_do_not_fit_are_refused(pictures, image_models, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--autoencoder and --stage are for configurations that name an autoencoder"):
        train_generator(small_config("pixel"), pictures, tmp_path / "a", autoencoder=image_models["autoencoder"])
    with pytest.raises(ModelError, match="holds method pixel, not an autoencoder"):
        train_generator(small_config("latent"), pictures, tmp_path / "b", autoencoder=image_models["pixel"])
    with pytest.raises(InputError, match="24 files; expected more than 0 for testing and 40"):
        train_generator(small_config("pixel", data={"size": 16, "validation_images": 40}), pictures, tmp_path / "c")
    with pytest.raises(ModelError, match=r"nothing\.pth: cannot load LPIPS"):
        lpips = small_config(
            "autoencoder",
            loss={"discriminator_layers": 1, "perceptual": "lpips", "lpips_backbone": str(tmp_path / "nothing.pth")},
        )
        train_generator(lpips, pictures, tmp_path / "d")


def test_what_no_model_can_be_built_of_leaves_no_run_behind(pictures, tmp_path: Path, monkeypatch) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, file in enumerate(sorted(pictures.rglob("*.png"))):
        shutil.copy(file, flat / f"{i}.png")
    with pytest.raises(UsageError):
        train_generator(small_config("pixel", condition={"classes": "embedding"}), flat, tmp_path / "run", device="cpu")
    with monkeypatch.context() as patch:
        patch.setattr(Runtime, "world_size", property(lambda self: 3))
        with pytest.raises(UsageError, match="batch_size 2 must be a multiple of the 3 processes"):
            train_generator(small_config("autoencoder"), flat, tmp_path / "run", device="cpu")
    assert train_generator(small_config("pixel"), flat, tmp_path / "run", max_steps=1, device="cpu").is_dir()
    with pytest.raises(UsageError, match=r"data\.size: 15 is no multiple of 2, by which the autoencoder divides it"):
        small_config("autoencoder", data={"size": 15, "validation_images": 4})


def test_unusable_images_leave_no_run_behind(pictures, tmp_path: Path) -> None:
    broken = tmp_path / "pictures"
    shutil.copytree(pictures, broken)
    file = next(broken.rglob("*.png"))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match=file.name):
        train_generator(small_config("pixel"), broken, tmp_path / "run", device="cpu")
    assert train_generator(small_config("pixel"), broken, tmp_path / "run", skip_broken=True, device="cpu").is_dir()
