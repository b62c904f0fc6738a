"""Scores of generated images: closed forms, identities, and the arithmetic of torchmetrics and torch-fidelity."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import poly_mmd

from medseg_diffusion.metrics import generation
from medseg_diffusion.metrics.generation import (
    PLANES,
    Features,
    SliceFeatures,
    chosen,
    frechet_distance,
    inception_score,
    kernel_distance,
    memorisation,
    precision_recall,
    scores,
    slice_scores,
)


def normal(count: int, size: int, seed: int, mean: float = 0.0, std: float = 1.0) -> torch.Tensor:
    return mean + std * torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_set_against_itself() -> None:
    x = normal(200, 16, 0)
    assert abs(frechet_distance(x, x)) < 1e-9
    assert precision_recall(x, x) == (1.0, 1.0)
    assert kernel_distance(x, x) < 0  # unbiased: the diagonal is left out of one part only


def test_frechet_distance_of_gaussians_in_closed_form() -> None:
    """Means 3 apart and standard deviations 1 and 2 in each of 4 dimensions: 4 (9 + 1)."""
    x = normal(500, 4, 0)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    assert frechet_distance(x, 2 * x + 3) == pytest.approx(4 * (9 + 1), rel=1e-9)


@pytest.mark.parametrize(("count", "size"), [(300, 32), (60, 64)])
def test_frechet_distance_as_torchmetrics(count, size) -> None:
    """Also with fewer images than features, where the covariances are singular."""
    x, y = normal(count, size, 1), normal(count, size, 2, 0.3, 1.4)
    moments = [value for z in (x, y) for value in (z.mean(0), torch.cov(z.T))]
    assert frechet_distance(x, y) == pytest.approx(float(_compute_fid(*moments)), rel=1e-3)


def test_kernel_distance_as_torchmetrics() -> None:
    x, y = normal(100, 8, 1), normal(100, 8, 2, 0.5)
    assert kernel_distance(x, y) == pytest.approx(float(poly_mmd(y, x)), rel=1e-6)


def test_inception_score_in_closed_form() -> None:
    certain = 1000.0 * torch.eye(10).repeat(3, 1)
    assert inception_score(certain) == pytest.approx(10.0)
    assert inception_score(torch.zeros(30, 10)) == pytest.approx(1.0)


def test_inception_score_takes_whole_splits_in_order() -> None:
    logits = 1000.0 * torch.eye(4)[torch.tensor([0, 0, 1, 1, 2, 3, 0])]
    # Splits of 2: (0, 0), (1, 1), (2, 3); the seventh is left out.
    assert inception_score(logits, split=2) == pytest.approx((1 + 1 + 2) / 3)
    assert inception_score(logits[:4], split=5000) == pytest.approx(2.0)


def test_precision_and_recall_as_defined() -> None:
    """Against a direct reading of the definition with SciPy's distances."""
    samples, real = normal(80, 5, 3, 0.5), normal(120, 5, 4)

    def inside(points: np.ndarray, centres: np.ndarray) -> float:
        radius = np.sort(cdist(centres, centres), axis=1)[:, 3]
        return float((cdist(points, centres) <= radius).any(1).mean())

    result = precision_recall(samples, real)
    assert result == (inside(samples.numpy(), real.numpy()), inside(real.numpy(), samples.numpy()))
    assert 0 < result[0] < 1


