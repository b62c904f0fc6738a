"""Scores and lesions: closed forms, brute force over all thresholds, and the arithmetic of torchmetrics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import binary_auroc, binary_average_precision

from medseg_diffusion.metrics.detection import SIZE_BOUNDS_ML, Curve, Lesions, ScoredVoxels


def curve(scores: np.ndarray | list[float], reference: np.ndarray | list[int], dtype: type = np.float32) -> Curve:
    return Curve.of(ScoredVoxels.of(np.asarray(scores, dtype), np.asarray(reference, bool)))


# ---- scores ----------------------------------------------------------------------------------------------------------

REFERENCE = np.arange(40).reshape(5, 8) % 5 == 0  # a fifth of the voxels


def test_perfect_inverted_and_constant_scores() -> None:
    perfect = curve(REFERENCE * 0.5, REFERENCE)
    assert (perfect.auroc, perfect.average_precision) == (1, 1)
    assert perfect.best_dice() == (1, np.nextafter(np.float32(0.5), np.float32(0)))
    inverted = curve(REFERENCE * -0.5, REFERENCE)
    assert (inverted.auroc, inverted.average_precision) == (0, 0.2)
    assert inverted.best_dice()[0] == pytest.approx(2 * 8 / (8 + 40)), "all voxels must be taken to find any"
    constant = curve(REFERENCE * 0.0, REFERENCE)
    assert (constant.auroc, constant.average_precision) == (0.5, 0.2)


def test_equal_scores_count_half_in_auroc_and_fully_in_precision() -> None:
    # Positive 3 2 1, negative 2 0: of 6 pairs 4 are in the right order and one is a tie.
    result = curve([3, 2, 1, 2, 0], [1, 1, 1, 0, 0])
    assert result.auroc == pytest.approx(4.5 / 6)
    assert result.average_precision == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)
    assert result.best_dice()[0] == pytest.approx(2 * 3 / (3 + 4))
    third, half = 1 / 3, 1 / 2
    roc = [[0, 0], [0, 0], [0, third], [0, third], [half, 2 * third], [half, 2 * third], [half, 1], [1, 1]]
    np.testing.assert_allclose(result.roc_points(), np.array(roc))
    steps = [[0, 1], [third, 1], [2 * third, 2 / 3], [1, 3 / 4]]
    np.testing.assert_allclose(result.precision_recall_points(), np.array(steps))


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Few different scores, so that many are equal; some very large, or of either sign of zero."""
    count = draw(st.integers(1, 40))
    values = st.sampled_from([-1e9, -0.25, -0.0, 0.0, 1e-30, 0.1, 0.2, 0.3, 1.0, 3e38])
    scores = draw(st.lists(values, min_size=count, max_size=count))
    reference = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    return np.asarray(scores, np.float32), np.asarray(reference)


def dice_of(mask: np.ndarray, reference: np.ndarray) -> float:
    return 2 * int((mask & reference).sum()) / (int(mask.sum()) + int(reference.sum()))


