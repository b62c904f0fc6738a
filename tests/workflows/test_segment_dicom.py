"""`medseg segment` with DICOM in and out, and the statistics of a scan."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
import torch
from medseg_cli.main import app
from pydicom.sr._concepts_dict import concepts
from typer.testing import CliRunner

from medseg_diffusion.config.load import load_config
from medseg_diffusion.models import segmentation
from medseg_diffusion.models.load import load_segmenter
from medseg_diffusion.models.store import list_models, load_card
from medseg_diffusion.volumes.io import maker_of, read_labels, read_volume
from tests.helpers.cli import error_lines, medseg
from tests.helpers.dicom_series import series
from tests.helpers.segmenters import make_model, run, save, tiny_config

SEGMENTERS = [info.name for info in list_models() if load_card(info.path)["task"] == "mask"]


def labels_of(path: Path, like: Path) -> np.ndarray:
    """The labels of a DICOM segmentation on the grid of a scan, read by highdicom."""
    volume, read = read_volume(like), highdicom.seg.segread(path).get_volume(combine_segments=True)
    index = np.argwhere(read.array > 0)
    ras = (np.c_[index, np.ones(len(index))] @ read.affine.T) * [-1, -1, 1, 1]
    labels = np.zeros(volume.shape, int)
    labels[tuple(np.rint(ras @ np.linalg.inv(volume.affine).T)[:, :3].astype(int).T)] = read.array[tuple(index.T)]
    return labels


def test_both_formats_hold_the_same_mask(tmp_path: Path, tiny_model: Path) -> None:
    scan = series(tmp_path / "scan")
    (nifti,) = run([scan], tiny_model, ensemble=2, output=tmp_path / "nifti")
    expected = read_labels(nifti.outputs["segmentation"]).data[0].numpy()
    assert 0 < (expected > 0).mean() < 1
    for output, options in (
        (None, {"output_format": "dicom-seg"}),
        (tmp_path / "out", {"output_format": "dicom-seg"}),
        (tmp_path / "named" / "x.DCM", {}),
    ):
        (result,) = run([scan], tiny_model, ensemble=2, output=output, save_probabilities=True, **options)
        assert result.status == "done", result.error
        named = {None: tmp_path / "scan_seg.dcm"}.get(output, output)
        path = result.outputs["segmentation"]
        assert path == (named / "scan_seg.dcm" if output == tmp_path / "out" else named)
        assert result.outputs["probabilities"].parent == path.parent
        np.testing.assert_array_equal(labels_of(path, scan), expected)
    segment = pydicom.dcmread(path).SegmentSequence[0]
    assert segment.SegmentLabel == "bright" and segment.SegmentAlgorithmName == tiny_model.name
    assert "ensemble=2" in segment.SegmentationAlgorithmIdentificationSequence[0].AlgorithmParameters
    before = path.read_bytes()
    (again,) = run([scan], tiny_model, output=tmp_path / "named" / "x.DCM", skip_existing=True)
    assert again.status == "skipped" and path.read_bytes() == before


def test_codes_are_those_of_the_model(tmp_path: Path) -> None:
    codes = {"bright": {"category": [49755003, "SCT", "Morphologically Abnormal Structure"],
                        "type": [52988006, "SCT", "Lesion"], "region": [12738006, "SCT", "Brain"]}}  # fmt: skip
    model = make_model(tmp_path / "model", tiny_config(data={"window": [8, 8, 8], "codes": codes}), labels=3)
    (result,) = run([series(tmp_path / "scan")], model, output=tmp_path / "x.dcm")
    coded, private = pydicom.dcmread(result.outputs["segmentation"]).SegmentSequence
    assert coded.SegmentedPropertyTypeCodeSequence[0].CodeValue == "52988006"
    assert coded.AnatomicRegionSequence[0].CodeMeaning == "Brain"
    assert private.SegmentedPropertyTypeCodeSequence[0].CodingSchemeDesignator == "99MEDSEG"


def test_an_empty_mask_is_written_and_said(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = series(tmp_path / "scan")
    monkeypatch.setattr(segmentation, "labels_of", lambda part: torch.zeros(part.shape, dtype=torch.uint8))
    (result,) = run([scan], tiny_model, output_format="dicom-seg", statistics=True)
    assert result.status == "done" and any("nothing was found" in warning for warning in result.warnings)
    file = pydicom.dcmread(tmp_path / "scan_seg.dcm")
    assert file.NumberOfFrames == 6 and not file.pixel_array.any()
    text = (tmp_path / "scan_statistics.json").read_text()
    assert json.loads(text)["classes"]["bright"] == {
        "label": 1, "volume_ml": 0.0, "voxels": 0, "extent_mm": None, "centroid_ras_mm": None, "touches_border": False,
        "intensity": {"T1": {"mean": None, "sd": None}},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "dicom-seg"], "scan.nii.gz: is no DICOM series"),
        (["-o", "x.dcm"], "scan.nii.gz: is no DICOM series"),
        (["--format", "nifti", "-o", "x.dcm"], "--format nifti does not write .dcm"),
        (["--format", "dicom-seg", "-o", "x.nii.gz"], "--format dicom-seg writes .dcm"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(
    arguments: list[str], message: str, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("medseg_diffusion.workflows.segment._load", lambda options: pytest.fail("the model was loaded"))
    result = medseg("segment", save(tmp_path / "scan.nii.gz"), "-m", tiny_model, *arguments)
    (line,) = error_lines(result)
    assert result.exit_code == 2 and message in line
    assert [path.name for path in tmp_path.iterdir()] == ["scan.nii.gz"]


def test_mask_and_maps_name_the_same_maker(tmp_path: Path, tiny_model: Path) -> None:
    """In DICOM and NIfTI, so that evaluations use the probabilities; also of a name that NIfTI has no room for."""
    model = tmp_path / f"Modèle{9 * ' long'}"
    shutil.copytree(tiny_model, model)
    (result,) = run([series(tmp_path / "scan")], model, output_format="dicom-seg", save_probabilities=True)
    makers = {maker_of(result.outputs[kind]) for kind in ("segmentation", "probabilities")}
    assert len(makers) == 1 and makers.pop().startswith("medseg-diffusion Mod?le long")


def test_a_series_without_frame_of_reference_fails_before_the_computation(tmp_path: Path, tiny_model: Path) -> None:
    scan = series(tmp_path / "scan", FrameOfReferenceUID=None)
    (result,) = run([scan], tiny_model, output_format="dicom-seg", save_probabilities=True)
    assert (result.status, result.exit_code) == ("failed", 3)
    assert "found images without FrameOfReferenceUID" in str(result.error)
    assert [path.name for path in tmp_path.iterdir()] == ["scan"]


@pytest.mark.parametrize("name", SEGMENTERS)
def test_codes_of_shipped_models_are_those_of_snomed(name: str) -> None:
    """As the tables of pydicom list them, with their meanings; every class has one."""
    known = {
        (value, meaning) for entry in concepts["SCT"].values() for value, (meaning, _) in entry.items()
    }  # fmt: skip
    model = load_segmenter(name, device="cpu")
    codes = model.config.data.codes
    assert list(codes) == [label for value, label in model.labels.items() if value]
    for one in codes.values():
        for value, scheme, meaning in (one.category, one.type, *one.modifiers, *([one.region] if one.region else [])):
            assert scheme == "SCT" and (value, meaning) in known


def test_presets_and_shipped_models_agree() -> None:
    for preset, name in (
        ("ensemdiff-brain-tissue-small", "brain-tissue-t1"),
        ("baseline-hippocampus-small", "hippocampus-t1"),
        ("medsegdiff-lung-nodule-small", "lung-nodule-ct"),
    ):
        assert load_config(preset).data.codes == load_segmenter(name, device="cpu").config.data.codes


def test_statistics_of_every_class_and_channel(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", tiny_config(data={"window": [8, 8, 8], "channels": 2}), labels=3)
    data = np.random.default_rng(0).normal(50, 9, (11, 13, 9, 2)).astype(np.float32)
    (result,) = run([save(tmp_path / "scan.nii.gz", data)], model, statistics=True)
    labels = read_labels(result.outputs["segmentation"]).data[0].numpy()
    classes = json.loads(result.outputs["statistics"].read_text())["classes"]
    assert list(classes) == ["bright", "dark"]
    for value, name in ((1, "bright"), (2, "dark")):
        found = classes[name]
        assert found["voxels"] == (labels == value).sum() > 0
        assert list(found["extent_mm"]) == list(found["centroid_ras_mm"]) == ["R", "A", "S"]
        assert list(found["intensity"]) == ["T1", "FLAIR"]
        for channel, both in enumerate(found["intensity"].values()):
            inside = data[..., channel][labels == value]
            assert both["mean"] == pytest.approx(inside.mean(), rel=1e-4)
            assert both["sd"] == pytest.approx(inside.std(), rel=1e-4)
        assert found["touches_border"] == bool(
            any((np.moveaxis(labels, axis, 0)[[0, -1]] == value).any() for axis in range(3))
        )


@pytest.mark.data
def test_a_real_series_in_and_out(data_folder: Path, tmp_path: Path) -> None:
    scan = data_folder / "dicom" / "hippocampus_crop"
    masks = {}
    for output in ("x.nii.gz", "x.dcm"):
        command = ["segment", str(scan), "-m", "hippocampus-t1", "-o", str(tmp_path / output), "--device", "cpu"]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
    masks = [read_labels(tmp_path / "x.nii.gz").data[0].numpy(), labels_of(tmp_path / "x.dcm", scan)]
    np.testing.assert_array_equal(*masks)
    file = pydicom.dcmread(tmp_path / "x.dcm")
    modifiers = [
        one.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence[0].CodeMeaning
        for one in file.SegmentSequence
    ]
    assert modifiers == ["Anterior", "Posterior"] and len(file.SourceImageSequence) == 32
