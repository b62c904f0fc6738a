from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from monai.metrics import DiceMetric, MeanIoU

from medseg_diffusion.metrics import overlap
from medseg_diffusion.metrics.overlap import EMPTY_POLICY, ClassOverlap, label_overlap

# Two 4 x 3 squares shifted by one column:   prediction   reference   both
#                                             1 1 1 .      . 1 1 1     . # # .
SHIFTED = np.zeros((4, 4), int), np.zeros((4, 4), int)
SHIFTED[0][:, :3] = 1
SHIFTED[1][:, 1:] = 1


def test_shifted_square() -> None:
    item = label_overlap(*SHIFTED, [1])[1]
    assert (item.tp, item.fp, item.fn, item.tn) == (4 * 2, 4, 4, 0)
    assert (item.n_pred, item.n_ref) == (12, 12)
    assert item.dice == 2 * 8 / (12 + 12)
    assert item.iou == 8 / (8 + 4 + 4)


def test_one_class_mistaken_for_another_in_3d() -> None:
    reference = np.zeros((2, 3, 4), np.uint8)
    reference[0], reference[1, 0] = 1, 2  # 12 voxels and 4
    prediction = reference.copy()
    prediction[0, 0] = 2  # 4 voxels of class 1 called class 2
    overlaps = label_overlap(prediction, reference, [1, 2])
    assert overlaps[1] == ClassOverlap(8, 0, 4, 12, 8, 12, 2 * 8 / 20, 8 / 12)
    assert overlaps[2] == ClassOverlap(4, 4, 0, 16, 8, 4, 2 * 4 / 12, 4 / 8)


def test_swapping_the_sides_swaps_the_errors() -> None:
    prediction, reference = np.array([[1, 1, 1, 0]]), np.array([[0, 0, 1, 1]])
    one, other = label_overlap(prediction, reference, [1])[1], label_overlap(reference, prediction, [1])[1]
    assert (one.fp, one.fn, one.n_pred, one.n_ref) == (2, 1, 3, 2) == (other.fn, other.fp, other.n_ref, other.n_pred)
    assert one.dice == other.dice == 2 / 5


@pytest.mark.parametrize(
    ("prediction", "reference", "rule"),
    [
        ([[0, 0]], [[0, 0]], "both_empty"),
        ([[0, 0]], [[0, 1]], "prediction_empty"),
        ([[1, 0]], [[0, 0]], "reference_empty"),
    ],
)
def test_empty_masks(prediction: list[list[int]], reference: list[list[int]], rule: str) -> None:
    item = label_overlap(np.array(prediction), np.array(reference), [1])[1]
    expected = {"both_empty": math.nan, "prediction_empty": 0.0, "reference_empty": 0.0}[rule]
    np.testing.assert_equal([item.dice, item.iou, EMPTY_POLICY[rule]], [expected] * 3)


def test_labels_that_are_not_asked_for_are_another_class() -> None:
    # 7 is in neither list of results, and must not be taken for its neighbours 5 and 9 in the sorted list.
    overlaps = label_overlap(np.array([[7, 5, 9]]), np.array([[5, 5, 7]]), [9, 5])
    assert list(overlaps) == [5, 9]
    assert (overlaps[5].tp, overlaps[5].fp, overlaps[5].fn, overlaps[5].tn) == (1, 0, 1, 1)
    assert (overlaps[9].tp, overlaps[9].fp, overlaps[9].fn, overlaps[9].tn) == (0, 1, 0, 2)
    assert label_overlap(np.array([[7]]), np.array([[7]]), []) == {}


def test_large_arrays_are_counted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    prediction, reference = rng.integers(0, 4, (2, 7, 5, 3))
    whole = label_overlap(prediction, reference, range(4))
    monkeypatch.setattr(overlap, "_CHUNK", 8)  # 105 voxels: 13 full parts and one of 1 voxel
    assert label_overlap(prediction, reference, range(4)) == whole


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"\(2, 2\).*\(2, 3\)"):
        label_overlap(np.zeros((2, 2), int), np.zeros((2, 3), int), [1])
    with pytest.raises(ValueError, match="ref has dtype float64"):
        label_overlap(np.zeros((2, 2), int), np.zeros((2, 2)), [1])


def brute_force(prediction: np.ndarray, reference: np.ndarray, label: int) -> tuple[int, int, int, int]:
    tp = fp = fn = tn = 0
    for p, r in zip(prediction.flat, reference.flat, strict=True):
        tp += p == label and r == label
        fp += p == label and r != label
        fn += p != label and r == label
        tn += p != label and r != label
    return tp, fp, fn, tn


@st.composite
def label_pairs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    shape = draw(hnp.array_shapes(min_dims=2, max_dims=3, max_side=5))
    dtype = draw(st.sampled_from([np.uint8, np.int16, np.int64]))
    labels = hnp.arrays(dtype, shape, elements=st.sampled_from([0, 1, 2, 100]))
    return draw(labels), draw(labels)


@settings(max_examples=60, deadline=None)
@given(label_pairs(), st.sets(st.sampled_from([0, 1, 2, 3, 100])))
def test_equals_counting_voxel_by_voxel(pair: tuple[np.ndarray, np.ndarray], labels: set[int]) -> None:
    overlaps = label_overlap(*pair, labels)
    assert set(overlaps) == labels
    for label, item in overlaps.items():
        assert (item.tp, item.fp, item.fn, item.tn) == brute_force(*pair, label)
        assert (item.n_pred, item.n_ref) == (item.tp + item.fp, item.tp + item.fn)


@pytest.mark.parametrize("shape", [(9, 8), (6, 5, 4)])
def test_equals_monai(shape: tuple[int, ...]) -> None:
    prediction, reference = np.random.default_rng(1).integers(0, 3, (2, *shape))
    one_hot = [
        torch.from_numpy(np.stack([array == k for k in range(3)])[None]).float() for array in (prediction, reference)
    ]
    dice = DiceMetric(reduction="none")(*one_hot)[0].tolist()
    iou = MeanIoU(reduction="none")(*one_hot)[0].tolist()
    overlaps = label_overlap(prediction, reference, range(3))
    assert [overlaps[k].dice for k in range(3)] == pytest.approx(dice, rel=1e-6)
    assert [overlaps[k].iou for k in range(3)] == pytest.approx(iou, rel=1e-6)
