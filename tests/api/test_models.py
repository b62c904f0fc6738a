"""Models in memory: one call loads any of them, results lie on the scan's grid, and misuse is said in one line."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from medseg_diffusion.api.models import AnomalyDetector, Generator, Network, Segmenter, load_model
from medseg_diffusion.errors import InputError, ModelError, UsageError
from medseg_diffusion.models.image_source import SampleOptions
from medseg_diffusion.volumes.io import read_volume
from medseg_diffusion.volumes.volume import Volume
from medseg_diffusion.workflows.anomaly import AnomalyOptions, anomaly
from medseg_diffusion.workflows.finished import DISAGREE
from medseg_diffusion.workflows.sample import read_png, sample
from tests.helpers.generators import QUIET
from tests.helpers.segmenters import FLAT, calibrated, make_model, save, tiny_config

pytestmark = QUIET


@pytest.fixture(scope="module")
def segmenter(tiny_model: Path) -> Segmenter:
    model = load_model(tiny_model, "cpu", ensemble=2)
    assert isinstance(model, Segmenter)
    return model


# ---- segmenters ------------------------------------------------------------------------------------------------------


def test_the_mask_is_the_same_for_every_form_of_the_scan(segmenter: Segmenter, tmp_path: Path) -> None:
    path = save(tmp_path / "scan.nii.gz")
    image, told = nib.load(path), list[tuple[str, float]]()
    expected = segmenter.segment(path, on_progress=lambda *one: told.append(one))
    assert expected.labels.shape == (11, 13, 9) and expected.labels.dtype == np.uint8 and expected.labels.any()
    assert told[-1] == ("segmenting with tiny", 1.0) and [share for _, share in told] == sorted(s for _, s in told)
    forms = {"str": str(path), "nibabel": image, "volume": read_volume(path)}
    for name, scan in forms.items():
        assert np.array_equal(segmenter.segment(scan).labels, expected.labels), name
    array = segmenter.segment(np.asarray(image.dataobj), affine=image.affine)
    assert np.array_equal(array.labels, expected.labels) and array.volumes_ml == expected.volumes_ml
    assert expected.volumes_ml["bright"] == pytest.approx(
        (expected.labels == 1).sum() * read_volume(path).voxel_mm3 / 1e3
    )
    assert not np.array_equal(segmenter.segment(path, seed=1).labels, expected.labels)


def test_results_have_the_geometry_of_the_scan(segmenter: Segmenter, tmp_path: Path) -> None:
    path = save(tmp_path / "scan.nii.gz")
    found = segmenter.segment(path, maps=["members", "probabilities", "uncertainty", "mutual-information"])
    assert found.members.shape == (2, 11, 13, 9) and found.probabilities.shape == (2, 11, 13, 9)
    assert found.uncertainty.shape == found.mutual_information.shape == (11, 13, 9)
    np.testing.assert_allclose(found.probabilities.sum(0), 1, atol=1e-4)
    original = nib.load(path)
    for what, dtype in (("labels", np.uint8), ("uncertainty", np.float32), ("probabilities", np.float32)):
        written = nib.load(found.save(tmp_path / f"{what}.nii.gz", what))  # type: ignore[arg-type]
        for image in (written, found.to_nibabel(what)):  # type: ignore[arg-type]
            np.testing.assert_allclose(image.affine, original.affine, atol=1e-5)
            assert (image.get_qform(coded=True)[1], image.get_sform(coded=True)[1]) == (2, 1)
            assert image.get_data_dtype() == dtype and image.shape[:3] == (11, 13, 9)
    assert np.array_equal(nib.load(tmp_path / "labels.nii.gz").get_fdata(), found.labels)
    assert found.to_nibabel("members").shape == (11, 13, 9, 2)
    assert found.save(str(tmp_path / "mask.nrrd")).is_file()
    (tmp_path / "folder.nii.gz").mkdir()
    with pytest.raises(UsageError, match=r"folder\.nii\.gz: is a folder"):
        found.save(tmp_path / "folder.nii.gz")
    with pytest.raises(UsageError, match=r"members: not made; ask for it with segment\(scan, maps=\['members'\]\)"):
        segmenter.segment(path).save(tmp_path / "members.nii.gz", "members")


def test_intervals_and_doubts_are_in_the_result(tiny_model: Path, tmp_path: Path) -> None:
    path = save(tmp_path / "scan.nii.gz")
    model = load_model(calibrated(tiny_model, tmp_path / "model", agreement=1.0), "cpu", ensemble=3)
    found = model.segment(path)
    assert set(found.intervals_ml) == {"bright"} and found.level == 0.8 and found.quality == "check"
    assert found.disagreement is not None and found.members_ml["bright"][0] <= found.members_ml["bright"][1]
    assert DISAGREE in found.warnings


def test_remarks_on_the_scan_are_in_the_result(segmenter: Segmenter, tmp_path: Path) -> None:
    """As in the results of the commands: what is doubtful about a file is no line that scrolls by."""
    path = save(tmp_path / "scan.nii.gz")
    image = nib.load(path)
    image.set_qform(None, 0)
    image.set_sform(None, 0)
    nib.save(image, tmp_path / "unoriented.nii.gz")
    assert "left and right are a guess" in " ".join(segmenter.segment(tmp_path / "unoriented.nii.gz").warnings)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"fusion": "median"}, "fusion 'median' is unknown; use mean, majority, staple"),
        ({"uncertainty": "std"}, "uncertainty 'std' is unknown; use entropy, mutual-information, variance"),
        ({"ensemble": 0}, "ensemble=0: expected 1 or more"),
        ({"steps": -1}, "steps=-1: expected 1 or more"),
    ],
)
def test_values_that_mean_nothing_are_refused(tiny_model: Path, option: dict[str, object], message: str) -> None:
    """0 would be taken as "the model's default", and an unknown word would end in an error of numpy, or in none."""
    with pytest.raises(UsageError, match=message):
        load_model(tiny_model, "cpu", **option)  # type: ignore[arg-type]


def test_an_option_may_be_false(tmp_path: Path) -> None:
    """None takes the model's default, which may be to keep the largest part alone."""
    path = make_model(tmp_path / "model", tiny_config(inference={"steps": 2, "largest_part": True}))
    kept = [load_model(path, "cpu", keep_largest=keep)._model.aggregation.largest_part for keep in (None, False)]
    assert kept == [True, False]


