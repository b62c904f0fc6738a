"""`medseg segment` from file to file: geometry, names, options, bad input, and that one bad scan stops no other."""

from __future__ import annotations

import json
import math
import re
import warnings
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from medseg_cli.main import app
from typer.testing import CliRunner

from medseg_diffusion.diffusion.noise import derive_seed
from medseg_diffusion.errors import InputError, ModelError, UsageError
from medseg_diffusion.methods.ensemble import Ensemble
from medseg_diffusion.models.load import load_segmenter
from medseg_diffusion.volumes.io import read_labels, read_volume, write_labels
from medseg_diffusion.volumes.volume import Header
from medseg_diffusion.workflows.scans import part_of
from medseg_diffusion.workflows.segment import SegmentOptions
from tests.helpers.dicom_series import series
from tests.helpers.segmenters import FLAT, OBLIQUE, calibrated, make_model, run, save, save_image, tiny_config


def test_every_output_lies_on_the_grid_of_the_scan(tmp_path: Path, tiny_model: Path) -> None:
    scan = save(tmp_path / "scan.nii.gz")
    (result,) = run(
        [scan], tiny_model, ensemble=3, save_probabilities=True, save_uncertainty=True, statistics=True, preview=True,
        report=tmp_path / "report.html",
    )  # fmt: skip
    assert result.status == "done", result.error
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "report.html", "scan.nii.gz", "scan_dseg.tsv", "scan_preview.png", "scan_prob.nii.gz", "scan_seg.nii.gz",
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


def test_result_depends_on_seed_and_name_alone(tmp_path: Path, tiny_model: Path) -> None:
    data = np.random.default_rng(0).random((11, 13, 9)).astype(np.float32)
    scans = [save(tmp_path / "in" / f"{name}.nii.gz", data) for name in ("a", "b", "c")]

    def masks(out: str, which: list[Path], **options: object) -> dict[str, np.ndarray]:
        results = run(which, tiny_model, output=tmp_path / out, save_probabilities=True, **options)
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
def test_fusions(tmp_path: Path, tiny_model: Path, fusion: str) -> None:
    scan = save(tmp_path / "scan.nii.gz")
    (result,) = run([scan], tiny_model, ensemble=3, fusion=fusion)
    assert result.status == "done", result.error
    # Of three members two are a little for it and one is much against it: the mean says no, the votes say yes.
    whole = load_segmenter(tiny_model, "cpu", ensemble=3, fusion=fusion)  # type: ignore[arg-type]
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
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path: Path, tiny_model: Path, kind: str) -> None:
    scan = bad_scans(tmp_path / "in")[kind]
    out = tmp_path / "out"
    try:
        (result,) = run([scan], tiny_model, output=out, preview=True, report=out / "report.html")
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
    assert result.exit_code == 3 and "1 channel" in str(result.error) and "expected 2 (T1, FLAIR)" in str(result.error)
    data = np.random.default_rng(0).random((8, 8, 8, 2)).astype(np.float32)
    (result,) = run([save(tmp_path / "two.nii.gz", data)], path)
    assert result.status == "done", result.error
    assert nib.load(result.outputs["segmentation"]).shape == (8, 8, 8)


def test_one_bad_scan_stops_no_other(tmp_path: Path, tiny_model: Path) -> None:
    bad_scans(tmp_path / "in")
    save(tmp_path / "in" / "zz_good.nii.gz")
    results = {r.scan.name: r for r in run([tmp_path / "in"], tiny_model, output=tmp_path / "out")}
    assert results["zz_good.nii.gz"].status == "done"
    assert all(r.status == "failed" for name, r in results.items() if name != "zz_good.nii.gz")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["dseg.tsv", "zz_good_seg.nii.gz"]


