"""The models in the package: complete, small, and as good on real scans as their cards say."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from safetensors import safe_open

from medseg_diffusion.checkpoint import list_models, load_card, load_model_files, model_folders
from medseg_diffusion.data.cases import find_cases, split_by_hash
from medseg_diffusion.metrics.overlap import label_overlap
from medseg_diffusion.pipeline import SegmentationModel, SegmentOptions, segment
from medseg_diffusion.volumes.io import read_labels

SHIPPED = sorted(path.name for path in model_folders()["package"].iterdir() if path.is_dir())


def test_the_package_ships_models() -> None:
    assert "hippocampus-t1" in SHIPPED
    assert set(SHIPPED) <= {info.name for info in list_models()}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_model_is_small_complete_and_usable(name: str) -> None:
    folder = model_folders()["package"] / name
    assert sum(path.stat().st_size for path in folder.iterdir()) < 10e6
    load_model_files(folder)  # checks the sums
    model = SegmentationModel(name, device="cpu")
    assert model.labels[0] == "background" and len(model.labels) >= 3
    with safe_open(folder / "weights.safetensors", "pt") as weights:
        assert len(list(weights.keys())) > 50
    card = load_card(name)
    assert card["licence"] and 0 < card["metrics"]["validation"]["score"] <= 1
    readme = (folder / "README.md").read_text()
    for part in ("Training command", "seed", "Training data and terms", "Not a medical device"):
        assert part in readme
    json.dumps(card, allow_nan=False)


@pytest.mark.data
def test_hippocampus_on_held_out_cases(data_folder: Path, tmp_path: Path) -> None:
    """Six test cases, from file to file; the card's Dice is the mean over all forty."""
    cases = find_cases(data_folder / "Task04_Hippocampus").cases
    split = split_by_hash(cases, 40, 20)
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
