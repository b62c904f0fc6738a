"""`medseg calibrate-anomaly`: a trained model with new thresholds and settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from medseg_cli.main import app
from typer.testing import CliRunner

from medseg_diffusion.data.cases import digest
from medseg_diffusion.errors import InputError, UsageError
from medseg_diffusion.models.anomaly import AnomalyModel, DetectionOptions
from medseg_diffusion.models.store import load_model_files, save_model
from medseg_diffusion.volumes.io import read_volume
from medseg_diffusion.workflows.calibrate_anomaly import CalibrationOptions, calibrate_anomaly
from tests.helpers.anomaly import head, write


def test_a_scan_without_a_healthy_slice_is_left_out_of_the_calibration(
    anomaly_scans, anomaly_models, tmp_path: Path
) -> None:
    for i, lesion in enumerate((slice(0, 12), slice(4, 7))):
        image, label = head(20 + i, lesion)
        write(tmp_path / "more" / "images" / f"m{i}.nii.gz", image)
        write(tmp_path / "more" / "labels" / f"m{i}.nii.gz", label)
    found = calibrate_anomaly(
        anomaly_models["latent"], tmp_path / "more", tmp_path / "new", CalibrationOptions(1), device="cpu"
    )
    assert {len(one.scan_scores) for one in found.calibration.values()} == {1}


@pytest.mark.parametrize(
    "name", ["pixel", *(pytest.param(name, marks=pytest.mark.slow) for name in ("latent", "patched", "classes"))]
)
def test_bright_residuals_are_those_of_what_is_brighter(
    name, anomaly_scans, other_scans, anomaly_models, tmp_path: Path
) -> None:
    # Both are calibrated on the same scans: of latent healing the mask depends on them.
    absolute, bright = (
        calibrate_anomaly(
            anomaly_models[name],
            other_scans,
            tmp_path / kind,
            CalibrationOptions(2, overrides=[f"residual={kind}"]),
            device="cpu",
        )
        for kind in ("absolute", "bright")
    )
    volume = read_volume(anomaly_scans / "images" / "s1.nii.gz")
    for method in bright.calibration:
        both, brighter = (AnomalyModel(one.model, DetectionOptions(method), "cpu") for one in (absolute, bright))
        assert brighter.config.residual == "bright" and brighter.config.postprocessing.median == 1
        one, other = both.score(volume, 1).score, brighter.score(volume, 1).score
        assert bool((other <= one + 1e-6).all()) and 0 < float(other.sum()) < float(one.sum())


def test_calibration_changes_what_the_networks_do_not_depend_on(other_scans, anomaly_models, tmp_path: Path) -> None:
    options = CalibrationOptions(2, overrides=["partial_noise.start=50", "quantile=0.9"])
    found = calibrate_anomaly(anomaly_models["pixel"], other_scans, tmp_path / "new", options, device="cpu")
    config = AnomalyModel(found.model, device="cpu").config
    assert (config.partial_noise.start, config.quantile) == (50, 0.9)
    for override, message in (
        ("generator.network.channels=8", "calibration changes residual, latent_healing"),
        ("partial_noise.star=50", "unknown key partial_noise.star; did you mean start"),
        ("residual=dark", "residual: "),
    ):
        with pytest.raises(UsageError, match=message):
            options = CalibrationOptions(2, overrides=[override])
            calibrate_anomaly(anomaly_models["pixel"], other_scans, tmp_path / "no", options, device="cpu")
    assert not (tmp_path / "no").exists()


def test_a_model_without_calibration_asks_for_it_and_gets_it(
    anomaly_scans, other_scans, anomaly_models, tmp_path: Path
) -> None:
    saved = load_model_files(anomaly_models["pixel"])
    card = {key: value for key, value in saved.card.items() if key != "calibration"}
    save_model(tmp_path / "bare", card, saved.weights, "")
    command = ["anomaly", str(anomaly_scans / "images" / "s0.nii.gz"), "-m", str(tmp_path / "bare"), "--device", "cpu"]
    result = CliRunner().invoke(app, [*command, "-o", str(tmp_path / "out")])
    assert result.exit_code == 4 and "not calibrated for partial-noise; calibrate it with" in result.stderr
    assert not (tmp_path / "out").exists()
    assert CliRunner().invoke(app, [*command, "-o", str(tmp_path / "out"), "--threshold", "0.5"]).exit_code == 0
    with pytest.raises(InputError, match="labelled voxels"):
        calibrate_anomaly(tmp_path / "bare", other_scans, tmp_path / "new", device="cpu")
    found = calibrate_anomaly(
        tmp_path / "bare", other_scans, tmp_path / "new", CalibrationOptions(2, 0.9), device="cpu"
    )
    assert found.calibration["partial-noise"].rate == pytest.approx(0.1, abs=0.01)
    model = AnomalyModel(tmp_path / "new", device="cpu")
    assert model.healthy_scores() is not None and model.config.quantile == 0.9
    with pytest.raises(UsageError, match="exists; choose a new folder"):
        calibrate_anomaly(tmp_path / "bare", other_scans, tmp_path / "new", CalibrationOptions(2), device="cpu")


def test_scans_of_the_training_are_refused(anomaly_scans, other_scans, anomaly_models, tmp_path: Path) -> None:
    """Their scores are lower than those of other patients, so that a threshold of them would be too low."""
    saved = load_model_files(anomaly_models["pixel"])
    splits = json.loads((anomaly_models["pixel"].parent / "split.json").read_text())
    names = [name for name, side in splits.items() if side == "train"] if "train" not in splits else splits["train"]
    assert set(saved.card["training"]["trained_on"]) == {digest(name) for name in names} and len(names) == 4
    with pytest.raises(InputError, match=r"a scan of a name that the model was trained on and 3 more; .* take it out"):
        calibrate_anomaly(anomaly_models["pixel"], anomaly_scans, tmp_path / "no", CalibrationOptions(2), device="cpu")
    for path in anomaly_scans.glob("*/*"):  # the scans that were held out
        if path.name.partition(".")[0] not in names:
            copy = tmp_path / "held-out" / path.parent.name / path.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    found = calibrate_anomaly(
        anomaly_models["pixel"], tmp_path / "held-out", tmp_path / "new", CalibrationOptions(2), device="cpu"
    )
    assert load_model_files(found.model).card["training"]["trained_on"] == saved.card["training"]["trained_on"]
    old = {**saved.card, "training": {k: v for k, v in saved.card["training"].items() if k != "trained_on"}}
    save_model(tmp_path / "old", old, saved.weights, "")
    with pytest.warns(UserWarning, match="does not say which scans it was trained on; make sure that none of them"):
        calibrate_anomaly(tmp_path / "old", other_scans, tmp_path / "of-old", CalibrationOptions(2), device="cpu")