@settings(deadline=None, max_examples=150)
@given(case=cases())
def test_equals_counting_pairs_and_trying_every_threshold(case: tuple[np.ndarray, np.ndarray]) -> None:
    scores, reference = case
    result = curve(scores, reference)
    positive, negative = scores[reference], scores[~reference]
    if reference.all() or not reference.any():
        assert math.isnan(result.auroc)
    else:
        pairs = (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)
        assert result.auroc == pytest.approx(pairs.mean(), abs=1e-12)
    if not reference.any():
        assert all(math.isnan(value) for value in (result.average_precision, *result.best_dice()))
        return
    precision, recall, before = 0.0, 0.0, 0.0
    for value in sorted(set(scores.tolist()), reverse=True):
        mask = scores >= value
        recall = (mask & reference).sum() / reference.sum()
        precision += (recall - before) * (mask & reference).sum() / mask.sum()
        before = recall
    assert result.average_precision == pytest.approx(precision, abs=1e-12)
    below = np.nextafter(scores.min(), np.float32(-np.inf))
    best, threshold = result.best_dice()
    assert best == pytest.approx(max(dice_of(scores > t, reference) for t in [below, *scores]), abs=1e-12)
    assert best == pytest.approx(dice_of(scores > np.float32(threshold), reference), abs=1e-12), "strictly above"


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 999), levels=st.sampled_from([2, 5, 1000]), share=st.floats(0.05, 0.9))
def test_agrees_with_torchmetrics(seed: int, levels: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    scores = (rng.integers(0, levels, 300) / levels).astype(np.float32)
    reference = rng.uniform(size=300) < share
    reference[:2] = [True, False]
    result, tensors = curve(scores, reference), (torch.from_numpy(scores), torch.from_numpy(reference).long())
    assert result.auroc == pytest.approx(float(binary_auroc(*tensors)), abs=1e-5)
    assert result.average_precision == pytest.approx(float(binary_average_precision(*tensors)), abs=1e-5)


@settings(deadline=None, max_examples=40)
@given(parts=st.lists(cases(), min_size=1, max_size=4))
def test_pooled_cases_are_one_large_case(parts: list[tuple[np.ndarray, np.ndarray]]) -> None:
    pooled = ScoredVoxels.pooled([ScoredVoxels.of(*part) for part in parts])
    whole = ScoredVoxels.of(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    np.testing.assert_array_equal(pooled.positive, whole.positive)
    np.testing.assert_array_equal(pooled.negative, whole.negative)


def test_a_voxel_is_predicted_strictly_above_the_threshold() -> None:
    voxels = ScoredVoxels.of(np.array([0.2, 0.5, 0.5, 0.7], np.float32), np.array([0, 1, 0, 1], bool))
    # At 0.5 the voxels of 0.5 are not predicted: 0.7 alone is, 2 * 1 / (2 + 1).
    np.testing.assert_allclose(voxels.dice(np.array([0.1, 0.2, 0.5, 0.7])), [4 / 6, 4 / 5, 2 / 3, 0])
    dice, threshold = Curve.of(voxels).best_dice()
    assert dice == pytest.approx(4 / 5) and threshold < 0.5 and float(voxels.dice(threshold)) == dice


def test_thresholds_are_compared_in_the_precision_of_the_scores() -> None:
    voxels = ScoredVoxels.of(np.array([0.1, 0.3], np.float32), np.array([0, 1], bool))
    assert float(voxels.dice(0.1)) == 1.0, "float32(0.1) is above the double 0.1, yet not above itself"


def test_voxels_that_do_not_count_are_missed_and_nothing_else() -> None:
    scores = np.array([0.9, 0.8, np.nan, 0.7, 0.1], np.float32)
    reference = np.array([1, 0, 1, 1, 0], bool)
    counted = np.array([1, 1, 1, 0, 1], bool)
    voxels = ScoredVoxels.of(scores, reference, counted)
    assert (voxels.positive.size, voxels.negative.size, voxels.n_outside) == (1, 2, 2)
    result = Curve.of(voxels)
    assert (result.auroc, result.average_precision) == (1, 1)
    assert result.best_dice()[0] == pytest.approx(2 * 1 / (3 + 1)), "as of a mask, with all three voxels of the lesion"
    assert float(voxels.dice(0.85)) == result.best_dice()[0]
    nothing = Curve.of(ScoredVoxels.of(scores, reference, np.zeros(5, bool)))
    assert nothing.best_dice()[0] == 0 and math.isnan(nothing.best_dice()[1]) and math.isnan(nothing.auroc)


def test_drawn_points_are_few_and_lie_on_the_curve() -> None:
    rng = np.random.default_rng(0)
    reference = rng.uniform(size=50_000) < 0.1
    result = curve(rng.normal(size=50_000) + reference, reference)
    roc, recall_precision = result.roc_points(100), result.precision_recall_points(100)
    assert len(roc) <= 402 and len(recall_precision) <= 201
    assert (np.diff(roc, axis=0) >= 0).all() and (np.diff(recall_precision[:, 0]) >= 0).all()
    assert np.trapezoid(roc[:, 1], roc[:, 0]) == pytest.approx(result.auroc, abs=1e-3)
    steps = np.diff(recall_precision[:, 0]) @ recall_precision[1:, 1]
    assert steps == pytest.approx(result.average_precision, abs=5e-3)
    with pytest.raises(ValueError, match="no ROC curve of 2 positive and 0 negative"):
        curve([1, 2], [1, 1]).roc_points()
    with pytest.raises(ValueError, match="without a positive voxel"):
        curve([1, 2], [0, 0]).precision_recall_points()


def test_scores_that_cannot_be_sorted_or_placed_are_refused() -> None:
    with pytest.raises(ValueError, match="infinity"):
        ScoredVoxels.of(np.array([np.inf, 0]), np.array([True, False]))
    with pytest.raises(ValueError, match=r"\(2,\), \(3,\)"):
        ScoredVoxels.of(np.zeros(2), np.zeros(3, bool))


# ---- lesions ---------------------------------------------------------------------------------------------------------


def mask(text: str) -> np.ndarray:
    return np.array([[c == "#" for c in row] for row in text.split()])


def test_parts_that_touch_at_a_corner_are_one() -> None:
    reference = mask("##... ##... ..##. ....# .....")
    lesions = Lesions.of(np.zeros_like(reference), reference, (1, 1))
    assert lesions.size_ml.size == 1 and lesions.sensitivity == 0
    cube = np.zeros((4, 4, 4), bool)
    cube[0, 0, 0] = cube[1, 1, 1] = True  # corner
    cube[3, 3, 3] = True  # alone
    assert Lesions.of(cube, cube, (1, 1, 1)).size_ml.size == 2
    assert Lesions.of(cube, cube, (1, 1, 1)).n_predicted == 2


def test_hits_misses_and_false_positives() -> None:
    #                  lesion of 4   of 2   | hit by one voxel, missed, and two parts elsewhere
    reference = mask("####... ....... ..##... .......")
    prediction = mask("#...... ......# ....... #.#....")
    lesions = Lesions.of(prediction, reference, (1, 1))
    assert lesions.detected.tolist() == [True, False]
    assert (lesions.n_predicted, lesions.n_false) == (4, 3)
    assert lesions.sensitivity == 0.5 and lesions.precision == 0.25
    # One large part over both lesions is one true part.
    both = Lesions.of(np.ones_like(reference), reference, (1, 1))
    assert both.sensitivity == both.precision == 1


@pytest.mark.parametrize(("share", "detected"), [(0.07, True), (0.0700001, False), (0.05, True)])
def test_exactly_the_share_is_enough(share: float, detected: bool) -> None:
    reference = np.ones((1, 100), bool)  # 0.07 * 100 is 7.000000000000001
    prediction = np.arange(100)[None] < 7
    assert Lesions.of(prediction, reference, (1, 1), share).detected.tolist() == [detected]


def test_sizes_are_in_millilitres_and_a_bound_belongs_to_the_larger() -> None:
    reference = np.zeros((7, 50, 100), bool)
    reference[0, 0, :49] = True  # 0.098 ml at 2 mm^3 a voxel
    reference[2, 0, :50] = True  # 0.1
    reference[4, :5] = True  # 1
    reference[6] = True  # 10
    lesions = Lesions.of(reference, reference, (1.25, 1.25, 1.28))
    np.testing.assert_allclose(lesions.size_ml, [0.098, 0.1, 1, 10])
    assert SIZE_BOUNDS_ML == (0.1, 1, 10)
    assert lesions.by_size() == [(1, 1)] * 4
    from_file = Lesions.of(reference, reference, (1.25, 1.25, float(np.float32(1.28))))
    assert from_file.size_ml[1] < 0.1 and from_file.by_size() == lesions.by_size(), "float32(1.28) is below 1.28"
    assert Lesions.of(~reference, reference, (1.25, 1.25, 1.28)).by_size([1]) == [(2, 0), (2, 0)]


def test_no_lesion_has_no_sensitivity_and_no_prediction_no_precision() -> None:
    empty, full = np.zeros((3, 3), bool), np.ones((3, 3), bool)
    lesions = Lesions.of(full, empty, (1, 1))
    assert (
        math.isnan(lesions.sensitivity) and lesions.precision == 0 and (lesions.n_predicted, lesions.n_false) == (1, 1)
    )
    missed = Lesions.of(empty, full, (1, 1))
    assert missed.sensitivity == 0 and math.isnan(missed.precision)
    together = Lesions.pooled([lesions, missed])
    assert (together.sensitivity, together.precision, together.n_predicted) == (0, 0, 1)


def test_unfit_masks_and_shares_are_refused() -> None:
    with pytest.raises(ValueError, match="not of one grid"):
        Lesions.of(np.zeros((2, 2), bool), np.zeros((2, 3), bool), (1, 1))
    for share in (0, 1.5):
        with pytest.raises(ValueError, match="above 0 and not above 1"):
            Lesions.of(np.zeros((2, 2), bool), np.zeros((2, 2), bool), (1, 1), share)
