"""`medseg anomaly` from scans to maps and masks: thresholds, filters and bad input."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from medseg_cli.main import app
from PIL import Image
from typer.testing import CliRunner

from medseg_diffusion.data.healthy import find_healthy
from medseg_diffusion.errors import InputError, UsageError
from medseg_diffusion.models.anomaly import AnomalyModel, DetectionOptions
from medseg_diffusion.models.anomaly_map import AnomalyMap, mask_of
from medseg_diffusion.volumes.io import read_volume
from medseg_diffusion.workflows.anomaly import AnomalyOptions, anomaly, chosen_threshold, parse_threshold
from medseg_diffusion.workflows.calibrate_anomaly import CalibrationOptions, calibrate_anomaly
from medseg_diffusion.workflows.train_anomaly import train_anomaly
from tests.helpers.anomaly import head, small_config, write


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("latent", "latent-healing"),
        ("latent", "reconstruction"),
        ("pixel", "partial-noise"),
        ("patched", "patched"),
        ("classes", "classifier-guided"),
        ("classes", "counterfactual"),
    ],
)
def test_every_detector_from_scan_to_mask(name, method, anomaly_scans, anomaly_models, tmp_path: Path) -> None:
    scan = anomaly_scans / "images" / "s0.nii.gz"
    command = [
        "anomaly",
        str(scan),
        "-m",
        str(anomaly_models[name]),
        "--method",
        method,
        "-o",
        str(tmp_path),
        "--device",
        "cpu",
    ]
    result = CliRunner().invoke(app, [*command, "--preview"])
    assert result.exit_code == 0, result.output
    score, mask = (nib.load(tmp_path / f"s0_anomaly{end}.nii.gz") for end in ("", "_mask"))
    assert score.shape == mask.shape == (20, 24, 12) and mask.get_data_dtype() == np.uint8
    about = json.loads((tmp_path / "s0_anomaly.json").read_text())
    assert about["method"] == method and about["threshold_from"] == "auto"
    values = score.get_fdata()
    assert values.min() >= 0 and values.max() > 0
    expected = values > about["threshold"]
    # The stored threshold is rounded.
    assert (np.asarray(mask.dataobj) != expected).mean() < 1e-3
    assert 0 <= about["healthy_percentile"] <= 100 and about["healthy_scans"] == 2
    assert about["healthy_false_positive_rate"] <= 0.025 + 1e-6
    assert (tmp_path / "s0_anomaly_preview.png").read_bytes()[:4] == b"\x89PNG"
    again = CliRunner().invoke(app, [*command, "--skip-existing"])
    assert again.exit_code == 0 and "exists, skipped" in again.output


def test_thresholds_of_all_kinds(anomaly_scans, anomaly_models, tmp_path: Path) -> None:
    scan = anomaly_scans / "images" / "s1.nii.gz"
    sizes = {}
    for threshold in ("q0.5", "q0.9", "auto", "q0.999", "1e9"):
        options = AnomalyOptions(str(anomaly_models["pixel"]), threshold, output=tmp_path / threshold, device="cpu")
        assert [case.status for case in anomaly([scan], options)] == ["done"]
        about = json.loads((tmp_path / threshold / "s1_anomaly.json").read_text())
        sizes[threshold] = about["share_of_foreground"]
        assert about["threshold_from"] == (threshold if threshold != "1e9" else "given")
    assert list(sizes.values()) == sorted(sizes.values(), reverse=True) and sizes["1e9"] == 0 and sizes["q0.5"] > 0.2
    for wrong in ("q1.5", "high", "nan", "q", "inf"):
        with pytest.raises(UsageError, match="expected auto, a quantile such as"):
            parse_threshold(wrong)


def test_small_parts_and_filtered_maps(anomaly_scans, other_scans, anomaly_models, tmp_path: Path) -> None:
    score = torch.zeros(8, 8, 8)
    score[0, 0, 0] = score[1, 1, 1] = 2.0  # two voxels that touch at a corner
    score[4:6, 4:6, 4] = 2.0
    score[7, 7, 7] = 1.0  # not above the threshold
    score[7, 0, 0] = 9.0  # outside
    inside = torch.ones(8, 8, 8, dtype=torch.bool)
    inside[7, 0, 0] = False
    found = AnomalyMap(score, inside, 2.0, 0)
    for smallest, voxel, count in ((0, 1, 6), (2, 1, 6), (3, 1, 4), (3, 2, 6), (9, 2, 0)):
        assert int(mask_of(found, 1.0, voxel, smallest).sum()) == count
    options = AnomalyOptions(
        str(anomaly_models["pixel"]), detection=DetectionOptions(median=3), output=tmp_path, device="cpu"
    )
    (case,) = anomaly([anomaly_scans / "images" / "s1.nii.gz"], options)
    assert case.warnings[0].startswith("the model was calibrated with another median: healthy quantiles do not hold")
    # What the file says of healthy scans would be of another map.
    about = json.loads((options.output / "s1_anomaly.json").read_text())  # type: ignore[operator]
    assert about["score"] > 0 and not [key for key in about if key.startswith("healthy")]
    found = calibrate_anomaly(
        anomaly_models["pixel"],
        other_scans,
        tmp_path / "new",
        CalibrationOptions(2, detection=DetectionOptions(median=3)),
        device="cpu",
    )
    model = AnomalyModel(found.model, device="cpu")
    assert model.config.postprocessing.median == 3 and not model.notes
    assert AnomalyModel(found.model, DetectionOptions(median=1), "cpu").notes
    with pytest.raises(UsageError, match="--median 4"):
        AnomalyModel(anomaly_models["pixel"], DetectionOptions(median=4), "cpu")
    with pytest.raises(UsageError, match="--latent-quantile is for latent-healing"):
        AnomalyModel(anomaly_models["pixel"], DetectionOptions(latent_quantile=0.9), "cpu")


def test_the_latent_quantile_moves_what_is_healed_and_the_threshold_does_not(anomaly_scans, anomaly_models) -> None:
    volume = read_volume(anomaly_scans / "images" / "s1.nii.gz")
    loose, strict = (
        AnomalyModel(anomaly_models["latent"], DetectionOptions(latent_quantile=quantile), "cpu").score(volume, 1).score
        for quantile in (0.5, 0.99)
    )
    assert int((loose > 0).sum()) > int((strict > 0).sum())
    models_of = [
        AnomalyModel(anomaly_models["latent"], DetectionOptions(latent_quantile=quantile), "cpu")
        for quantile in (0.5, 0.99)
    ]
    thresholds = [chosen_threshold("auto", model) for model in models_of]
    assert (
        thresholds[0]
        == thresholds[1]
        == AnomalyModel(anomaly_models["latent"], device="cpu").healthy_scores().automatic
    )  # type: ignore[union-attr]


def test_what_is_written_can_be_evaluated_as_it_lies(anomaly_scans, anomaly_models, tmp_path: Path) -> None:
    options = AnomalyOptions(str(anomaly_models["pixel"]), output=tmp_path / "found", device="cpu")
    anomaly([anomaly_scans / "images"], options)
    command = ["evaluate", str(tmp_path / "found"), str(anomaly_scans / "labels"), "-o", str(tmp_path / "report")]
    result = CliRunner().invoke(app, [*command, "--scores", str(tmp_path / "found"), "--json"])
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "report" / "summary.json").read_text())
    assert len(summary["metric_per_case"]) == 8
    assert "inside the foreground masks" in json.dumps(summary)


def test_a_picture_is_no_scan(anomaly_scans, anomaly_models, tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32), np.uint8)).save(tmp_path / "p.png")
    command = ["anomaly", str(tmp_path / "p.png"), "-m", str(anomaly_models["pixel"]), "--device", "cpu"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 3 and "found a 2D picture; expected a volume" in result.stderr
    with pytest.raises(InputError, match="a 2D picture"):
        find_healthy(tmp_path)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((20, 24, 12), 7, np.float32), "the constant value 7"),
        (np.zeros((20, 24), np.float32), "a 2D image"),
        (np.random.default_rng(0).random((20, 24, 12, 2)).astype(np.float32), "a 4D image"),
        (np.where(np.arange(12) == 3, np.nan, np.ones((20, 24, 12))).astype(np.float32), "NaN or infinite voxels"),
    ],
)
def test_bad_scans_are_one_line_and_code_3(array, message, anomaly_models, tmp_path: Path) -> None:
    bad = write(tmp_path / "bad.nii.gz", array)
    result = CliRunner().invoke(app, ["anomaly", str(bad), "-m", str(anomaly_models["pixel"]), "--device", "cpu"])
    assert result.exit_code == 3 and message in result.stderr and len(result.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["bad.nii.gz"]


def test_one_bad_scan_stops_no_other(
    anomaly_scans, anomaly_models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where failures.csv is written without -o
    write(tmp_path / "a.nii.gz", np.full((4, 4, 4), 1, np.float32))
    write(tmp_path / "b.nii.gz", head(3)[0])
    result = CliRunner().invoke(app, ["anomaly", str(tmp_path), "-m", str(anomaly_models["pixel"]), "--device", "cpu"])
    assert result.exit_code == 1 and "1 of 2 scans failed" in result.stderr
    assert (tmp_path / "b_anomaly_mask.nii.gz").exists() and not (tmp_path / "a_anomaly_mask.nii.gz").exists()


@pytest.mark.parametrize("kind", ["mask", "map"])
def test_masks_and_maps_of_others_are_not_replaced(kind, anomaly_models, tmp_path: Path) -> None:
    """A lesion mask that was drawn by hand must not be lost; running a command again must work."""
    scan = write(tmp_path / "scan.nii.gz", head(3)[0])
    options = AnomalyOptions(str(anomaly_models["pixel"]), output=tmp_path / "lesion.nii.gz", device="cpu")
    for _ in range(2):
        (result,) = anomaly([scan], options)
        assert result.status == "done", result.error
    drawn = write(result.outputs[kind], head(3)[1])
    before = drawn.read_bytes()
    with pytest.raises(UsageError, match=f"{drawn.name}: a file that medseg did not write"):
        anomaly([scan], options)
    assert drawn.read_bytes() == before


def test_whole_volumes(tmp_path: Path) -> None:
    for i in range(6):
        write(tmp_path / "scans" / f"v{i}.nii.gz", head(i, shape=(12, 14, 10))[0])
    config = small_config("pixel", size=[16, 16, 12])
    model = train_anomaly(config, tmp_path / "scans", tmp_path / "run", device="cpu").model
    sick, _ = head(9, slice(3, 7), shape=(14, 16, 11))
    found = AnomalyModel(model, device="cpu").score(read_volume(write(tmp_path / "sick.nii.gz", sick)))
    assert found.score.shape == (14, 16, 11) and found.evaluations == 2
    large = write(tmp_path / "large.nii.gz", head(9, shape=(18, 16, 11))[0])
    (case,) = anomaly([large], AnomalyOptions(str(model), device="cpu"))
    assert case.exit_code == 3 and "found 18 x 16 x 11 voxels on the model's grid; expected 4 x 4 x 3 to 16" in str(
        case.error
    )
    thin = write(tmp_path / "thin.nii.gz", head(9, shape=(12, 14, 2))[0])
    (case,) = anomaly([thin], AnomalyOptions(str(model), device="cpu"))
    assert case.exit_code == 3 and "found 12 x 14 x 2 voxels" in str(case.error)


def test_parts_of_the_scans_give_the_files_of_all_and_list_their_failures(
    anomaly_scans: Path, anomaly_models: dict[str, Path], tmp_path: Path
) -> None:
    scans = tmp_path / "scans"
    for i in range(3):
        write(scans / f"s{i}.nii.gz", head(i)[0])
    (scans / "bad.nii.gz").write_bytes(b"no scan")
    command = ["anomaly", str(scans), "-m", str(anomaly_models["pixel"]), "--device", "cpu", "-o"]
    assert CliRunner().invoke(app, [*command, str(tmp_path / "all")]).exit_code == 1
    for part in ("1/2", "2/2"):
        CliRunner().invoke(app, [*command, str(tmp_path / "parts"), "--shard", part])

    def files(folder: str) -> dict[str, bytes]:
        found = {path.name: path.read_bytes() for path in (tmp_path / folder).glob("s*.nii.gz")}
        assert len(found) == 9
        return found

    assert files("all") == files("parts")
    (listed,) = (tmp_path / "parts").glob("failures.*-of-2.csv")
    assert (
        listed.read_text() == (tmp_path / "all" / "failures.csv").read_text() and "bad.nii.gz,3," in listed.read_text()
    )