def test_a_scan_that_does_not_fit_is_refused(segmenter: Segmenter, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the 3D model tiny; name a 2D model"):
        segmenter.segment(np.random.default_rng(0).random((16, 16)), spacing_mm=(1, 1))
    with pytest.raises(InputError, match=r"2 channels; expected 1 \(T1\) for model tiny"):
        segmenter.segment(np.random.default_rng(0).random((16, 16, 16, 2)), spacing_mm=(1, 1, 1))
    with pytest.raises(InputError, match="no such file"):
        segmenter.segment(tmp_path / "none.nii.gz")


def test_models_of_several_channels_take_one_image_for_each(tmp_path: Path) -> None:
    two = make_model(tmp_path / "two", tiny_config(data={"labels": ["bright"], "window": [8, 8, 8], "channels": 2}))
    model = load_model(two, "cpu")
    t1, flair = save(tmp_path / "t1.nii.gz"), save(tmp_path / "flair.nii.gz")
    listed, named = model.segment([t1, flair]), model.segment({"FLAIR": flair, "T1": t1})
    assert model.channels == ("T1", "FLAIR") and np.array_equal(listed.labels, named.labels)


def test_a_slice_is_an_array_of_two_axes(tmp_path: Path) -> None:
    flat = {**FLAT, "data": {"labels": ["bright"], "window": [8, 8]}}
    model = load_model(make_model(tmp_path / "flat", tiny_config(**flat)), "cpu")
    found = model.segment(np.random.default_rng(0).random((16, 12)), spacing_mm=(1, 1))
    assert found.labels.shape == (16, 12, 1)


# ---- generators ------------------------------------------------------------------------------------------------------


def test_a_generator_draws_what_the_command_writes(image_models: dict[str, Path], tmp_path: Path) -> None:
    model = load_model(image_models["class"], "cpu")
    assert isinstance(model, Generator) and model.classes == ("left", "right") and model.shape == (16, 16)
    told: list[tuple[str, float]] = []
    drawn = model.sample(3, steps=2, seed=4, batch_size=2, on_progress=lambda *one: told.append(one))
    assert drawn.images.shape == (3, 16, 16, 3) and drawn.images.dtype == np.uint8
    assert drawn.classes == ("left", "right", "left") and [share for _, share in told] == [2 / 3, 1.0]
    files = sample(image_models["class"], tmp_path / "s", SampleOptions(3, steps=2, seed=4, device="cpu"))
    for image, file in zip(drawn.images, files, strict=True):
        assert np.abs(image.astype(int) - read_png(file)).max() <= 1
    assert np.abs(model.sample(1, steps=2, seed=4).images[0].astype(int) - drawn.images[0]).max() <= 1
    with Image.open(drawn.save(tmp_path / "grid.png")) as grid:
        assert grid.size == (34, 34)
    named, numbered = model.sample(1, label="right", steps=2), model.sample(1, label=1, steps=2)
    assert np.array_equal(named.images, numbered.images) and named.classes == ("right",)
    with pytest.raises(UsageError, match=r"no class 'up'; it has left, right"):
        model.sample(1, label="up")
    with pytest.raises(UsageError, match="the model has classes 0 to 1"):
        model.sample(1, label=2)
    with pytest.raises(UsageError, match="pictures have no geometry"):
        drawn.to_nibabel(0)
    with pytest.raises(UsageError, match=r"expected a name that ends in \.png"):
        drawn.save(tmp_path / "grid.nii.gz")
    assert drawn.spacing_mm is None
    with pytest.raises(UsageError, match="count=0: expected 1 or more"):
        model.sample(0)
    with pytest.raises(UsageError, match="batch_size=0: expected 1 or more"):
        model.sample(1, batch_size=0)


def test_upsamplers_and_classifiers_are_given_at_the_loading(image_models: dict[str, Path]) -> None:
    half = load_model(image_models["half"], "cpu", upsampler=image_models["upsampler"])
    assert half.sample(1, steps=1).images.shape == (1, 16, 16, 3)
    guided = load_model(image_models["pixel"], "cpu", classifier=image_models["classifier"])
    strong, none = guided.sample(1, steps=2, classifier_scale=50.0), guided.sample(1, steps=2, classifier_scale=0.0)
    assert not np.array_equal(strong.images, none.images)
    plain = load_model(image_models["pixel"], "cpu").sample(1, steps=2)
    assert np.array_equal(plain.images, none.images)


def test_volumes_have_a_geometry(box_generators: dict[int, Path], tmp_path: Path) -> None:
    drawn = load_model(box_generators[3], "cpu").sample(2, steps=1)
    image = drawn.to_nibabel(1)
    assert drawn.spacing_mm is not None and image.shape == drawn.images.shape[1:4]
    np.testing.assert_allclose(image.header.get_zooms()[:3], drawn.spacing_mm)
    with Image.open(drawn.save(tmp_path / "grid.png")) as grid:
        assert grid.size[0] == drawn.images.shape[1] * 2 + 2


# ---- anomaly models --------------------------------------------------------------------------------------------------


def test_an_anomaly_model_scores_as_the_command_does(
    anomaly_models: dict[str, Path], anomaly_scans: Path, tmp_path: Path
) -> None:
    scan = anomaly_scans / "images" / "s0.nii.gz"
    model = load_model(anomaly_models["pixel"], "cpu")
    assert isinstance(model, AnomalyDetector)
    found = model.anomaly(scan, counterpart=True)
    assert found.score.shape == found.mask.shape == found.foreground.shape == (20, 24, 12)
    assert found.score.min() >= 0 and not found.score[~found.foreground].any() and found.score.any()
    assert np.array_equal(found.mask, (found.score > found.threshold) & found.foreground)
    assert found.volume_ml == pytest.approx(found.mask.sum() / 1000)
    assert found.healthy_percentile is not None and found.counterpart.shape == (20, 24, 12)
    (result,) = anomaly(str(scan), AnomalyOptions(model=str(anomaly_models["pixel"]), output=tmp_path, device="cpu"))
    assert result.status == "done" and result.threshold == found.threshold  # type: ignore[attr-defined]
    for what in ("score", "mask", "counterpart"):
        assert found.save(tmp_path / f"{what}.nii.gz", what).is_file()  # type: ignore[arg-type]
    np.testing.assert_allclose(nib.load(tmp_path / "score.nii.gz").get_fdata(), found.score, rtol=1e-6)
    assert nib.load(tmp_path / "mask.nii.gz").get_data_dtype() == np.uint8
    array = model.anomaly(np.asarray(nib.load(scan).dataobj), spacing_mm=(1, 1, 1), threshold=0.5)
    assert np.array_equal(array.score, found.score) and array.threshold == 0.5
    assert model.anomaly(scan, threshold="q0.5").threshold < found.threshold
    with pytest.raises(UsageError, match=r"counterpart: not made; ask for it with anomaly\(scan, counterpart=True\)"):
        array.to_nibabel("counterpart")
    with pytest.raises(InputError, match="2 channels; expected one"):
        model.anomaly(Volume(torch.rand(2, 20, 24, 12), np.eye(4)))


# ---- any model -------------------------------------------------------------------------------------------------------


def test_a_model_says_what_it_can_do(
    segmenter: Segmenter, image_models: dict[str, Path], anomaly_models: dict[str, Path]
) -> None:
    detector, generator = load_model(anomaly_models["pixel"], "cpu"), load_model(image_models["pixel"], "cpu")
    for model, message in (
        (segmenter, r"tiny is a segmenter, which has \.segment\(scan\); \.sample is for a generator"),
        (detector, r"pixel is an anomaly model, which has \.anomaly\(scan\); \.sample is for a generator"),
        (load_model(image_models["autoencoder"], "cpu"), r"autoencoder is a network, which has \.network"),
    ):
        with pytest.raises(UsageError, match=message):
            model.sample(1)
        assert not hasattr(model, "sample") and "sample" not in dir(model)
    with pytest.raises(AttributeError, match=r"pixel is a generator, which has \.sample\(n\); \.anomaly is for an"):
        generator.anomaly("scan.nii.gz")
    with pytest.raises(AttributeError, match="'Segmenter' object has no attribute 'colour'"):
        segmenter.colour  # noqa: B018
    assert repr(segmenter) == "<Segmenter 'tiny': ensemdiff>"


def test_the_network_behind_a_generator_is_at_hand(image_models: dict[str, Path]) -> None:
    model = load_model(image_models["class"], "cpu")
    assert isinstance(model, Network)
    assert model.network(torch.zeros(1, 3, 16, 16), torch.tensor([5]), torch.tensor([1])).shape == (1, 3, 16, 16)
    upsampler = load_model(image_models["upsampler"], "cpu")
    assert type(upsampler) is Network and upsampler.module is not None
    with pytest.raises(UsageError, match="an upsampler enlarges the images of another model"):
        upsampler.sample(1)
    codec = load_model(image_models["autoencoder"], "cpu")
    with pytest.raises(UsageError, match=r"an autoencoder has no timesteps; use module\.encode"):
        codec.network(torch.zeros(1, 3, 16, 16), torch.tensor([0]))


def test_options_of_another_kind_of_model_are_refused(tiny_model: Path, anomaly_models: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match=r"a segmenter, which load_model gives ensemble, .*; leave median out"):
        load_model(tiny_model, "cpu", median=3)
    with pytest.raises(
        UsageError, match=r"an anomaly model, which load_model gives method, .*; leave ensemble, fast out"
    ):
        load_model(anomaly_models["pixel"], "cpu", ensemble=2, fast=True)
    with pytest.raises(UsageError, match="method patched: this model has"):
        load_model(anomaly_models["pixel"], "cpu", method="patched")
    with pytest.raises(ModelError, match="found no model there"):
        load_model("nothing")
