"""Trainings from lists of files, from a preset's name with overrides, and with their progress told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medseg_diffusion import (
    Progress,
    SegmenterConfig,
    UsageError,
    calibrate_segmenter,
    load_config,
    load_model,
    train_anomaly,
    train_generator,
    train_pixel_classifier,
    train_segmenter,
)
from medseg_diffusion.models.store import load_model_files
from tests.helpers import anomaly, generators, pixel_classifiers
from tests.helpers.training import assert_same, config

TINY = {
    "data.window": [8, 8, 8],
    "data.labels": ["block"],
    "data.codes": {},
    "data.test_cases": 1,
    "data.validation_cases": 1,
    "data.calibration_cases": 0,
    "augmentation.flip_axes": [],
    "network.channels": 8,
    "network.channel_mult": [1, 2],
    "network.num_res_blocks": 1,
    "training.batch_size": 2,
    "training.max_steps": 2,
    "training.validate_every": 2,
    "inference.ensemble": 2,
}
"""Overrides that make a preset for volumes the smallest that there is."""


def pairs(folder: Path) -> list[tuple[str, Path]]:
    return [(str(image), folder / "labels" / image.name) for image in sorted((folder / "images").iterdir())]


def test_a_list_of_files_trains_as_its_folder_does(block_scans: Path, tmp_path: Path) -> None:
    whole = train_segmenter(config(), block_scans, tmp_path / "folder", device="cpu")
    listed = train_segmenter(config(), pairs(block_scans), str(tmp_path / "list"), device="cpu")
    assert_same(load_model_files(whole).weights, load_model_files(listed).weights)
    splits = [json.loads((tmp_path / run / "split.json").read_text()) for run in ("folder", "list")]
    assert splits[0] == splits[1]
    train_segmenter(config(), pairs(block_scans), tmp_path / "list", device="cpu", resume=True)


def test_a_presets_name_with_overrides_is_a_configuration(block_scans: Path, tmp_path: Path) -> None:
    told, steps = list[tuple[str, float]](), list[Progress]()
    model = train_segmenter(
        "ensemdiff-hippocampus-small", pairs(block_scans), tmp_path / "run", overrides=TINY, device="cpu",
        on_progress=lambda *one: told.append(one), on_step=steps.append,
    )  # fmt: skip
    assert load_model(model, "cpu").segment(pairs(block_scans)[0][0]).labels.shape == (9, 8, 8)
    assert [step.step for step in steps] == [1, 2] and steps[0].max_steps == 2
    texts = [what for what, _ in told]
    assert "cases: 6 of 6" in texts and any(text.startswith("step 2 of 2, loss ") for text in texts)
    assert all(0 <= share <= 1 for _, share in told)


def test_overrides_change_presets_files_and_configurations_alike(tmp_path: Path) -> None:
    by_name = load_config("ensemdiff-hippocampus-small", {"training.max_steps": 100})
    by_text = load_config("ensemdiff-hippocampus-small", ["training.max_steps=100"])
    by_object = load_config(load_config("ensemdiff-hippocampus-small"), {"training.max_steps": 100})
    assert (
        by_name == by_text == by_object and isinstance(by_name, SegmenterConfig) and by_name.training.max_steps == 100
    )
    with pytest.raises(UsageError, match=r"unknown key training\.max_step; did you mean max_steps"):
        load_config("ensemdiff-hippocampus-small", {"training.max_step": 100})
    with pytest.raises(UsageError, match=r"method\.name=3: method is a value"):
        load_config("ensemdiff-hippocampus-small", {"method.name": 3})


def test_a_preset_of_another_kind_names_the_function_for_it(tmp_path: Path) -> None:
    for train, preset, function in (
        (train_segmenter, "adm-slices-small", "train-generator"),
        (train_generator, "ensemdiff-hippocampus-small", "train-segmenter"),
        (train_anomaly, "label-efficient", "train-pixel-classifier"),
        (train_segmenter, "anomaly-patched", "train-anomaly"),
    ):
        with pytest.raises(UsageError, match=f"{preset}: is of method .*; train it with {function}"):
            train(preset, tmp_path, tmp_path / "run")  # type: ignore[operator]
    with pytest.raises(UsageError, match="no such file and no preset of that name; did you mean"):
        train_segmenter("ensemdif-hippocampus-small", tmp_path, tmp_path / "run")


def test_a_generator_of_classes_trains_on_a_list(pictures: Path, tmp_path: Path) -> None:
    entries = [{"image": file, "class": file.parent.name} for file in sorted(pictures.rglob("*.png"))]
    by_class = generators.small_config("pixel", condition={"classes": "embedding"})
    model = load_model(train_generator(by_class, entries, tmp_path / "run", device="cpu"), "cpu")
    assert model.sample(2, steps=1).classes == ("left", "right")


def test_an_anomaly_model_trains_on_a_list(anomaly_scans: Path, tmp_path: Path) -> None:
    found = train_anomaly(
        anomaly.small_config("pixel"), pairs(anomaly_scans), tmp_path / "run", exclude_labelled=2, device="cpu"
    )
    assert load_model(found.model, "cpu").anomaly(pairs(anomaly_scans)[0][0]).score.any()


def test_pixel_classifiers_train_on_a_list(box_scans: Path, box_generators: dict[int, Path], tmp_path: Path) -> None:
    found = train_pixel_classifier(
        pixel_classifiers.quick(), box_generators[2], pairs(box_scans), 1, tmp_path / "run", device="cpu", test=False
    )
    assert load_model(found.model, "cpu").classes == {0: "background", 1: "box"}


def test_a_segmenter_is_calibrated_on_a_list(block_scans: Path, tiny_model: Path, tmp_path: Path) -> None:
    """Of scans that it was not trained on."""
    model = train_segmenter(config(), block_scans, tmp_path / "run", device="cpu")
    names = json.loads((tmp_path / "run" / "split.json").read_text())["test"]
    unseen = [pair for pair in pairs(block_scans) if Path(pair[0]).name.removesuffix(".nii.gz") in names]
    told: list[str] = []
    calibrate_segmenter(
        model, unseen, tmp_path / "new", device="cpu", on_progress=lambda what, share: told.append(what)
    )
    assert told == ["scans of the calibration: 0 of 1", "scans of the calibration: 1 of 1"]
