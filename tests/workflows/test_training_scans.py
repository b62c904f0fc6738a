"""Trainings store what they have seen, and scans that are unlike it are marked in every output and stay so."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from medseg_cli.main import app
from typer.testing import CliRunner

from medseg_diffusion import load_model
from medseg_diffusion.config.segmenter import SegmenterConfig
from medseg_diffusion.data.brain_classes import STRUCTURES, TISSUES
from medseg_diffusion.data.healthy import find_healthy
from medseg_diffusion.data.label_maps import load_label_map
from medseg_diffusion.data.synthetic_brains import SynthesisConfig
from medseg_diffusion.errors import ModelError, UsageError
from medseg_diffusion.methods.seen import FEWEST_SCANS, SEEN, MeasuredMask
from medseg_diffusion.models.load import load_segmenter
from medseg_diffusion.models.store import load_card, load_model_files, replace_card, save_model
from medseg_diffusion.volumes.io import read_volume
from medseg_diffusion.workflows import training_scans
from medseg_diffusion.workflows.anomaly import AnomalyOptions, anomaly
from medseg_diffusion.workflows.training_scans import (
    MOST_SCANS,
    seen_in_healthy,
    seen_in_label_maps,
    spread,
    store_seen,
)
from tests.helpers import training
from tests.helpers.anomaly import small_config
from tests.helpers.brains import write_label_maps
from tests.helpers.segmenters import (
    FLAT,
    calibrated,
    make_model,
    run,
    save,
    save_image,
    structures_model,
    tiny_config,
    with_seen,
)

SPACING = {"R": [1.0, 1.2], "A": [1.0, 1.2], "S": [2.0, 2.0]}


def row(file: Path, scan: str) -> dict[str, str]:
    with file.open(newline="") as lines:
        return next(row for row in csv.DictReader(lines) if Path(row["scan"]).name == scan)


# ---- what is said of a scan ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "phrase"),
    [
        ({"voxel_mm": {"S": [0.5, 1.0]}}, "voxels of 2.01 mm along S (trained on 0.5 to 1 mm)"),
        ({"field_of_view_mm": {"A": [150, 250]}}, "a field of view of 15 mm along A (trained on 150 to 250 mm)"),
        ({"intensity": [{"q50": [0.6, 0.7]}]}, "other intensities: median "),
        ({"classes": {"bright": {"volume_ml": [100.0, 120.0], "image_share": [0, 1]}}}, "bright of "),
    ],
)
def test_each_kind_of_doubt_is_one_line_and_leaves_no_interval(
    entry: dict[str, Any], phrase: str, tmp_path: Path, tiny_model: Path
) -> None:
    model = with_seen(calibrated(tiny_model, tmp_path / "known"), **entry)
    (result,) = run([save(tmp_path / "scan.nii.gz")], model, ensemble=3, statistics=True)
    assert (result.status, result.exit_code, result.quality, result.flags) == ("done", 0, "check", ("unlike training",))
    (warning,) = result.warnings
    assert warning.startswith(f"unlike the training scans: {phrase}") and warning.endswith("; no interval is given")
    assert result.intervals_ml == {} and result.level is None and result.members_ml
    statistics = json.loads(result.outputs["statistics"].read_text())
    assert statistics["unlike_training"] == warning and statistics["quality"] == "check"
    assert "interval_ml" not in statistics["classes"]["bright"] and "interval_level" not in statistics
    found = load_model(model, "cpu", ensemble=3).segment(tmp_path / "scan.nii.gz")
    assert (found.quality, found.intervals_ml, found.unlike_training) == ("check", {}, warning)
    assert warning in found.warnings


def test_a_scan_within_the_ranges_keeps_its_interval(tmp_path: Path, tiny_model: Path) -> None:
    model = with_seen(calibrated(tiny_model, tmp_path / "known"), voxel_mm=SPACING)
    (result,) = run([save(tmp_path / "scan.nii.gz")], model, ensemble=3, statistics=True)
    assert (result.quality, result.flags, result.warnings) == ("usual", (), ()) and result.intervals_ml
    assert "unlike_training" not in json.loads(result.outputs["statistics"].read_text())


def test_a_model_without_the_entry_says_nothing_and_one_with_a_strange_entry_is_refused(
    tmp_path: Path, tiny_model: Path
) -> None:
    volume = read_volume(save(tmp_path / "scan.nii.gz"))
    assert load_segmenter(tiny_model, "cpu").segment(volume).unlike_training == ""
    model = calibrated(tiny_model, tmp_path / "model")
    replace_card(model, {**load_card(model), SEEN: {"voxel_mm": {"S": "two"}}})
    with pytest.raises(ModelError, match="entry 'seen' is of another version"):
        load_segmenter(model, "cpu")


def test_an_image_file_has_no_voxel_size_to_doubt(tmp_path: Path) -> None:
    model = with_seen(make_model(tmp_path / "model", tiny_config(**FLAT)), voxel_mm={"R": [30, 40]})
    (result,) = run([save_image(tmp_path / "image.png")], model)
    assert result.flags in ((), ("empty mask",))
    with_seen(model, classes={"bright": {"image_share": [2.5, 3.0]}})  # more than all of it
    (result,) = run([save_image(tmp_path / "image.png")], model)
    assert "unlike training" in result.flags


@pytest.mark.parametrize("statistics", [True, False])
def test_marks_stand_in_every_output_and_stay_when_scans_are_skipped(
    statistics: bool, tmp_path: Path, tiny_model: Path
) -> None:
    model = with_seen(calibrated(tiny_model, tmp_path / "known"), voxel_mm=SPACING)
    scans = [
        save(tmp_path / "in" / "thick.nii.gz", affine=np.diag([1.0, 1.0, 10.0, 1.0])),
        save(tmp_path / "in" / "usual.nii.gz", affine=np.diag([1.0, 1.0, 2.0, 1.0])),
    ]
    out, command = tmp_path / "out", ["segment", str(tmp_path / "in"), "-m", str(model), "-o", str(tmp_path / "out")]
    command += ["--ensemble", "3", "--device", "cpu", *(["--statistics"] if statistics else [])]
    said = "unlike the training scans: voxels of 10 mm along S (trained on 2 mm); no interval is given"
    before = None
    for name, more in (("first", []), ("second", ["--skip-existing"])):
        page = tmp_path / f"{name}.html"
        done = CliRunner().invoke(app, [*command, *more, "--report", str(page)])
        assert done.exit_code == 0, done.output
        assert f"medseg: warning: {scans[0]}: {said}" in done.output
        assert "1 of 2 scans to check: thick.nii.gz (unlike training)" in done.output
        found = row(out / "volumes.csv", "thick.nii.gz")
        assert (found["quality"], found["flags"], found["warnings"]) == ("check", "unlike training", said)
        assert found["interval_level"] == found["bright_interval_low_ml"] == ""
        assert row(out / "volumes.csv", "usual.nii.gz")["quality"] == "usual"
        assert "unlike training" in page.read_text() and "voxels of 10 mm along S" in page.read_text()
        found.pop("status")
        assert before in (None, found)
        before = found


def test_masks_and_maps_name_the_model(tmp_path: Path, tiny_model: Path) -> None:
    scan = save(tmp_path / "scan.nii.gz")
    (result,) = run([scan], tiny_model, save_uncertainty=True, ensemble=2)
    saved = load_model_files(tiny_model)
    for kind in ("segmentation", "uncertainty"):
        said = bytes(nib.load(result.outputs[kind]).header["descrip"]).rstrip(b"\0").decode()
        assert said == f"medseg-diffusion {saved.name} {saved.sha256[:12]}"
    made = load_model(tiny_model, "cpu").segment(scan).save(tmp_path / "saved.nii.gz")
    assert saved.sha256[:12].encode() in bytes(nib.load(made).header["descrip"])


# ---- what trainings store --------------------------------------------------------------------------------------------


def test_a_training_stores_what_measuring_again_finds(tmp_path: Path) -> None:
    for number in range(9):
        label = np.zeros((9, 8, 8), np.uint8)
        label[2 : 5 + number % 3, 2:6, 3:7] = 1
        image = label + 0.2 * np.random.default_rng(number).standard_normal(label.shape)
        save(tmp_path / "data" / "images" / f"case{number}.nii.gz", image.astype(np.float32), np.diag([1, 1, 2, 1]))
        save(tmp_path / "data" / "labels" / f"case{number}.nii.gz", label, np.diag([1, 1, 2, 1]))
    training.train_segmenter_in(str(tmp_path / "run"), str(tmp_path / "data"))
    model = tmp_path / "run" / "model"
    card, readme = load_card(model), (model / "README.md").read_text()
    entry = card[SEEN]
    held_out = sum(len(names) for names in card["training"]["held_out"].values())
    assert entry["scans"] == len(list((tmp_path / "data" / "images").iterdir())) - held_out
    assert set(entry["voxel_mm"]) == set(entry["field_of_view_mm"]) == {"R", "A", "S"}
    (name,) = entry["classes"]
    low, high = entry["classes"][name]["volume_ml"]
    assert 3 * 16 * 0.002 <= low <= high <= 5 * 16 * 0.002 and entry["voxel_mm"]["S"] == [2.0, 2.0]
    assert entry["classes"][name]["image_share"] == pytest.approx([low / 1.152, high / 1.152], rel=1e-3)
    replace_card(model, {key: value for key, value in card.items() if key != SEEN})
    store_seen(tmp_path / "run", tmp_path / "data")
    assert load_card(model)[SEEN] == entry
    assert (model / "README.md").read_text() == readme
    load_model_files(model)  # the sums are right
    store_seen(model, tmp_path / "data", lengths=False)
    without = load_card(model)[SEEN]
    assert "voxel_mm" not in without and "volume_ml" not in without["classes"][name] and without["intensity"]


def test_an_anomaly_model_marks_a_scan_and_compares_it_with_no_healthy_one(
    anomaly_scans: Path, anomaly_models: dict[str, Path], tmp_path: Path
) -> None:
    trained = anomaly_models["pixel"]
    scans = [anomaly_scans / "images" / f"s{i}.nii.gz" for i in (0, 1)]
    image = nib.load(scans[0])
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), np.diag([4.0, 4.0, 4.0, 1.0])), tmp_path / "s0.nii.gz")
    saved = load_model_files(trained)
    model = tmp_path / "model"
    entry = {"scans": 15, "voxel_mm": {"R": [1, 1], "A": [1, 1]}}
    save_model(model, {**saved.card, SEEN: entry}, saved.weights, "# card")
    for skip in (False, True):
        options = AnomalyOptions(str(model), output=tmp_path / "out", device="cpu", table=True, skip_existing=skip)
        odd, usual = anomaly([tmp_path / "s0.nii.gz", scans[1]], options)
        assert odd.flags == ("unlike training",) and "unlike training" not in usual.flags
        (said,) = odd.warnings
        assert said == (
            "unlike the training scans: voxels of 4 mm along R (trained on 1 mm); it is not compared with healthy scans"
        )
        assert "not comparable with healthy scans" in odd.headline
        assert "healthy scans" in usual.headline and "not comparable" not in usual.headline
        assert row(tmp_path / "out" / "anomalies.csv", "s0.nii.gz")["healthy_percentile"] == ""
    assert load_model(model, "cpu").anomaly(tmp_path / "s0.nii.gz").unlike_training == said


def test_an_anomaly_training_has_seen_its_healthy_scans(anomaly_scans: Path) -> None:
    scans = find_healthy(anomaly_scans)
    seen = seen_in_healthy(scans, small_config("pixel"))
    assert seen is not None and seen.scans == len(scans) == 8
    assert seen.voxel_mm == {"R": (1.0, 1.0), "A": (1.0, 1.0)}, "the distance of slices does not matter to a 2D model"
    assert seen.field_of_view_mm == {"R": (20.0, 20.0), "A": (24.0, 24.0)} and not seen.volume_ml
    assert -1.5 <= seen.intensity[0]["q50"][0] <= seen.intensity[0]["q50"][1] <= 1.5


def test_training_from_label_maps_has_seen_whole_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in (40, 48, 40)], indexing="ij")
    radius = np.sqrt(sum(axis**2 for axis in axes))
    maps = []
    for number, size in enumerate((0.7, 0.75)):
        labels = np.select([radius < 0.35, radius < 0.55, radius < size, radius < 0.95], [2, 3, 24, 515], 0)
        file = tmp_path / f"map{number}.nii.gz"
        nib.save(nib.Nifti1Image(labels.astype(np.int16), np.eye(4)), file)
        maps.append(load_label_map(file))
    config = tiny_config(
        data={"source": "brain-labelmaps", "window": [16, 16, 16]}, preprocessing={"spacing_mm": [1.0, 1.0, 1.0]}
    )
    assert isinstance(config, SegmenterConfig)
    synthesis = SynthesisConfig(scale=(0.5, 2.0), spacing=(0.9, 1.5))
    monkeypatch.setattr(training_scans, "SYNTHETIC_SCANS", 6)
    seen = seen_in_label_maps(maps, config, synthesis)
    assert seen is not None
    assert seen.voxel_mm == dict.fromkeys("RAS", (0.9, 1.5))
    white = [float((one.index == maps[0].index[20, 20, 20]).sum()) / 1000 for one in maps]
    assert seen.volume_ml["white matter"] == pytest.approx((min(white) / 8, 8 * max(white)), rel=1e-3)
    assert set(seen.volume_ml) == set(TISSUES.names[1:])
    assert seen.scans == 6 and set(seen.contrast) <= set(TISSUES.names)
    few = seen_in_label_maps(maps, config, synthesis, FEWEST_SCANS)
    assert few is not None and few.scans == FEWEST_SCANS and few.volume_ml == seen.volume_ml
    assert seen_in_label_maps(maps, config, synthesis, FEWEST_SCANS - 1) is None, "a training of so few steps"
    smallest = min(int(one.brain[:, 0].max() - one.brain[:, 0].min()) + 1 for one in maps)
    assert seen.field_of_view_mm["R"] == pytest.approx((0.5 * smallest, 2 * maps[0].index.shape[0]), rel=1e-3)


def test_structures_are_measured_as_tissues_too(tmp_path: Path) -> None:
    """So that masks of `--tissues` are compared with the training, by volume and by contrast."""
    (file,) = sorted(write_label_maps(tmp_path / "maps").iterdir())[:1]
    changes: dict[str, Any] = {
        "data": {"source": "brain-labelmaps", "window": [16, 16, 16], "brain_classes": "structures"},
        "preprocessing": {"spacing_mm": [1.0, 1.0, 1.0]},
        "finder": {"network": {"dims": 3}},
    }
    seen = seen_in_label_maps([load_label_map(file)], tiny_config(**changes), SynthesisConfig(), FEWEST_SCANS)
    assert seen is not None
    assert set(seen.volume_ml) == set(seen.image_share) == {*STRUCTURES.names[1:], *TISSUES.names[1:]}
    for structure, tissue in (("left cerebral white matter", "white matter"), ("left cerebral cortex", "grey matter")):
        assert seen.volume_ml[structure] == seen.volume_ml[tissue] and seen.volume_ml[tissue][0] > 0
        assert seen.image_share[structure][1] == seen.image_share[tissue][1], "the other side has all in mirrored heads"
    assert seen.doubts_of_mask(MeasuredMask({"CSF": 1.0, "grey matter": 900.0, "white matter": 10.0}, {}, {}))


def test_the_whole_mask_is_compared_when_some_classes_are_chosen(tmp_path: Path) -> None:
    model = structures_model(tmp_path / "model")
    scan = save(tmp_path / "scan.nii.gz")
    (usual,) = run([scan], model, output=tmp_path / "usual")
    ranges = {name: {"volume_ml": [ml / 2, 2 * ml + 1], "image_share": [0, 1]} for name, ml in usual.volumes_ml.items()}
    ranges["white matter"]["volume_ml"] = [1000.0, 1100.0]
    with_seen(model, classes=ranges)
    (whole,) = run([scan], model, output=tmp_path / "whole")
    (some,) = run([scan], model, output=tmp_path / "some", labels="other CSF")
    assert set(some.volumes_ml) == {"other CSF"} and some.flags == whole.flags and "unlike training" in some.flags
    assert some.warnings == whole.warnings and "white matter of " in some.warnings[0]


def test_tissues_are_compared_as_tissues(tmp_path: Path) -> None:
    model, scan = structures_model(tmp_path / "model"), save(tmp_path / "scan.nii.gz")
    (usual,) = run([scan], model, output=tmp_path / "usual", tissues=True)
    share = {"image_share": [0, 1]}
    for grey, flags in (([0.5, 2.0], ()), ([100.0, 200.0], ("unlike training",))):
        volume = [usual.volumes_ml["grey matter"] * end for end in grey]
        with_seen(model, classes={"grey matter": {"volume_ml": volume, **share}, "cerebral cortex": share})
        (result,) = run([scan], model, output=tmp_path / f"{grey[0]}", tissues=True)
        assert result.flags == flags


def test_many_scans_are_measured_evenly() -> None:
    assert spread(range(3)) == [0, 1, 2]
    chosen = spread(range(10 * MOST_SCANS))
    assert len(chosen) == MOST_SCANS and chosen[:2] == [0, 10] and chosen[-1] == 10 * (MOST_SCANS - 1)


def test_only_segmenters_and_anomaly_models_are_measured_again(anomaly_models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no model of train-segmenter or train-anomaly"):
        generator = load_model_files(anomaly_models["pixel"]).part("generator")
        save_model(tmp_path / "generator", generator.card, generator.weights, "# card")
        store_seen(tmp_path / "generator", tmp_path)
