"""Models that an earlier version has written load, and give the same masks and maps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from medseg_diffusion.methods.ensemble import temperature_scaled
from medseg_diffusion.models.anomaly import AnomalyModel
from medseg_diffusion.models.anomaly_map import mask_of
from medseg_diffusion.models.load import load_segmenter
from medseg_diffusion.volumes.io import read_volume

STORED = Path(__file__).parent / "stored"
SEED = 7


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    with np.load(STORED / "expected.npz") as arrays:
        return dict(arrays)


@pytest.mark.parametrize("name", ["segmenter", "pixel-classifier"])
def test_segmenters_give_the_same_masks(name: str, expected: dict[str, np.ndarray]) -> None:
    segmentation = load_segmenter(STORED / name, "cpu").segment(
        read_volume(STORED / "scan.nii.gz"), SEED, maps=["probabilities"]
    )
    labels, foreground = expected[f"{name}_labels"], expected[f"{name}_foreground"].astype(np.float32)
    # Calibrations of that version are not used any more, because they are of the cases that chose the weights.
    temperature = json.loads((STORED / name / "model.json").read_text()).get("calibration", {}).get("temperatures", [1])
    probabilities = temperature_scaled(segmentation.probabilities, temperature[0])
    np.testing.assert_allclose(probabilities[1].numpy(), foreground, atol=2e-3)  # stored as float16
    decided = np.abs(foreground - 0.5) > 2e-3  # elsewhere another processor's rounding may decide otherwise
    np.testing.assert_array_equal(segmentation.labels.numpy()[decided], labels[decided])
    assert labels.any() and decided.mean() > 0.99


def test_the_anomaly_model_gives_the_same_map_and_mask(expected: dict[str, np.ndarray]) -> None:
    model = AnomalyModel(STORED / "anomaly", device="cpu")
    scored = model.score(read_volume(STORED / "scan.nii.gz"), SEED)
    healthy = model.healthy_scores()
    assert healthy is not None
    score, mask = expected["anomaly_score"].astype(np.float32), expected["anomaly_mask"]
    np.testing.assert_allclose(scored.score.numpy(), score, atol=1e-4, rtol=2e-3)
    decided = np.abs(score - healthy.automatic) > 1e-4
    np.testing.assert_array_equal(mask_of(scored, healthy.automatic, 1.0).numpy()[decided], mask[decided])
    assert mask.any()
