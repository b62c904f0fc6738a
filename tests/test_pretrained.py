"""The models in the package: complete, small, and as good on real scans as their cards say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors import safe_open

from medseg_diffusion.data.cases import find_cases, middle_cases, split_by_hash
from medseg_diffusion.methods.seen import SEEN, MeasuredMask, MeasuredScan, Seen, measured_scan
from medseg_diffusion.metrics.ambiguity import generalised_energy_distance
from medseg_diffusion.metrics.detection import Curve, ScoredVoxels
from medseg_diffusion.metrics.overlap import label_overlap
from medseg_diffusion.models.card import OPEN, SECTIONS, render_card
from medseg_diffusion.models.load import load_segmenter
from medseg_diffusion.models.store import list_models, load_card, load_model_files, model_folders
from medseg_diffusion.volumes.io import read_labels, read_map, read_volume
from medseg_diffusion.workflows.anomaly import AnomalyOptions, anomaly
from medseg_diffusion.workflows.segment import SegmentOptions, segment

SHIPPED = sorted(path.name for path in model_folders()["package"].iterdir() if path.is_dir())
SEGMENTERS = [name for name in SHIPPED if load_card(name)["task"] == "mask"]


def test_the_package_ships_models() -> None:
    assert {"brain-tissue-t1", "flair-anomaly", "hippocampus-t1", "lung-nodule-ct"} == set(SHIPPED)
    assert set(SHIPPED) <= {info.name for info in list_models()}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_model_is_small_complete_and_usable(name: str) -> None:
    folder = model_folders()["package"] / name
    assert sum(path.stat().st_size for path in folder.iterdir()) < 10e6
    load_model_files(folder)  # checks the sums
    with safe_open(folder / "weights.safetensors", "pt") as weights:
        assert len(list(weights.keys())) > 50
    card = load_card(name)
    assert card["licence"]
    json.dumps(card, allow_nan=False)


@pytest.mark.parametrize("name", SHIPPED)
def test_the_card_of_a_shipped_model_is_complete(name: str) -> None:
    """Intended use, what the noise is worth, metrics with their data, data, licence and limits; nothing is open."""
    card = load_card(name)
    text = (model_folders()["package"] / name / "README.md").read_text(encoding="utf-8")
    assert text == render_card(card, name), "the file says what the card says"
    sections = {title: body.strip() for title, _, body in (part.partition("\n") for part in text.split("\n## ")[1:])}
    assert set(SECTIONS) | {"What the noise is worth", "Training command"} <= set(sections)
    assert all(len(body) > 8 for body in sections.values()), sections
    assert "Not a medical device" in sections["Intended use"] and "seed" in sections["Model"]
    for said in OPEN:
        assert said not in text, said
    assert card["metrics"]
    for split, numbers in card["metrics"].items():
        assert len(numbers.get("data", "")) > 20, f"{split}: of which data?"
        assert any(isinstance(value, float) for value in numbers.values())


@pytest.mark.parametrize("name", SEGMENTERS)
def test_a_shipped_segmenter_is_usable(name: str) -> None:
    model = load_segmenter(name, device="cpu")
    assert model.labels[0] == "background" and len(model.labels) >= 2
    assert 0 < model.saved.card["metrics"]["validation"]["score"] <= 1


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_model_knows_what_it_has_seen(name: str) -> None:
    """The entry is small, and says what the model needs to tell a wrong input."""
    card = load_card(name)
    seen = Seen.from_entry(card[SEEN])
    assert seen.entry() == card[SEEN] and seen.scans >= 28 and seen.intensity
    assert len(json.dumps(card[SEEN])) < 1500
    assert list(seen.image_share) == [
        label for key, label in card["labels"].items() if key != "0" and name in SEGMENTERS
    ]
    assert bool(seen.voxel_mm) == bool(seen.field_of_view_mm) == (name in ("brain-tissue-t1", "hippocampus-t1"))


def test_a_10_mm_voxel_and_a_head_are_unlike_the_hippocampus_crops() -> None:
    seen = Seen.from_entry(load_card("hippocampus-t1")[SEEN])
    crop = MeasuredScan({"R": 1, "A": 1, "S": 1}, {"R": 35, "A": 50, "S": 35}, [])
    assert seen.doubts_of_scan(crop) == []
    thick = replace(crop, voxel_mm={"R": 1, "A": 1, "S": 10})
    assert seen.doubts_of_scan(thick) == ["voxels of 10 mm along S (trained on 1 mm)"]
    head = replace(crop, field_of_view_mm={"R": 170, "A": 240, "S": 256})
    assert "field of view of 256 mm" in seen.doubts_of_scan(head)[0]
    for volume in (100.0, 1400.0):
        (said,) = seen.doubts_of_mask(MeasuredMask(dict.fromkeys(seen.volume_ml, volume), {}, {}))
        assert f"hippocampus of {volume:.0f} ml" in said


def test_a_whole_ct_slice_is_unlike_the_nodules_in_the_middle(tmp_path: Path) -> None:
    """The model looks at the middle 64 x 64 pixels alone; of a nodule elsewhere it would say that there is none."""
    seen = Seen.from_entry(load_card("lung-nodule-ct")[SEEN])
    image = torch.rand(1, 64, 64, 1)
    (said,) = seen.doubts_of_scan(replace(measured_scan(image, (512, 512, 1), None, None, 2), intensity=[]))
    assert said == "512 pixels along axis 1 (trained on 128 pixels)"
    assert not seen.doubts_of_scan(replace(measured_scan(image, (128, 128, 1), None, None, 2), intensity=[]))


def test_medseg_anomaly_works_without_training(tmp_path: Path) -> None:
    """A ball of grey with a bright spot, on the built-in model."""
    axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in (60, 72, 4)], indexing="ij")
    image = np.random.default_rng(0).normal(3, 1, (60, 72, 4)) + 100 * (axes[0] ** 2 + axes[1] ** 2 < 0.7)
    image[36:44, 40:48, 1:3] += 120
    nib.save(nib.Nifti1Image(image.astype(np.float32), np.eye(4)), tmp_path / "scan.nii.gz")
    (case,) = anomaly([tmp_path / "scan.nii.gz"], AnomalyOptions(device="cpu"))
    assert case.status == "done", case.error
    mask = read_labels(case.outputs["mask"]).data[0].numpy() > 0
    spot = np.zeros_like(mask)
    spot[36:44, 40:48, 1:3] = True
    assert mask[spot].mean() > 0.5 and mask[~spot].mean() < 0.2
    about = json.loads(case.outputs["scores"].read_text())
    assert about["model"] == "flair-anomaly" and about["threshold_from"] == "auto"


@pytest.mark.data
def test_anomalies_on_held_out_patients(data_folder: Path, tmp_path: Path) -> None:
    """Two of the fifteen test patients: ahead of the brightness itself, as the page on results says of all."""
    cases = find_cases(data_folder / "lgg_flair").cases
    split = split_by_hash(cases, 15, 10)
    chosen = [case for case in cases if case.name in ("TCGA_FG_A4MU_20030903", "TCGA_FG_6688_20020215")]
    assert {case.name for case in chosen} <= set(split.test)
    for case in chosen:
        (found,) = anomaly([case.image], AnomalyOptions(output=tmp_path, device="cpu"))
        score, inside = (read_map(found.outputs[kind]).data[0].numpy() for kind in ("map", "foreground"))
        lesions, counted = read_labels(case.label).data[0].numpy() > 0, inside > 0
        ours, plain = (
            Curve.of(ScoredVoxels.of(values, lesions, counted)).average_precision
            for values in (score, read_volume(case.image).data[0].numpy())
        )
        assert ours > plain + 0.1


@pytest.mark.data
def test_lung_nodules_as_their_readers_mark_them(data_folder: Path, tmp_path: Path) -> None:
    """Six test patients, from file to file: nearer to the readers than one reader (0.42) or an empty mask (0.69)."""
    cases = find_cases(data_folder / "lidc_nodules").cases
    split = split_by_hash(cases, 120, 60)
    chosen = middle_cases([case for case in cases if case.name in set(split.test)])[:6]
    options = SegmentOptions(model="lung-nodule-ct", output=tmp_path, device="cpu", ensemble=16, save_members=True)
    distances, empty = [], []
    for case, result in zip(chosen, segment([case.image for case in chosen], options), strict=True):
        assert result.status == "done", result.error
        samples = [m > 0 for m in np.moveaxis(np.asarray(nib.load(result.outputs["members"]).dataobj), -1, 0)]
        readers = [read_labels(path).data[0].numpy() > 0 for path in case.labels]
        empty.append([np.mean([not one.any() for one in masks]) for masks in (samples, readers)])
        distances.append(
            generalised_energy_distance([m.astype(int) for m in samples], [r.astype(int) for r in readers], 2)
        )
    assert np.mean(distances) < 0.38
    assert abs(np.diff(np.mean(empty, axis=0))[0]) < 0.25


@pytest.mark.data
def test_hippocampus_on_held_out_cases(data_folder: Path, tmp_path: Path) -> None:
    """Six test cases, from file to file; the card's Dice is the mean over the 41 of 30 heads."""
    cases = find_cases(data_folder / "Task04_Hippocampus").cases
    split = split_by_hash(cases, 30, 15, 20)
    chosen = [case for case in cases if case.name in split.test][:6]
    options = SegmentOptions(model="hippocampus-t1", output=tmp_path, device="cpu", ensemble=1)
    results = segment([case.image for case in chosen], options)
    dice = []
    for case, result in zip(chosen, results, strict=True):
        assert result.status == "done", result.error
        scan, mask = nib.load(case.image), nib.load(result.outputs["segmentation"])
        assert mask.shape == scan.shape
        np.testing.assert_allclose(mask.affine, scan.affine, atol=1e-6)
        found = read_labels(result.outputs["segmentation"]).data[0].numpy()
        overlap = label_overlap(found, read_labels(case.label).data[0].numpy(), [1, 2])
        dice.append([overlap[1].dice, overlap[2].dice])
    anterior, posterior = np.mean(dice, axis=0)
    assert anterior > 0.82 and posterior > 0.80
