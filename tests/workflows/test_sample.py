"""`medseg sample`: images and volumes as files, also of a call that was interrupted."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from medseg_diffusion.errors import UsageError
from medseg_diffusion.models.image_source import ImageSource, SampleOptions
from medseg_diffusion.models.store import load_model_files
from medseg_diffusion.training.progress import silent
from medseg_diffusion.workflows.sample import read_png, sample
from medseg_diffusion.workflows.sample_reference import Reference
from medseg_diffusion.workflows.train_generator import train_generator
from tests.helpers.documented import assert_documented
from tests.helpers.generators import QUIET, small_config

pytestmark = QUIET


def test_generators_of_volumes_from_scans_to_scans(tmp_path: Path) -> None:
    """Pixel and latent, trained on whole scans: what is sampled is a scan of the model's voxel size."""
    (tmp_path / "scans").mkdir()
    for i in range(4):
        data = np.random.default_rng(i).random((9, 10, 8)).astype(np.float32)
        nib.save(nib.Nifti1Image(data, np.diag([2.0, 2, 2, 1])), tmp_path / "scans" / f"{i}.nii.gz")
    whole: dict[str, object] = {
        "data": {"size": [12, 12, 8], "channels": 1, "validation_images": 1},
        "preprocessing": {"spacing_mm": [2, 2, 2]},
    }
    network = {"dims": 3, "channels": 8, "channel_mult": [1, 1], "num_res_blocks": 1, "norm_groups": 4}
    first = small_config("autoencoder", **whole, loss={"discriminator_channels": 4, "discriminator_layers": 1})
    codec = train_generator(first, tmp_path / "scans", tmp_path / "codec", device="cpu")
    assert load_model_files(codec).card["training"]["perceptual_loss"] == "gradient-ssim"
    for method, given in (("pixel", None), ("latent", codec)):
        run = tmp_path / method
        config = small_config(method, **whole, network=network)
        model = train_generator(config, tmp_path / "scans", run, autoencoder=given, device="cpu")
        options = SampleOptions(count=2, steps=2, device="cpu")
        paths = sample(model, tmp_path / f"{method}-samples", options)
        image = nib.load(paths[1])
        assert image.shape == (12, 12, 8) and np.allclose(np.diag(image.affine), [2, 2, 2, 1])
        with Image.open(tmp_path / f"{method}-samples" / "grid.png") as picture:
            assert picture.size == (2 * 12 + 2, 12)
        assert sample(model, tmp_path / f"{method}-samples", options) == paths


def test_an_interrupted_call_is_finished_with_the_same_images(image_models, tmp_path: Path) -> None:
    whole = sample(image_models["pixel"], tmp_path / "a", SampleOptions(count=5, device="cpu"))
    paths = sample(image_models["pixel"], tmp_path / "b", SampleOptions(count=2, device="cpu"))
    stamp = paths[0].stat().st_mtime_ns
    paths = sample(image_models["pixel"], tmp_path / "b", SampleOptions(count=5, batch_size=2, device="cpu"))
    assert paths[0].stat().st_mtime_ns == stamp
    for one, other in zip(whole, paths, strict=True):
        gap = read_png(one).astype(int) - read_png(other).astype(int)
        assert np.abs(gap).max() <= 1
    with Image.open(tmp_path / "b" / "grid.png") as grid:
        assert grid.size == (3 * 18 - 2, 2 * 18 - 2)
    with pytest.raises(UsageError, match="of other options"):
        sample(image_models["pixel"], tmp_path / "b", SampleOptions(count=5, steps=9, device="cpu"))


def test_samples_that_are_training_images_are_found(image_models, pictures, scoring_network, tmp_path: Path) -> None:
    """Training images in the place of samples are closer to the training images than unseen images are."""

    def compared(folder: Path, count: int) -> dict[str, object]:
        options = SampleOptions(count=count, steps=1, device="cpu")
        sample(image_models["pixel"], folder, options, reference=pictures, extractor=str(scoring_network))
        assert_documented("reference.json", folder / "reference.json")
        found: dict[str, object] = json.loads((folder / "reference.json").read_text())
        return found

    drawn = compared(tmp_path / "out", 5)
    assert (drawn["samples"], drawn["training_images"], drawn["unseen_images"]) == (5, 20, 4)
    source = ImageSource(image_models["pixel"], SampleOptions(device="cpu"))
    reference = Reference(source, pictures, str(scoring_network), silent)
    copies = reference.compare(reference.images.images[reference.training[:6]], tmp_path / "out")
    assert copies.closer == 1 and copies.neighbours.tolist() == list(range(6))
    with Image.open(tmp_path / "out" / "reference.png") as picture:
        assert picture.width > 100


def test_progress_goes_up_step_by_step(image_models, tmp_path: Path) -> None:
    """A batch of volumes takes minutes: its steps are told, too."""
    told: list[tuple[str, float]] = []
    options = SampleOptions(count=4, batch_size=2, steps=3, device="cpu")
    sample(image_models["pixel"], tmp_path / "out", options, lambda what, share: told.append((what, share)))
    shares = [share for _, share in told]
    assert shares == sorted(shares) and shares[-1] == 1 and len(shares) == 2 * 3 + 2
    assert told[0] == ("image: 0 of 4, step 1 of 3", pytest.approx(1 / 6))


def test_an_extractor_of_other_images_is_refused_before_anything_is_drawn(
    image_models, pictures, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="takes volumes of 1 channels, and these have 3 and 2 axes"):
        sample(
            image_models["pixel"], tmp_path / "out", SampleOptions(count=2, device="cpu"), reference=pictures,
            extractor="hippocampus-t1",
        )  # fmt: skip
    assert not list((tmp_path / "out").glob("0*.png"))
