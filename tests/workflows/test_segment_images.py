"""`medseg segment` on pictures: PNG in, PNG out, every pixel in its place."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from medseg_diffusion.config.load import load_segmenter_config
from medseg_diffusion.errors import UsageError
from medseg_diffusion.volumes.io import read_labels
from medseg_diffusion.workflows import segment as pipeline
from medseg_diffusion.workflows.evaluate import EvaluateOptions, evaluate
from medseg_diffusion.workflows.train_segmenter import train_segmenter
from tests.helpers.segmenters import FLAT, make_model, run, save, save_image, tiny_config


@pytest.fixture(scope="module")
def flat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(**FLAT, preprocessing={"orientation": None})
    return make_model(tmp_path_factory.mktemp("models") / "flat", config)


def test_the_mask_of_an_image_is_a_png_and_its_maps_are_nifti(tmp_path: Path, flat_model: Path) -> None:
    for scan in (save_image(tmp_path / "one" / "cell.png"), save_image(tmp_path / "two" / "cell.jpg")):
        (result,) = run(
            [scan.parent], flat_model, ensemble=2, save_probabilities=True, save_members=True, save_uncertainty=True,
            statistics=True, preview=True, report=tmp_path / "report.html",
        )  # fmt: skip
        assert result.status == "done", result.error
        assert sorted(path.name for path in scan.parent.iterdir()) == sorted(
            [scan.name, "cell_dseg.tsv", "cell_members.nii.gz", "cell_preview.png", "cell_prob.nii.gz", "cell_seg.png",
             "cell_statistics.json", "cell_uncertainty.nii.gz"]
        )  # fmt: skip
        with Image.open(result.outputs["segmentation"]) as mask:
            assert (mask.size, mask.mode) == ((13, 11), "L")
            labels = np.asarray(mask).T
        probabilities = nib.load(result.outputs["probabilities"]).get_fdata()
        np.testing.assert_array_equal(probabilities.argmax(-1)[..., 0], labels)
        assert nib.load(result.outputs["members"]).shape == (13, 11, 1, 2)
        statistics = json.loads(result.outputs["statistics"].read_text())
        assert statistics["classes"]["bright"]["volume_ml"] == pytest.approx(labels.sum() / 1000)
        (again,) = run([scan.parent], flat_model, skip_existing=True)
        assert (again.scan, again.status) == (scan, "skipped"), "no result is taken for a scan"


@pytest.mark.parametrize(
    "changes",
    [
        {"preprocessing": {"orientation": "RAS"}},
        {"preprocessing": {"orientation": None, "intensity": "zscore", "crop_foreground": True}},
        {"preprocessing": {"orientation": None, "spacing_mm": [0.5, 2, 1]}},
        {"preprocessing": {"orientation": None}, "inference": {"steps": 2, "window": [8, 8], "overlap": 0.5}},
    ],
    ids=["turned", "z-score and crop", "resampled", "windows"],
)
def test_every_preprocessing_returns_to_the_pixels_of_the_image(tmp_path: Path, changes) -> None:
    path = make_model(tmp_path / "model", tiny_config(**FLAT, **changes))
    (result,) = run([save_image(tmp_path / "cell.bmp")], path)
    assert result.status == "done", result.error
    assert read_labels(result.outputs["segmentation"]).shape == (13, 11, 1)


def test_the_preview_shows_an_image_as_it_is(tmp_path: Path, flat_model: Path, monkeypatch) -> None:
    """Neither upside down nor, as a scan in the same coordinates, with left and right exchanged."""
    drawn: list[tuple[np.ndarray, ...]] = []

    def draw(image: np.ndarray, labels: np.ndarray, *_: object, **__: object) -> bytes:
        drawn.append((image, labels))
        return b""

    monkeypatch.setattr(pipeline, "preview_png", draw)
    scan = save_image(tmp_path / "cell.png")
    (result,) = run([scan], flat_model, preview=True)
    image, labels = (array[:, ::-1, 0].T for array in drawn[0])  # rows from the top; the last one is drawn there
    np.testing.assert_allclose(image, np.asarray(Image.open(scan)).mean(-1), rtol=1e-6)
    np.testing.assert_array_equal(labels, np.asarray(Image.open(result.outputs["segmentation"])))


def test_an_image_that_does_not_fit_the_model_is_refused(tmp_path: Path, tiny_model: Path, flat_model: Path) -> None:
    flat_scan = save(tmp_path / "slice.nii.gz", np.random.default_rng(0).random((6, 5, 1)))
    for scan, size in ((save_image(tmp_path / "cell.png", "L"), "13 x 11"), (flat_scan, "6 x 5")):
        (result,) = run([scan], tiny_model)
        assert result.exit_code == 3 and str(result.error) == (
            f"{scan}: found a 2D image ({size}); expected a volume for the 3D model tiny; name a 2D model with -m"
        )
    (result,) = run([tmp_path / "cell.png"], flat_model)
    assert result.exit_code == 3
    assert "found 1 channel; expected 3 (T1, FLAIR, T2)" in str(result.error)
    assert str(result.error).endswith("convert the image to colour")
    assert not list(tmp_path.glob("*_seg*"))


def test_where_the_mask_of_an_image_may_go(tmp_path: Path, flat_model: Path) -> None:
    image, scan = save_image(tmp_path / "cell.png"), save(tmp_path / "cell.nii.gz")
    for name in ("mask.png", "mask.nii.gz"):
        (result,) = run([image], flat_model, output=tmp_path / name)
        assert result.status == "done", result.error
        assert read_labels(tmp_path / name).shape == (13, 11, 1)
    with pytest.raises(UsageError, match=r"the mask of cell\.png is not written as \.jpg; use \.png or \.nii\.gz"):
        run([image], flat_model, output=tmp_path / "mask.jpg")
    with pytest.raises(UsageError, match=r"the mask of cell\.nii\.gz is not written as \.png; use \.nii\.gz$"):
        run([scan], flat_model, output=tmp_path / "mask.png")
    with pytest.raises(UsageError, match=r"would both be written to .*cell_prob\.nii\.gz"):
        run([image, scan], flat_model)
    with pytest.raises(UsageError, match=r"would both be written to .*cell_seg\.png"):
        run([image, save_image(tmp_path / "cell.jpg")], flat_model)


@pytest.mark.data
def test_a_preset_trains_on_real_images_and_its_masks_are_evaluated(tmp_path: Path, data_folder: Path) -> None:
    """Two steps: what is right is the way from PNG to PNG, not the mask."""
    source = data_folder / "nuclei_dsb2018"
    names = sorted(path.name for path in (source / "images").glob("[!.]*.png"))[:8]
    for part in ("images", "masks"):
        (tmp_path / "data" / part).mkdir(parents=True)
        for name in names:
            shutil.copy(source / part / name, tmp_path / "data" / part)
    tiny = [
        "data.window=[64, 64]", "data.test_cases=2", "data.validation_cases=1", "data.calibration_cases=1",
        "network.channels=8",
        "training.batch_size=2", "training.max_steps=2", "training.validate_every=2", "inference.steps=1",
    ]  # fmt: skip
    config = load_segmenter_config("ensemdiff-nuclei-small", tiny)
    model = train_segmenter(config, tmp_path / "data", tmp_path / "run", device="cpu")
    card = json.loads((model / "model.json").read_text())
    assert card["channels"] == ["red", "green", "blue"] and card["labels"] == {"0": "background", "1": "nucleus"}
    scan = tmp_path / "data" / "images" / names[0]
    (result,) = run([scan], tmp_path / "run", output=tmp_path / "out", preview=True)
    assert result.status == "done", result.error
    assert result.outputs["segmentation"] == tmp_path / "out" / f"{scan.stem}_seg.png"
    with Image.open(result.outputs["segmentation"]) as mask, Image.open(scan) as image:
        assert mask.size == image.size == (256, 256)
        assert set(np.unique(np.asarray(mask))) <= {0, 1}
    prediction = np.asarray(Image.open(result.outputs["segmentation"])) > 0
    reference = np.asarray(Image.open(tmp_path / "data" / "masks" / names[0])) > 0
    dice = 2 * (prediction & reference).sum() / (prediction.sum() + reference.sum())
    references = tmp_path / "references"
    references.mkdir()
    shutil.copy(tmp_path / "data" / "masks" / names[0], references)
    found = evaluate(
        tmp_path / "out", references, tmp_path / "evaluation", EvaluateOptions(images=tmp_path / "data" / "images")
    )
    assert found.dice[1].mean == pytest.approx(dice)
    assert all("no voxel size" in line for line in found.warnings), "the preview beside the mask is no prediction"
