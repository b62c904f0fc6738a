"""Overlap and statistics: hand-derivable values, reference implementations, and the rules for empty masks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from monai.metrics import DiceMetric
from scipy import stats

from medseg_diffusion.metrics.overlap import label_overlap
from medseg_diffusion.metrics.statistics import mean_interval, paired_wilcoxon

maps = hnp.arrays(np.uint8, (4, 5, 3), elements=st.integers(0, 3))


def test_by_hand() -> None:
    pred = np.array([[1, 1, 0], [2, 0, 0]])
    ref = np.array([[1, 0, 0], [2, 2, 1]])
    found = label_overlap(pred, ref, [1, 2])
    one, two = found[1], found[2]
    assert (one.tp, one.fp, one.fn, one.tn) == (1, 1, 1, 3)
    assert one.dice == 2 * 1 / (2 * 1 + 1 + 1) and one.iou == 1 / 3
    assert (two.n_pred, two.n_ref, two.dice, two.iou) == (1, 2, 2 / 3, 1 / 2)


def test_empty_masks() -> None:
    empty, some = np.zeros((3, 3), int), np.eye(3, dtype=int)
    assert math.isnan(label_overlap(empty, empty, [1])[1].dice)
    assert label_overlap(some, empty, [1])[1].dice == 0.0
    assert label_overlap(empty, some, [1])[1].iou == 0.0


@given(maps, maps)
def test_counts_equal_a_loop_over_voxels(pred: np.ndarray, ref: np.ndarray) -> None:
    for label, item in label_overlap(pred, ref, [1, 2, 3]).items():
        pairs = [(p == label, r == label) for p, r in zip(pred.flat, ref.flat, strict=True)]
        assert item.tp == sum(p and r for p, r in pairs)
        assert item.fp == sum(p and not r for p, r in pairs)
        assert item.fn == sum(r and not p for p, r in pairs)
        assert item.tn == sum(not p and not r for p, r in pairs)


@given(maps, maps)
def test_dice_equals_monai_where_the_reference_is_not_empty(pred: np.ndarray, ref: np.ndarray) -> None:
    one_hot = [torch.nn.functional.one_hot(torch.from_numpy(a).long(), 4).movedim(-1, 0)[None] for a in (pred, ref)]
    theirs = DiceMetric(include_background=False)(*one_hot)[0]
    for label, item in label_overlap(pred, ref, [1, 2, 3]).items():
        if item.n_ref:
            assert item.dice == pytest.approx(float(theirs[label - 1]), abs=1e-6)


def test_other_shapes_and_floats_are_refused() -> None:
    with pytest.raises(ValueError, match="same grid"):
        label_overlap(np.zeros((2, 2), int), np.zeros((2, 3), int), [1])
    with pytest.raises(ValueError, match="integers"):
        label_overlap(np.zeros((2, 2)), np.zeros((2, 2)), [1])


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(60):
        interval = mean_interval(rng.normal(0.8, 0.1, 40))
        hits += interval.low <= 0.8 <= interval.high
    assert 51 <= hits <= 60  # 57 expected; fewer than 51 has probability 0.002


def test_interval_of_few_or_equal_values() -> None:
    single = mean_interval([0.7])
    assert single.mean == 0.7 and math.isnan(single.low) and single.n == 1
    equal = mean_interval([0.5, 0.5, 0.5])
    assert (equal.mean, equal.low, equal.high) == (0.5, 0.5, 0.5)
    nothing = mean_interval([math.nan, math.nan])
    assert math.isnan(nothing.mean) and (nothing.n, nothing.n_missing) == (0, 2)
    gaps = mean_interval([0.2, math.nan, 0.4])
    assert gaps.mean == pytest.approx(0.3) and (gaps.n, gaps.n_missing) == (2, 1)


def test_interval_is_reproducible() -> None:
    values = np.random.default_rng(1).random(20)
    assert mean_interval(values, seed=3) == mean_interval(values, seed=3)


def test_wilcoxon_equals_scipy_and_leaves_gaps_out() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.random(15), rng.random(15)
    ours = paired_wilcoxon([*a, math.nan], [*b, 0.5])
    assert ours.p_value == pytest.approx(stats.wilcoxon(a, b).pvalue) and (ours.n, ours.n_missing) == (15, 1)
    assert paired_wilcoxon(a, a).p_value == 1.0