def test_skip_existing_and_shards(tmp_path: Path, tiny_model: Path) -> None:
    scans = [save(tmp_path / "in" / f"case{i}.nii.gz") for i in range(6)]
    parts = [{r.scan for r in run(scans, tiny_model, output=tmp_path / "out", shard=(i, 3))} for i in (1, 2, 3)]
    assert sorted(path for part in parts for path in part) == scans
    again = run(scans, tiny_model, output=tmp_path / "out", skip_existing=True)
    assert {r.status for r in again} == {"skipped"}


def test_finished_scans_that_lack_what_is_asked_for_are_counted_and_stay_as_they_are(
    tmp_path: Path, tiny_model: Path
) -> None:
    """One line for the call: a mask may have been corrected by hand, and must not be made again for its statistics."""
    scans = [save(tmp_path / "in" / f"{name}.nii.gz") for name in "abc"]
    out = tmp_path / "out"
    first = run(scans[:2], tiny_model, output=out, preview=True)
    before = [result.outputs["segmentation"].read_bytes() for result in first]
    first[0].outputs["preview"].unlink()
    with pytest.warns(UserWarning) as said:
        results = run(scans, tiny_model, output=out, skip_existing=True, preview=True, statistics=True, seed=1)
    assert [str(one.message) for one in said] == [
        "2 of 2 finished scans lack files that this call asks for (preview of 1, statistics of 2) and stay skipped; "
        "process them with another -o, or without --skip-existing, which replaces their masks"
    ]
    assert [result.status for result in results] == ["skipped", "skipped", "done"]
    assert [result.outputs["segmentation"].read_bytes() for result in results[:2]] == before
    assert not any("lack" in text for result in results for text in result.warnings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(scans[1:], tiny_model, output=out, skip_existing=True, preview=True)
        run(scans, tiny_model, output=out, skip_existing=True)


def test_outputs_are_named_as_asked(tmp_path: Path, tiny_model: Path) -> None:
    scan = save(tmp_path / "scan.nii.gz")
    (result,) = run([scan], tiny_model, output=tmp_path / "deep" / "mask.nrrd", save_uncertainty=True)
    assert result.outputs["segmentation"] == tmp_path / "deep" / "mask.nrrd"
    assert result.outputs["uncertainty"] == tmp_path / "deep" / "mask_uncertainty.nii.gz"
    np.testing.assert_allclose(read_volume_affine(result.outputs["segmentation"]), nib.load(scan).affine, atol=1e-4)


def read_volume_affine(path: Path) -> np.ndarray:

    return read_labels(path).affine


def test_contradictions_are_refused_before_any_work(tmp_path: Path, tiny_model: Path) -> None:
    a, b = save(tmp_path / "1" / "x.nii.gz"), save(tmp_path / "2" / "x.nii.gz")
    with pytest.raises(UsageError, match="is a file, but there are 2 scans"):
        run([a, b], tiny_model, output=tmp_path / "mask.nii.gz")
    with pytest.raises(UsageError, match="both be written"):
        run([a, b], tiny_model, output=tmp_path / "out")
    with pytest.raises(UsageError, match="overwrite the scan"):
        run([a], tiny_model, output=a)
    with pytest.raises(UsageError, match="sampler 'pndm' is unknown"):
        run([a], tiny_model, sampler="pndm")
    with pytest.raises(UsageError, match="output_format 'foo' is unknown; use nifti, dicom-seg"):
        run([a], tiny_model, output_format="foo")
    for shard in ((5, 2), (0, 2), (0, 0)):  # not an empty part, which would look like work done
        with pytest.raises(UsageError, match=re.escape(f"shard {shard}: expected (i, n) with 1 <= i <= n")):
            run([a], tiny_model, shard=shard)


FOREIGN = "a file that medseg did not write, which the result would replace; move it, give -o another name, or keep it"


@pytest.mark.parametrize("name", ["m.nii", "m.nii.gz", "m.nrrd", "m.mha", "m.mhd", "m.png", "m.dcm"])
def test_a_mask_of_medseg_is_replaced_and_no_other_file(name: str, tmp_path: Path, tiny_model: Path) -> None:
    """A mask that was drawn by hand must not be lost; running a command again must work in every format."""
    mask, model = tmp_path / name, tiny_model
    if mask.suffix == ".png":
        scan, model = save_image(tmp_path / "scan.png"), make_model(tmp_path / "flat", tiny_config(**FLAT))
    else:
        scan = series(tmp_path / "scan") if mask.suffix == ".dcm" else save(tmp_path / "scan.nii.gz")
    for seed in (0, 1):
        (result,) = run([scan], model, output=mask, seed=seed)
        assert result.status == "done", result.error
    drawn = tmp_path / "drawn" / name
    drawn.parent.mkdir()
    if mask.suffix == ".dcm":
        file = pydicom.dcmread(mask)
        file.Manufacturer = "QIICR"
        file.save_as(drawn)
    else:
        write_labels(read_labels(mask).data[0], replace(read_labels(mask), header=Header()), drawn)
    for part in drawn.parent.iterdir():
        part.replace(tmp_path / part.name)
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(UsageError, match=f"^{re.escape(str(mask))}: {FOREIGN} with --skip-existing$"):
        run([scan], model, output=mask, report=tmp_path / "page.html")
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_maps_of_the_mask_that_is_replaced_are_not_left(tmp_path: Path, tiny_model: Path) -> None:
    """They would count as those of the new mask, in evaluations and for readers; no other file is removed."""
    scan, kinds = save(tmp_path / "scan.nii.gz"), ("probabilities", "uncertainty", "members")
    asked = {f"save_{kind}": True for kind in kinds}
    (first,) = run([scan], tiny_model, ensemble=2, save_pseudo_labels=True, **asked)
    run([scan], tiny_model, output=tmp_path / "scan.nrrd")
    assert all(first.outputs[kind].is_file() for kind in kinds), "the mask that they are of is not replaced"
    save(first.outputs["members"])
    run([scan], tiny_model, seed=1, save_uncertainty=True)
    left = [kind for kind in (*kinds, "pseudo-labels") if first.outputs[kind].is_file()]
    assert left == ["uncertainty", "members", "pseudo-labels"], "members of another program stay"


def test_a_foreign_mask_is_left_by_skip_existing_and_concerns_its_part_alone(tmp_path: Path, tiny_model: Path) -> None:
    scans = [save(tmp_path / f"{name}.nii.gz") for name in "abcd"]
    mask = save(tmp_path / "a_seg.nii.gz", np.ones((11, 13, 9), np.uint8))
    before = mask.read_bytes()
    parts = [set(part_of({scan: {} for scan in scans}, (i, 2))) for i in (1, 2)]
    other = 2 if scans[0] in parts[0] else 1
    results = [*run(scans, tiny_model, shard=(other, 2)), *run(scans, tiny_model, skip_existing=True)]
    assert {result.status for result in results} == {"done", "skipped"} and mask.read_bytes() == before
    with pytest.raises(UsageError, match=r"a_seg\.nii\.gz: a file that medseg did not write"):
        run(scans, tiny_model)


def test_a_damaged_file_is_no_mask_of_medseg_and_an_empty_one_is_replaced(tmp_path: Path, tiny_model: Path) -> None:
    """Results appear whole, so half a file comes from elsewhere; a command that is given a fresh ``mktemp`` works."""
    scan, mask = save(tmp_path / "scan.nii.gz"), tmp_path / "mask.nii.gz"
    for content in (b"half a file", save(tmp_path / "other.nii.gz").read_bytes()[:100]):
        mask.write_bytes(content)
        with pytest.raises(UsageError, match="a file that medseg did not write"):
            run([scan], tiny_model, output=mask)
        assert mask.read_bytes() == content
    mask.write_bytes(b"")
    (result,) = run([scan], tiny_model, output=mask)
    assert result.status == "done" and mask.stat().st_size


def test_a_missing_or_damaged_model(tmp_path: Path, tiny_model: Path) -> None:
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


def test_a_shorter_walk_is_reported(tmp_path: Path, tiny_model: Path) -> None:
    (result,) = run([save(tmp_path / "scan.nii.gz")], tiny_model, steps=400)
    (note,) = result.warnings
    assert "400 steps asked for" in note


def test_options_are_frozen() -> None:
    assert replace(SegmentOptions(), ensemble=3).ensemble == 3


# ---- ensembles and calibration ---------------------------------------------------------------------------------------


def test_unusual_disagreement_is_flagged(tmp_path: Path, tiny_model: Path) -> None:
    scan = save(tmp_path / "scan.nii.gz")
    for bound, quality in ((0.0, "usual"), (1.0, "check")):
        path = calibrated(tiny_model, tmp_path / quality, agreement=bound)
        (result,) = run([scan], path, ensemble=3, statistics=True)
        statistics = json.loads(result.outputs["statistics"].read_text())
        assert statistics["quality"] == result.quality == quality
        assert 0 <= statistics["classes"]["bright"]["pairwise_dice"] <= 1
        assert any("agree less than is usual" in note for note in result.warnings) == (quality == "check")


def test_intervals_are_those_of_the_errors_on_calibration_patients(tmp_path: Path, tiny_model: Path) -> None:
    path = calibrated(tiny_model, tmp_path / "model", volume_errors=[math.log(1.5)], level=0.9)
    for ensemble, level in ((3, 0.9), (1, None)):
        (result,) = run([save(tmp_path / "scan.nii.gz")], path, ensemble=ensemble, statistics=True)
        assert result.level == level
        statistics = json.loads(result.outputs["statistics"].read_text())
        found = statistics["classes"]["bright"]
        if level is None:
            assert "interval_ml" not in found and "interval_level" not in statistics
            assert any("the model's calibration is for dpm++ with 2 steps, 3 members" in w for w in result.warnings)
            continue
        unit = abs(np.linalg.det(OBLIQUE[:3, :3])) / 1000
        low, high = (found["volume_ml"] + unit) / 1.5 - unit, (found["volume_ml"] + unit) * 1.5 - unit
        assert found["interval_ml"] == pytest.approx([low, high], abs=1e-3)
        assert statistics["interval_level"] == 0.9 and "members_ml" in found
    report = tmp_path / "report.html"
    run([tmp_path / "scan.nii.gz"], path, ensemble=3, report=report)
    assert "90 % interval" in report.read_text() and "Sampled masks" in report.read_text()
    command = ["segment", str(tmp_path / "scan.nii.gz"), "-m", str(path), "--ensemble", "3", "--verbose"]
    shown = CliRunner().invoke(app, command)
    assert "(90 %: " in shown.output


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


def test_members_and_other_uncertainties_are_written_on_the_grid_of_the_scan(tmp_path: Path, tiny_model: Path) -> None:
    scan = save(tmp_path / "scan.nii.gz")
    (result,) = run(
        [scan], tiny_model, ensemble=3, save_members=True, save_uncertainty=True, uncertainty="mutual-information"
    )
    members = nib.load(result.outputs["members"])
    assert members.shape == (11, 13, 9, 3) and members.get_data_dtype() == np.uint8
    np.testing.assert_allclose(members.affine, nib.load(scan).affine, atol=1e-6)
    volume = read_volume(scan)
    whole = load_segmenter(tiny_model, "cpu", ensemble=3)
    found = whole.segment(volume, derive_seed(0, "scan"), maps=["uncertainty"])
    np.testing.assert_array_equal(members.get_fdata().transpose(3, 0, 1, 2), whole.aggregation.members_on_scan(found))
    disagreement = nib.load(result.outputs["uncertainty"]).get_fdata()
    assert 0 < disagreement.max() <= 1
    assert (disagreement <= found.uncertainty.numpy() + 1e-5).all(), "at most the whole entropy"
