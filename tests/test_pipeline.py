"""`medseg segment` from file to file: geometry, names, options, bad input, and that one bad scan stops no other."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from medseg_cli.main import app
from PIL import Image
from typer.testing import CliRunner

from medseg_diffusion import build
from medseg_diffusion.config.load import load_segmenter_config, parse_config
from medseg_diffusion.config.segmenter import SegmenterConfig
from medseg_diffusion.diffusion.noise import derive_seed
from medseg_diffusion.errors import InputError, ModelError, UsageError
from medseg_diffusion.methods.ensemble import Ensemble, tempered
from medseg_diffusion.models import segmenter
from medseg_diffusion.models.load import load_segmenter
from medseg_diffusion.models.store import load_model_files, save_model
from medseg_diffusion.volumes.io import read_labels, read_volume
from medseg_diffusion.volumes.volume import Volume
from medseg_diffusion.workflows import segment as pipeline
from medseg_diffusion.workflows.evaluate import EvaluateOptions, evaluate
from medseg_diffusion.workflows.scans import ScanResult
from medseg_diffusion.workflows.segment import SegmentOptions, segment
from medseg_diffusion.workflows.train_segmenter import train_segmenter

OBLIQUE = np.array([[-0.9, 0.1, 0.0, 40.0], [0.1, 1.1, 0.2, -30.0], [0.0, -0.2, 2.0, 5.0], [0.0, 0.0, 0.0, 1.0]])


def tiny_config(**changes: object) -> SegmenterConfig:
    content = {
        "method": "ensemdiff",
        "data": {"labels": ["bright"], "window": [8, 8, 8]},
        "network": {"channels": 8, "channel_mult": [1, 2]},
        "diffusion": {"head": "logits", "scale": 0.5, "schedule": {"name": "cosine"}},
        "inference": {"steps": 2},
        **changes,
    }
    return parse_config(content, "test")


def make_model(path: Path, config: SegmenterConfig, labels: int = 2) -> Path:
    torch.manual_seed(0)
    model = build.segmenter(config, labels)
    for parameter in model.parameters():  # zero-initialised outputs would hide everything behind them
        torch.nn.init.normal_(parameter, std=0.1)
    card = {
        "method": config.method,
        "labels": {"0": "background", "1": "bright"} | ({"2": "dark"} if labels == 3 else {}),
        "channels": ["T1"] * config.data.channels,
        "config": config.model_dump(mode="json"),
    }
    save_model(path, card, model.state_dict(), "# card")
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny", tiny_config())


def save(path: Path, data: np.ndarray | None = None, affine: np.ndarray = OBLIQUE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if data is None:
        data = np.random.default_rng(len(path.name)).random((11, 13, 9)).astype(np.float32)
    image = nib.Nifti1Image(data, affine)
    image.set_sform(affine, 1)
    image.set_qform(affine, 2)
    image.header.set_xyzt_units("mm")
    nib.save(image, path)
    return path


def run(scans: list[Path], model: Path, **options: object) -> list[ScanResult]:
    return segment(scans, SegmentOptions(model=str(model), device="cpu", **options))  # type: ignore[arg-type]


def test_every_output_lies_on_the_grid_of_the_scan(tmp_path: Path, model: Path) -> None:
    scan = save(tmp_path / "scan.nii.gz")
    (result,) = run(
        [scan], model, ensemble=3, save_probabilities=True, save_uncertainty=True, statistics=True, preview=True,
        report=tmp_path / "report.html",
    )  # fmt: skip
    assert result.status == "done", result.error
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "report.html", "scan.nii.gz", "scan_preview.png", "scan_prob.nii.gz", "scan_seg.nii.gz",
        "scan_statistics.json", "scan_uncertainty.nii.gz",
    ]  # fmt: skip
    original = nib.load(scan)
    for kind in ("segmentation", "probabilities", "uncertainty"):
        written = nib.load(result.outputs[kind])
        assert written.shape[:3] == original.shape
        np.testing.assert_allclose(written.affine, original.affine, atol=1e-6)
        assert written.header["qform_code"] == 2 and written.header["sform_code"] == 1
        assert written.header.get_xyzt_units()[0] == "mm"
    labels = np.asarray(nib.load(result.outputs["segmentation"]).dataobj)
    assert labels.dtype == np.uint8
    probabilities = nib.load(result.outputs["probabilities"]).get_fdata()
    np.testing.assert_allclose(probabilities.sum(-1), 1, atol=1e-4)
    np.testing.assert_array_equal(probabilities.argmax(-1), labels)
    uncertainty = nib.load(result.outputs["uncertainty"]).get_fdata()
    assert uncertainty.min() >= -1e-6 and uncertainty.max() <= 1 + 1e-6
    voxel_ml = abs(np.linalg.det(OBLIQUE[:3, :3])) / 1000
    statistics = json.loads(result.outputs["statistics"].read_text())
    assert statistics["classes"]["bright"]["volume_ml"] == pytest.approx((labels == 1).sum() * voxel_ml, abs=1e-3)
    low, high = statistics["classes"]["bright"]["members_ml"]
    assert low <= high and "interval_ml" not in statistics["classes"]["bright"]  # the model is not calibrated
    assert "scan.nii.gz" in (tmp_path / "report.html").read_text()


def test_result_depends_on_seed_and_name_alone(tmp_path: Path, model: Path) -> None:
    data = np.random.default_rng(0).random((11, 13, 9)).astype(np.float32)
    scans = [save(tmp_path / "in" / f"{name}.nii.gz", data) for name in ("a", "b", "c")]

    def masks(out: str, which: list[Path], **options: object) -> dict[str, np.ndarray]:
        results = run(which, model, output=tmp_path / out, save_probabilities=True, **options)
        return {r.scan.name: nib.load(r.outputs["probabilities"]).get_fdata() for r in results}

    together = masks("1", scans)
    for scan in scans:
        alone = masks(f"2{scan.name[0]}", [scan])
        np.testing.assert_array_equal(alone[scan.name], together[scan.name])
    assert not np.array_equal(together["a.nii.gz"], together["b.nii.gz"])
    assert not np.array_equal(masks("3", scans[:1], seed=1)["a.nii.gz"], together["a.nii.gz"])


@pytest.mark.parametrize("method", ["segdiff", "baseline"])
@pytest.mark.parametrize("dims", [2, 3])
def test_all_methods_in_2d_and_3d_with_windows(tmp_path: Path, method: str, dims: int) -> None:
    window = [8] * dims
    config = tiny_config(
        method=method,
        data={"window": window},
        network={"dims": dims, "channels": 8, "channel_mult": [1, 2]},
        image_encoder={"encoder_channels": 4, "encoder_blocks": 1, "encoder_growth": 4},
        inference={"steps": 2, "window": window, "overlap": 0.5},
    )
    path = make_model(tmp_path / "model", config, labels=3)
    (result,) = run([save(tmp_path / "scan.nii.gz")], path, ensemble=2)
    assert result.status == "done", result.error
    assert nib.load(result.outputs["segmentation"]).shape == (11, 13, 9)


def test_resampling_models_return_to_the_native_grid(tmp_path: Path) -> None:
    config = tiny_config(preprocessing={"spacing_mm": [1.5, 1.5, 1.5], "crop_foreground": True})
    path = make_model(tmp_path / "model", config)
    data = np.zeros((30, 31, 20), dtype=np.float32)
    data[8:22, 9:24, 4:15] = 100 + np.random.default_rng(0).random((14, 15, 11))
    (result,) = run([save(tmp_path / "scan.nii.gz", data)], path)
    assert nib.load(result.outputs["segmentation"]).shape == data.shape


@pytest.mark.parametrize("fusion", ["mean", "majority", "staple"])
def test_fusions(tmp_path: Path, model: Path, fusion: str) -> None:
    scan = save(tmp_path / "scan.nii.gz")
    (result,) = run([scan], model, ensemble=3, fusion=fusion)
    assert result.status == "done", result.error
    # Of three members two are a little for it and one is much against it: the mean says no, the votes say yes.
    whole = load_segmenter(model, "cpu", ensemble=3, fusion=fusion)  # type: ignore[arg-type]
    _, placement = whole.sample(read_volume(scan), 0)
    bright = torch.zeros(3, *placement.shape)
    bright[:2, 2:6, 2:6, 2:6], bright[2, 2:6, 2:6, 2:6] = 0.6, 0.01
    bright[:, 2:6, 2:6, 7:8] = 0.9  # of one mind
    found = whole.aggregation.combine(Ensemble.of(torch.stack([1 - bright, bright], 1)), placement)
    back = placement.restore(bright[:1])[0]
    assert bool((found.labels[back > 0.7] == 1).all())
    assert bool((found.labels[(back > 0.5) & (back < 0.7)] == (0 if fusion == "mean" else 1)).all())


def bad_scans(folder: Path) -> dict[str, Path]:
    good = np.random.default_rng(0).random((6, 6, 6)).astype(np.float32)
    holes = good.copy()
    holes[0, 0, :2] = np.nan
    truncated = save(folder / "truncated.nii.gz", np.random.default_rng(0).random((20, 20, 20)))
    truncated.write_bytes(truncated.read_bytes()[:3000])
    garbage = folder / "garbage.nii.gz"
    garbage.write_bytes(b"not an image")
    singular = save(folder / "singular.nii.gz", good)
    image = nib.load(singular)
    header = image.header.copy()
    header["sform_code"], header["qform_code"] = 1, 0
    header["srow_z"] = 0
    nib.save(nib.Nifti1Image(good, None, header), singular)
    return {
        "missing": folder / "missing.nii.gz",
        "truncated": truncated,
        "garbage": garbage,
        "2d": save(folder / "2d.nii.gz", good[:, :, 0]),
        "4d": save(folder / "4d.nii.gz", np.stack([good] * 3, -1)),
        "nan": save(folder / "nan.nii.gz", holes),
        "constant": save(folder / "constant.nii.gz", np.full((6, 6, 6), 7.0, np.float32)),
        "singular": singular,
    }


@pytest.mark.parametrize("kind", ["missing", "truncated", "garbage", "2d", "4d", "nan", "constant", "singular"])
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path: Path, model: Path, kind: str) -> None:
    scan = bad_scans(tmp_path / "in")[kind]
    out = tmp_path / "out"
    try:
        (result,) = run([scan], model, output=out, preview=True, report=out / "report.html")
        assert result.status == "failed"
        message, code = str(result.error), result.exit_code
    except InputError as error:
        message, code = str(error), error.exit_code
    assert code == 3
    assert scan.name in message and "\n" not in message
    assert "found" in message and "expected" in message
    assert not out.exists() or not list(out.iterdir())


def test_wrong_channel_count(tmp_path: Path) -> None:
    config = tiny_config(data={"window": [8, 8, 8], "channels": 2})
    path = make_model(tmp_path / "model", config)
    (result,) = run([save(tmp_path / "scan.nii.gz")], path)
    assert result.exit_code == 3 and "1 channel" in str(result.error) and "expected 2 (T1, T1)" in str(result.error)
    data = np.random.default_rng(0).random((8, 8, 8, 2)).astype(np.float32)
    (result,) = run([save(tmp_path / "two.nii.gz", data)], path)
    assert result.status == "done", result.error
    assert nib.load(result.outputs["segmentation"]).shape == (8, 8, 8)


def test_one_bad_scan_stops_no_other(tmp_path: Path, model: Path) -> None:
    bad_scans(tmp_path / "in")
    save(tmp_path / "in" / "zz_good.nii.gz")
    results = {r.scan.name: r for r in run([tmp_path / "in"], model, output=tmp_path / "out")}
    assert results["zz_good.nii.gz"].status == "done"
    assert all(r.status == "failed" for name, r in results.items() if name != "zz_good.nii.gz")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["zz_good_seg.nii.gz"]


def test_skip_existing_and_shards(tmp_path: Path, model: Path) -> None:
    scans = [save(tmp_path / "in" / f"case{i}.nii.gz") for i in range(6)]
    parts = [{r.scan for r in run(scans, model, output=tmp_path / "out", shard=(i, 3))} for i in (1, 2, 3)]
    assert sorted(path for part in parts for path in part) == scans
    again = run(scans, model, output=tmp_path / "out", skip_existing=True)
    assert {r.status for r in again} == {"skipped"}


def test_outputs_are_named_as_asked(tmp_path: Path, model: Path) -> None:
    scan = save(tmp_path / "scan.nii.gz")
    (result,) = run([scan], model, output=tmp_path / "deep" / "mask.nrrd", save_uncertainty=True)
    assert result.outputs["segmentation"] == tmp_path / "deep" / "mask.nrrd"
    assert result.outputs["uncertainty"] == tmp_path / "deep" / "mask_uncertainty.nii.gz"
    np.testing.assert_allclose(read_volume_affine(result.outputs["segmentation"]), nib.load(scan).affine, atol=1e-4)


def read_volume_affine(path: Path) -> np.ndarray:
    from medseg_diffusion.volumes.io import read_labels

    return read_labels(path).affine


def test_contradictions_are_refused_before_any_work(tmp_path: Path, model: Path) -> None:
    a, b = save(tmp_path / "1" / "x.nii.gz"), save(tmp_path / "2" / "x.nii.gz")
    with pytest.raises(UsageError, match="is a file, but there are 2 scans"):
        run([a, b], model, output=tmp_path / "mask.nii.gz")
    with pytest.raises(UsageError, match="both be written"):
        run([a, b], model, output=tmp_path / "out")
    with pytest.raises(UsageError, match="overwrite the scan"):
        run([a], model, output=a)
    with pytest.raises(UsageError, match="sampler 'euler' is unknown"):
        run([a], model, sampler="euler")


def test_a_missing_or_damaged_model(tmp_path: Path, model: Path) -> None:
    scan = save(tmp_path / "scan.nii.gz")
    with pytest.raises(ModelError, match="no-such-model"):
        run([scan], Path("no-such-model"))
    broken = make_model(tmp_path / "broken", tiny_config())
    weights = bytearray((broken / "weights.safetensors").read_bytes())
    weights[-1] ^= 1
    (broken / "weights.safetensors").write_bytes(weights)
    with pytest.raises(ModelError, match="SHA-256"):
        run([scan], broken)
    assert not (tmp_path / "scan_seg.nii.gz").exists()


def test_a_shorter_walk_is_reported(tmp_path: Path, model: Path) -> None:
    (result,) = run([save(tmp_path / "scan.nii.gz")], model, steps=400)
    (note,) = result.warnings
    assert "400 steps asked for" in note


def test_members_do_not_depend_on_the_size_of_the_ensemble(tmp_path: Path, model: Path) -> None:
    volume = read_volume(save(tmp_path / "scan.nii.gz"))
    three, _ = load_segmenter(model, "cpu", ensemble=3).sample(volume, seed=5)
    one, _ = load_segmenter(model, "cpu", ensemble=1).sample(volume, seed=5)
    assert torch.equal(three.labels[:1], one.labels)
    assert not torch.equal(three.mean, one.mean)


def test_options_are_frozen() -> None:
    assert replace(SegmentOptions(), ensemble=3).ensemble == 3


def test_only_the_largest_part_counts_in_labels_and_volumes() -> None:
    model = load_segmenter("brain-tissue-t1", "cpu", ensemble=2)
    assert model.config.inference.largest_part
    volume = Volume(torch.rand(1, 40, 40, 40, generator=torch.Generator().manual_seed(0)), np.eye(4))
    image, placement = model.preprocessing.apply(volume)
    members = torch.zeros(2, 4, *image.shape[1:])
    members[:, 0] = 1.0
    for block in (slice(0, 5), slice(8, 11)):
        members[:, 0, block, block, block] = 0.0
        members[:, 2, block, block, block] = 1.0
    result = model.aggregation.combine(Ensemble.of(members), placement)
    assert int((result.labels > 0).sum()) == 125
    assert result.volumes_ml["grey matter"] == pytest.approx(0.125)
    assert result.members_ml["grey matter"] == pytest.approx((0.125, 0.125))


# ---- ensembles and calibration ---------------------------------------------------------------------------------------


def calibrated(model: Path, path: Path, **changes: object) -> Path:
    """A copy of a model with a calibration for its own sampler and steps."""
    saved = load_model_files(model)
    content = {
        "sampler": "dpm++", "steps": 2, "temperatures": [3.0, 2.0], "ece": [0.1, 0.05], "agreement": 0.0, "cases": 4,
        **changes,
    }  # fmt: skip
    save_model(path, {**saved.card, "calibration": content}, saved.weights, "# card")
    return path


def test_a_calibrated_model_is_less_sure_of_the_same_labels(tmp_path: Path, model: Path) -> None:
    volume = read_volume(save(tmp_path / "scan.nii.gz"))
    other = calibrated(model, tmp_path / "calibrated")
    for ensemble, temperature in ((1, 3.0), (2, 2.0), (4, 2.0)):
        raw = load_segmenter(model, "cpu", ensemble=ensemble).segment(volume)
        soft = load_segmenter(other, "cpu", ensemble=ensemble).segment(volume)
        assert torch.equal(raw.labels, soft.labels)
        torch.testing.assert_close(soft.probabilities, tempered(raw.probabilities, temperature))
        assert float(soft.uncertainty.mean()) > float(raw.uncertainty.mean())


def test_a_calibration_for_other_steps_is_not_used_and_that_is_said(tmp_path: Path, model: Path) -> None:
    volume = read_volume(save(tmp_path / "scan.nii.gz"))
    other = load_segmenter(calibrated(model, tmp_path / "calibrated"), "cpu", steps=3)
    assert other.notes == ["probabilities are not calibrated: the model's calibration is for dpm++ with 2 steps"]
    expected = load_segmenter(model, "cpu", steps=3).segment(volume)
    torch.testing.assert_close(other.segment(volume).probabilities, expected.probabilities)
    with pytest.raises(ModelError, match="calibration is of another version"):
        load_segmenter(calibrated(model, tmp_path / "newer", kind="isotonic"), "cpu")


def test_unusual_disagreement_is_flagged(tmp_path: Path, model: Path) -> None:
    scan = save(tmp_path / "scan.nii.gz")
    for bound, quality in ((0.0, "usual"), (1.0, "check")):
        path = calibrated(model, tmp_path / quality, agreement=bound)
        (result,) = run([scan], path, ensemble=3, statistics=True)
        statistics = json.loads(result.outputs["statistics"].read_text())
        assert statistics["quality"] == result.quality == quality
        assert not result.intervals_ml and "interval_level" not in statistics  # a calibration of an older version
        assert 0 <= statistics["classes"]["bright"]["pairwise_dice"] <= 1
        assert any("agree less than is usual" in note for note in result.warnings) == (quality == "check")


def test_intervals_are_those_of_the_errors_on_validation_cases(tmp_path: Path, model: Path) -> None:
    path = calibrated(model, tmp_path / "model", volume_errors=[math.log(1.5)], level=0.9)
    for ensemble in (1, 3):
        (result,) = run([save(tmp_path / "scan.nii.gz")], path, ensemble=ensemble, statistics=True)
        statistics = json.loads(result.outputs["statistics"].read_text())
        found = statistics["classes"]["bright"]
        unit = abs(np.linalg.det(OBLIQUE[:3, :3])) / 1000
        low, high = (found["volume_ml"] + unit) / 1.5 - unit, (found["volume_ml"] + unit) * 1.5 - unit
        assert found["interval_ml"] == pytest.approx([low, high], abs=1e-3)
        assert statistics["interval_level"] == result.level == 0.9 and ("members_ml" in found) == (ensemble > 1)
    report = tmp_path / "report.html"
    run([tmp_path / "scan.nii.gz"], path, ensemble=3, report=report)
    assert "90 % interval" in report.read_text() and "Sampled masks" in report.read_text()
    shown = CliRunner().invoke(app, ["segment", str(tmp_path / "scan.nii.gz"), "-m", str(path), "--verbose"])
    assert "(90 %: " in shown.output


def test_a_feed_forward_model_samples_nothing(tmp_path: Path) -> None:
    plain = make_model(tmp_path / "plain", tiny_config(method="baseline"))
    path = calibrated(plain, tmp_path / "model", sampler="ddim", steps=7, volume_errors=[0.1], level=0.95)
    for options in ({"steps": 3}, {"sampler": "ddim"}):
        with pytest.raises(UsageError, match="this model is feed-forward; leave --steps and --sampler out"):
            load_segmenter(path, "cpu", **options)  # type: ignore[arg-type]
    several = load_segmenter(path, "cpu", ensemble=5)
    assert several.notes == ["a feed-forward model has one mask; the ensemble size has no effect"]
    found = several.segment(read_volume(save(tmp_path / "scan.nii.gz")))
    assert (
        several.aggregation.calibration is not None
        and len(found.members) == 1
        and not found.members_ml
        and found.intervals_ml
    )


def test_a_slice_across_another_axis_is_no_slice_for_a_2d_model(tmp_path: Path) -> None:
    config = tiny_config(data={"window": [8, 8]}, network={"dims": 2, "channels": 8, "channel_mult": [1, 2]})
    path = make_model(tmp_path / "model", config)
    data = np.random.default_rng(0).random((1, 13, 9)).astype(np.float32)
    (result,) = run([save(tmp_path / "sagittal.nii.gz", data, np.eye(4))], path)
    assert result.exit_code == 3 and "found a single slice across another axis (1 x 13 x 9 voxels, RAS)" in str(
        result.error
    )
    # The same slice stored with its thin axis last is sagittal, too; an axial one is not.
    turned = save(tmp_path / "turned.nii.gz", data.transpose(1, 2, 0), np.eye(4)[[2, 0, 1, 3]])
    axial = save(tmp_path / "axial.nii.gz", data.transpose(1, 2, 0), np.eye(4))
    assert [run([scan], path)[0].status for scan in (turned, axial)] == ["failed", "done"]


def test_members_that_all_find_nothing_agree(tmp_path: Path, model: Path) -> None:
    whole = load_segmenter(calibrated(model, tmp_path / "calibrated", agreement=0.9), "cpu", ensemble=3)
    volume = read_volume(save(tmp_path / "scan.nii.gz"))
    _, placement = whole.sample(volume, 0)
    empty = torch.zeros(3, len(whole.labels), *placement.shape)
    empty[:, 0] = 1
    assert whole.aggregation.combine(Ensemble.of(empty), placement).quality == "usual"


def test_members_and_other_uncertainties_are_written_on_the_grid_of_the_scan(tmp_path: Path, model: Path) -> None:
    scan = save(tmp_path / "scan.nii.gz")
    (result,) = run(
        [scan], model, ensemble=3, save_members=True, save_uncertainty=True, uncertainty="mutual-information"
    )
    members = nib.load(result.outputs["members"])
    assert members.shape == (11, 13, 9, 3) and members.get_data_dtype() == np.uint8
    np.testing.assert_allclose(members.affine, nib.load(scan).affine, atol=1e-6)
    volume = read_volume(scan)
    whole = load_segmenter(model, "cpu", ensemble=3)
    ensemble, placement = whole.sample(volume, derive_seed(0, "scan"))
    found = whole.aggregation.combine(ensemble, placement)
    np.testing.assert_array_equal(
        members.get_fdata().transpose(3, 0, 1, 2), whole.aggregation.members_on_scan(found, placement)
    )
    disagreement = nib.load(result.outputs["uncertainty"]).get_fdata()
    assert 0 < disagreement.max() <= 1
    assert (disagreement <= found.uncertainty.numpy() + 1e-5).all(), "at most the whole entropy"


@pytest.mark.parametrize(("bound", "value"), [("MEMBERS_AT_ONCE", 2), ("PROBABILITIES_AT_ONCE", 1)])
def test_a_large_ensemble_or_scan_walks_in_parts(
    bound, value, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = read_volume(save(tmp_path / "scan.nii.gz"))
    whole = load_segmenter(model, "cpu", ensemble=5).segment(volume)
    monkeypatch.setattr(segmenter, bound, value)
    parts = load_segmenter(model, "cpu", ensemble=5).segment(volume)
    torch.testing.assert_close(parts.probabilities, whole.probabilities)
    assert torch.equal(parts.members, whole.members) and len(whole.members) == 5


def test_the_layout_of_the_configuration_is_used_and_the_agreement_computed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = make_model(tmp_path / "plain", tiny_config(**FLAT), labels=3)
    last = make_model(tmp_path / "last", tiny_config(**FLAT, training={"channels_last": True}), labels=3)
    calls: list[int] = []
    known = Ensemble.pairwise_dice
    monkeypatch.setattr(Ensemble, "pairwise_dice", lambda self: calls.append(len(self)) or known(self))
    volume = read_volume(save_image(tmp_path / "image.png"), channels=3)
    found = [load_segmenter(path, "cpu", ensemble=2) for path in (plain, last)]
    weights = [next(p for p in one.model.parameters() if p.ndim == 4 and p.shape[1] > 1) for one in found]
    assert [w.is_contiguous(memory_format=torch.channels_last) for w in weights] == [False, True]
    first, second = (one.segment(volume) for one in found)
    torch.testing.assert_close(first.probabilities, second.probabilities, rtol=0, atol=1e-3)
    assert calls == [2, 2]


# ---- images ----------------------------------------------------------------------------------------------------------

FLAT = {"network": {"dims": 2, "channels": 8, "channel_mult": [1, 2]}, "data": {"window": [8, 8], "channels": 3}}


@pytest.fixture(scope="module")
def flat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(**FLAT, preprocessing={"orientation": None})
    return make_model(tmp_path_factory.mktemp("models") / "flat", config)


def save_image(path: Path, mode: str = "RGB") -> Path:
    """An image of 13 x 11 pixels, bright in the upper left corner."""
    path.parent.mkdir(parents=True, exist_ok=True)
    colours = np.random.default_rng(len(path.name)).integers(0, 100, (11, 13, 3), dtype=np.uint8)
    colours[:3, :4] += 150
    Image.fromarray(colours).convert(mode).save(path)
    return path


def test_the_mask_of_an_image_is_a_png_and_its_maps_are_nifti(tmp_path: Path, flat_model: Path) -> None:
    for scan in (save_image(tmp_path / "one" / "cell.png"), save_image(tmp_path / "two" / "cell.jpg")):
        (result,) = run(
            [scan.parent], flat_model, ensemble=2, save_probabilities=True, save_members=True, save_uncertainty=True,
            statistics=True, preview=True, report=tmp_path / "report.html",
        )  # fmt: skip
        assert result.status == "done", result.error
        assert sorted(path.name for path in scan.parent.iterdir()) == sorted(
            [scan.name, "cell_members.nii.gz", "cell_preview.png", "cell_prob.nii.gz", "cell_seg.png",
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


def test_an_image_that_does_not_fit_the_model_is_refused(tmp_path: Path, model: Path, flat_model: Path) -> None:
    flat_scan = save(tmp_path / "slice.nii.gz", np.random.default_rng(0).random((6, 5, 1)))
    for scan, size in ((save_image(tmp_path / "cell.png", "L"), "13 x 11"), (flat_scan, "6 x 5")):
        (result,) = run([scan], model)
        assert result.exit_code == 3 and str(result.error) == (
            f"{scan}: found a 2D image ({size}); expected a volume for the 3D model tiny; name a 2D model with -m"
        )
    (result,) = run([tmp_path / "cell.png"], flat_model)
    assert result.exit_code == 3
    assert "found 1 channel; expected 3 (T1, T1, T1)" in str(result.error)
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


def labelled_images(folder: Path, value: int = 1) -> Path:
    for i in range(4):
        image = save_image(folder / "images" / f"cell{'x' * i}.png")
        mask = value * (np.asarray(Image.open(image).convert("L")) > 120).astype(np.uint8)
        (folder / "masks").mkdir(exist_ok=True)
        Image.fromarray(mask).save(folder / "masks" / image.name)
    return folder


def test_3d_training_on_images_and_masks_of_255_are_refused(tmp_path: Path) -> None:
    counts = {"test_cases": 1, "validation_cases": 1, "labels": ["bright"], "channels": 3}
    solid = tiny_config(data={**counts, "window": [8, 8, 8]}, training={"max_steps": 1})
    with pytest.raises(InputError, match=r"found a 2D image \(13 x 11\); expected volumes for a 3D model; .*dims to 2"):
        train_segmenter(solid, labelled_images(tmp_path / "a"), tmp_path / "run1", device="cpu")
    flat = tiny_config(**{**FLAT, "data": {**counts, "window": [8, 8]}})
    with pytest.raises(InputError, match=r"masks/cellx*\.png: found the values 0 and 255; .*divide the mask by 255"):
        train_segmenter(flat, labelled_images(tmp_path / "b", 255), tmp_path / "run2", device="cpu")


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
        "data.window=[64, 64]", "data.test_cases=2", "data.validation_cases=1", "network.channels=8",
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
    assert not found.warnings, "the preview beside the mask is no prediction"
