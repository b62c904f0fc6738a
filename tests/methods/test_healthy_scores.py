"""Thresholds from the scores of healthy scans: their rate, ties and percentiles."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg_diffusion.methods.healthy_scores import LEVELS, MOST_VALUES, fit_scores, scan_score, subsampled


def test_patients_weigh_alike_however_many_voxels_they_have() -> None:
    small, large = np.linspace(0, 1, 100, dtype=np.float32), np.linspace(2, 3, 10_000, dtype=np.float32)
    found = fit_scores([small, large], [0.1, 0.2], 0.75)
    assert found.automatic == pytest.approx(2.5, abs=0.01) and found.rate == pytest.approx(0.25, abs=0.01)
    assert found.patients == 2 and len(found.quantiles) == LEVELS
    assert found.threshold(0.25) == pytest.approx(0.5, abs=0.02)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=60), min_size=1, max_size=4),
    quantile=st.floats(0.05, 0.99),
)
def test_never_more_false_positives_than_asked_for(values, quantile) -> None:
    arrays = [np.array(one, np.float32) for one in values]
    found = fit_scores(arrays, [0.0], quantile)
    rate = float(np.mean([(one > found.automatic).mean() for one in arrays]))
    assert rate == pytest.approx(found.rate, abs=1e-6)
    assert rate <= 1 - quantile + 1e-6
    # and not needlessly few: the next smaller value would have been too many, unless the quantile is tied
    joined = np.concatenate(arrays)
    smaller = joined[joined < found.automatic]
    if smaller.size:
        tied = float(np.mean([(one == smaller.max()).mean() for one in arrays]))
        more = float(np.mean([(one > smaller.max()).mean() for one in arrays]))
        assert more > 1 - quantile - 1e-6 or tied > 1 - quantile - 1e-6


def test_values_that_are_kept_have_the_quantiles_and_ties_of_all() -> None:
    rng = np.random.default_rng(0)
    values = np.where(rng.random(250_001) < 0.3, 0, rng.gamma(2, 1, 250_001)).astype(np.float32)
    kept = subsampled(values)
    assert kept.size == MOST_VALUES and subsampled(kept) is kept
    assert (kept == 0).mean() == pytest.approx((values == 0).mean(), abs=1e-5)
    for quantile in (0.5, 0.975, 0.999):
        assert (values > np.quantile(kept, quantile)).mean() == pytest.approx(1 - quantile, abs=2e-5)


def test_ties_at_the_quantile_move_the_threshold_up() -> None:
    values = np.concatenate([np.zeros(990), np.linspace(0.5, 1, 10)]).astype(np.float32)
    found = fit_scores([values], [0.3], 0.975)
    assert found.automatic == pytest.approx(0.5) and found.rate == pytest.approx(0.009, abs=1e-6)


def test_a_scans_score_and_its_percentile() -> None:
    values = np.arange(1000, dtype=np.float32)
    assert scan_score(values) == pytest.approx(np.arange(990, 1000).mean()) and scan_score(values[:0]) == 0
    found = fit_scores([values], [1.0, 2.0, 3.0, 4.0], 0.9)
    assert found.percentile(0.5) == 0 and found.percentile(2.0) == 37.5 and found.percentile(9.0) == 100
    with pytest.raises(ValueError, match="no healthy foreground"):
        fit_scores([values[:0]], [], 0.9)


def test_the_share_above_a_threshold_is_that_of_the_values() -> None:
    values = np.random.default_rng(0).random(20_000).astype(np.float32)
    found = fit_scores([values], [0.5], 0.975)
    assert found.share_above(found.automatic) == found.rate
    for threshold in (-1.0, 0.1, 0.5, 0.9, 0.999, 2.0):
        assert found.share_above(threshold) == pytest.approx(float((values > threshold).mean()), abs=1e-3)