@pytest.mark.parametrize("splits", [1, 3])
def test_inception_score_as_torch_fidelity(splits) -> None:
    logits = 3 * normal(120, 20, 7)
    expected = isc_features_to_metric(logits, splits, shuffle=False)["inception_score_mean"]
    assert inception_score(logits, split=120 // splits) == pytest.approx(expected, rel=1e-3)


def test_precision_and_recall_as_torch_fidelity() -> None:
    """As of 0.4, where the first features are the samples'."""
    samples, real = normal(150, 6, 8, 0.4, 0.8), normal(200, 6, 9)
    options = {"prc_neighborhood": 3, "prc_batch_size": 64, "save_cpu_ram": True, "verbose": False}
    expected = prc_features_to_metric(samples, real, **options)
    result = precision_recall(samples, real)
    assert result == pytest.approx((expected["precision"], expected["recall"]), rel=1e-3)
    assert result[0] != result[1]


def test_precision_and_recall_hold_some_rows_of_distances_at_a_time(monkeypatch) -> None:
    samples, real = normal(80, 5, 3, 0.5), normal(120, 5, 4)
    expected, rows, distances = precision_recall(samples, real), [], generation._distances

    def noted(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        rows.append(len(a))
        return distances(a, b)

    monkeypatch.setattr(generation, "_distances", noted)
    monkeypatch.setattr(generation, "ROWS", 7)
    assert precision_recall(samples, real) == expected
    assert max(rows) == 7


def test_a_collapsed_generator_is_precise_and_recalls_nothing() -> None:
    real = normal(300, 4, 5)
    precision, recall = precision_recall(real[:1] + 1e-3 * normal(300, 4, 6), real)
    assert precision == 1.0 and recall < 0.02


def test_rows_are_chosen_by_seed_without_repetition() -> None:
    x = torch.arange(50.0)[:, None]
    assert len(torch.unique(chosen(x, 20, 1))) == 20
    assert torch.equal(chosen(x, 20, 1), chosen(x, 20, 1))
    assert len(chosen(x, 80, 1)) == 50


def test_a_row_has_every_score_and_both_counts() -> None:
    features = Features(normal(60, 6, 0), normal(60, 9, 1), normal(60, 3, 2))
    row = scores(features[:20], features)
    assert (row.count, row.reference_count) == (20, 60)
    assert all(math.isfinite(value) for value in vars(row).values() if isinstance(value, float))
    assert row.planes == {} and row.ms_ssim is None


def test_without_map_and_logits_their_scores_are_none() -> None:
    features = Features(normal(60, 6, 0), torch.empty(60, 0), torch.empty(60, 0))
    row = scores(features[:20], features)
    assert row.inception_score is None and row.sfid is None
    assert all(math.isfinite(value) for value in vars(row).values() if isinstance(value, float))


def test_copies_are_closer_to_training_images_than_unseen_images_are() -> None:
    """Copies with a little noise give 1, further images of the same distribution about a half; equal sets a half."""
    training, unseen, fresh = (normal(300, 8, seed) for seed in (1, 2, 3))
    copies = memorisation(training[:50] + 1e-3 * normal(50, 8, 4), training, unseen)
    assert copies.closer == copies.closest == 1
    assert copies.neighbours.tolist() == list(range(50))
    honest = memorisation(fresh, training, unseen)
    assert abs(honest.closer - 0.5) < 0.05 and honest.closest < 0.05
    assert memorisation(unseen, training, unseen).closer == 0.5
    far = memorisation(normal(20, 8, 5, mean=50.0), training, unseen)
    assert far.closer == far.closest == 0
    brute = cdist(fresh.numpy(), training.numpy())
    np.testing.assert_allclose(honest.distances.numpy(), brute.min(1), rtol=1e-6)


def test_volumes_are_compared_plane_by_plane_and_as_wholes() -> None:
    def of(count: int, seed: int, mean: float = 0.0) -> SliceFeatures:
        nothing = torch.empty(3 * count, 0)
        planes = {
            name: Features(normal(3 * count, 6, seed + i, mean), nothing, nothing) for i, name in enumerate(PLANES)
        }
        return SliceFeatures(planes, slices=3)

    samples, reference = of(20, 0), of(30, 10)
    row = slice_scores(samples, reference)
    assert (row.count, row.reference_count) == (20, 30) and len(samples) == 20
    for name in PLANES:
        a, b = (side.planes[name].pooled for side in (samples, reference))
        assert row.planes[name].fid == frechet_distance(a, b) and row.planes[name].kid == kernel_distance(a, b)
    assert row.fid == pytest.approx(sum(plane.fid for plane in row.planes.values()) / 3)
    some = reference[torch.tensor([4, 1])]
    torch.testing.assert_close(some.planes["axial"].pooled, reference.planes["axial"].pooled[[12, 13, 14, 3, 4, 5]])
    torch.testing.assert_close(some.middle[0], torch.cat([reference.planes[name].pooled[13] for name in PLANES]))
    own = slice_scores(reference, reference)
    assert own.fid == pytest.approx(0, abs=1e-6) and own.precision == own.recall == 1
    assert slice_scores(of(20, 20, mean=5.0), reference).precision == 0
