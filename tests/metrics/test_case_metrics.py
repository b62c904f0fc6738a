"""All metrics of a class: brute force, MONAI, surface-distance, closed forms, and every kind of empty mask."""

from __future__ import annotations

import math
from itertools import combinations, product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from medseg_diffusion.metrics.case_metrics import MeasureOptions, absent, centreline, labels_of, measure
from medseg_diffusion.metrics.registry import COMPUTED, METRICS, measured

EVERYTHING = MeasureOptions(cldice=True)


def metrics_of(prediction, reference, spacing, options=MeasureOptions()) -> dict[str, float]:
    prediction, reference = (np.asarray(mask).astype(np.int32) for mask in (prediction, reference))
    return dict(measure(prediction, reference, [1], spacing, options)[1].metrics)


# ---- brute force -----------------------------------------------------------------------------------------------------


def surface_points(mask: np.ndarray) -> list[tuple[int, ...]]:
    """Voxels with a neighbour across a face that is outside of the mask or of the grid, along axes wider than 1."""
    wide = [axis for axis in range(mask.ndim) if mask.shape[axis] > 1] or [0]
    points = []
    for place in zip(*np.nonzero(mask), strict=True):
        for axis, step in product(wide, (-1, 1)):
            other = list(place)
            other[axis] += step
            if not 0 <= other[axis] < mask.shape[axis] or not mask[tuple(other)]:
                points.append(place)
                break
    return points


def components(mask: np.ndarray) -> list[set[tuple[int, ...]]]:
    """Groups of voxels that are connected across faces, edges or corners."""
    left = set(zip(*(map(int, axis) for axis in np.nonzero(mask)), strict=True))
    groups = []
    while left:
        group, border = set(), {left.pop()}
        while border:
            group |= border
            steps = list(product((-1, 0, 1), repeat=mask.ndim))
            border = {tuple(a + b for a, b in zip(v, s, strict=True)) for v in border for s in steps} & left
            left -= border
        groups.append(group)
    return groups


def by_brute_force(prediction: np.ndarray, reference: np.ndarray, spacing, tolerance: float) -> dict[str, float]:
    """The metrics of two masks that are not empty, by loops over voxels and pairs."""
    p, r = ({place for place in zip(*np.nonzero(mask), strict=True)} for mask in (prediction, reference))
    surfaces = [surface_points(mask) for mask in (prediction, reference)]

    def nearest(points, others) -> list[float]:
        return [min(math.dist(np.multiply(a, spacing), np.multiply(b, spacing)) for b in others) for a in points]

    there, back = nearest(*surfaces), nearest(*surfaces[::-1])
    found, lesions = components(prediction), components(reference)
    detected = [len(lesion & p) / len(lesion) >= 0.1 for lesion in lesions]
    hits = [bool(group & r) for group in found]
    pairs = [len(a & b) / len(a | b) for a, b in product(found, lesions) if len(a & b) / len(a | b) > 0.5]
    precision, recall = sum(hits) / len(found), sum(detected) / len(lesions)
    return {
        "dice": 2 * len(p & r) / (len(p) + len(r)),
        "iou": len(p & r) / len(p | r),
        "precision": len(p & r) / len(p),
        "recall": len(p & r) / len(r),
        "hd95_mm": max(np.percentile(there, 95), np.percentile(back, 95)),
        "assd_mm": sum(there + back) / len(there + back),
        "nsd": sum(distance <= tolerance * (1 + 1e-5) for distance in there + back) / len(there + back),
        "volume_ml": len(p) * math.prod(spacing) / 1000,
        "reference_volume_ml": len(r) * math.prod(spacing) / 1000,
        "volume_error_ml": (len(p) - len(r)) * math.prod(spacing) / 1000,
        "absolute_volume_error_ml": abs(len(p) - len(r)) * math.prod(spacing) / 1000,
        "volume_error_percent": 100 * (len(p) - len(r)) / len(r),
        "reference_lesions": len(lesions),
        "predicted_lesions": len(found),
        "lesion_precision": precision,
        "lesion_recall": recall,
        "lesion_f1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        "pq": sum(pairs) / (len(pairs) + (len(found) - len(pairs)) / 2 + (len(lesions) - len(pairs)) / 2),
        "sq": sum(pairs) / len(pairs) if pairs else math.nan,
        "rq": len(pairs) / (len(pairs) + (len(found) - len(pairs)) / 2 + (len(lesions) - len(pairs)) / 2),
    }


@st.composite
def two_masks(draw):
    shape = draw(arrays.array_shapes(min_dims=2, max_dims=3, min_side=1, max_side=6))
    masks = [draw(arrays.arrays(np.bool_, shape)) if draw(st.booleans()) else np.zeros(shape, bool) for _ in range(2)]
    for mask in masks:  # and a box each, which may be a plate, a line or a single voxel
        ends = [sorted((draw(st.integers(0, size - 1)), draw(st.integers(0, size - 1)))) for size in shape]
        mask[tuple(slice(low, high + 1) for low, high in ends)] = True
    spacing = draw(st.lists(st.sampled_from([0.5, 1.0, 2.5, 4.0]), min_size=len(shape), max_size=len(shape)))
    return masks[0], masks[1], spacing, draw(st.sampled_from([0.5, 1.0, 2.0]))


@settings(max_examples=150, deadline=None)
@given(two_masks())
def test_every_metric_is_that_of_brute_force(case) -> None:
    prediction, reference, spacing, tolerance = case
    values = metrics_of(prediction, reference, spacing, MeasureOptions(tolerance))
    expected = by_brute_force(prediction, reference, spacing, tolerance)
    assert set(values) == set(expected)
    for name, value in expected.items():
        assert values[name] == pytest.approx(value, abs=1e-9, nan_ok=True), name


# ---- empty masks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("shape", [(5, 6, 4), (5, 6), (5, 6, 1)])
@pytest.mark.parametrize(("predicted", "expected"), [(False, False), (False, True), (True, False)])
def test_empty_masks_follow_the_rule_of_the_metric(name, shape, predicted, expected) -> None:
    masks = [np.zeros(shape, np.int32) for _ in range(2)]
    masks[0][1:3, 1:4], masks[1][1:3, 1:4] = predicted, expected
    spacing = (1.0, 2.0, 5.0)[: len(shape)]
    value = metrics_of(*masks, spacing, EVERYTHING)[name]
    rule = METRICS[name].value_if_empty(prediction=not predicted, reference=not expected)
    if rule != COMPUTED:
        np.testing.assert_equal(value, rule)
    ml = np.prod(spacing) * np.count_nonzero(masks[0] + masks[1]) / 1000
    computed = {
        "volume_ml": ml if predicted else 0,
        "reference_volume_ml": ml if expected else 0,
        "volume_error_ml": ml if predicted else -ml if expected else 0,
        "absolute_volume_error_ml": ml,
        "reference_lesions": int(expected),
        "predicted_lesions": int(predicted),
    }
    assert rule != COMPUTED or value == pytest.approx(computed[name])


@pytest.mark.parametrize(("predicted", "expected"), [(False, False), (False, True), (True, False)])
def test_where_a_formula_exists_the_rule_agrees_with_it(predicted, expected) -> None:
    """No rule contradicts the definition: 0 / n stays 0, and only 0 / 0 is missing."""
    p, r = int(predicted), int(expected)
    formulas = {"dice": (0, p + r), "iou": (0, p + r), "precision": (0, p), "recall": (0, r), "rq": (0, p + r)}
    for name, (part, whole) in formulas.items():
        rule = METRICS[name].value_if_empty(prediction=not predicted, reference=not expected)
        np.testing.assert_equal(rule, part / whole if whole else math.nan)


def test_a_class_of_neither_mask_has_the_result_of_two_empty_masks() -> None:
    nothing = np.zeros((3, 4, 5), np.int32)
    np.testing.assert_equal(
        vars(absent(60, EVERYTHING)), vars(measure(nothing, nothing, [7], (1, 1, 1), EVERYTHING)[7])
    )


# ---- closed forms ----------------------------------------------------------------------------------------------------


def test_single_voxels_are_their_distance_apart() -> None:
    prediction, reference = (np.zeros((9, 9, 9), np.int32) for _ in range(2))
    prediction[2, 3, 4] = reference[5, 7, 4] = 1
    values = metrics_of(prediction, reference, (1.0, 0.5, 3.0), EVERYTHING)
    distance = math.hypot(3 * 1.0, 4 * 0.5)
    assert values["hd95_mm"] == values["assd_mm"] == pytest.approx(distance)
    assert values["dice"] == values["nsd"] == values["cldice"] == values["lesion_f1"] == values["pq"] == 0
    assert metrics_of(reference, reference, (1.0, 0.5, 3.0))["nsd"] == 1


def test_a_lesion_in_one_slice_has_a_surface_towards_the_other_slices() -> None:
    """Cropping must not turn a plate in a scan into a 2D image, whose surface is its outline alone."""
    prediction, reference = np.zeros((20, 20, 5), np.int32), np.zeros((20, 20, 5), np.int32)
    prediction[2:12, 2:12, 2] = reference[2:12, 2:12, 2] = 1
    prediction[6:8, 6:8, 2] = 0
    values = metrics_of(prediction, reference, (1.0, 1.0, 3.0), MeasureOptions(0.5))
    assert values["nsd"] == pytest.approx((96 + 96) / (96 + 100)), "the four voxels in the middle are not at 0 mm"


def test_a_tolerance_of_one_voxel_includes_neighbours_whatever_the_rounding() -> None:
    """Files hold voxel sizes in float32: 0.1 mm is stored as 0.10000000149."""
    prediction, reference = np.zeros((10, 10, 10), np.int32), np.zeros((10, 10, 10), np.int32)
    prediction[3], reference[4] = 1, 1
    size = float(np.float32(0.1))
    assert metrics_of(prediction, reference, [size] * 3, MeasureOptions(0.1))["nsd"] == 1
    assert metrics_of(prediction, reference, [size] * 3, MeasureOptions(0.0999))["nsd"] == 0


def test_tolerances_belong_to_classes() -> None:
    prediction, reference = (np.zeros((12, 6, 6), np.int32) for _ in range(2))
    prediction[2], reference[3] = 1, 1
    prediction[8], reference[9] = 2, 2
    results = measure(prediction, reference, [1, 2], (2.0, 1.0, 1.0), MeasureOptions(1.0, {2: 2.0}))
    assert (results[1].metrics["nsd"], results[2].metrics["nsd"]) == (0, 1)


def test_panoptic_quality_by_hand() -> None:
    """One match of IoU 2/3, one prediction too much, one lesion missed: SQ is 2/3, RQ 1 / (1 + 1/2 + 1/2)."""
    reference, prediction = np.zeros((1, 20), np.int32), np.zeros((1, 20), np.int32)
    reference[0, 0:3], prediction[0, 0:2] = 1, 1
    reference[0, 6:9], prediction[0, 12:15] = 1, 1
    values = metrics_of(prediction, reference, (1.0, 1.0))
    assert (values["sq"], values["rq"], values["pq"]) == pytest.approx((2 / 3, 1 / 2, 1 / 3))
    assert (values["lesion_precision"], values["lesion_recall"], values["lesion_f1"]) == (0.5, 0.5, 0.5)


def test_an_iou_of_one_half_is_no_match() -> None:
    reference, prediction = np.ones((1, 4), np.int32), np.array([[1, 1, 0, 0]], np.int32)
    values = metrics_of(prediction, reference, (1.0, 1.0))
    assert values["iou"] == 0.5 and values["pq"] == values["rq"] == 0 and math.isnan(values["sq"])


def test_cldice_counts_centrelines_and_not_thickness() -> None:
    """A tube that is twice as thick has another Dice, but the same centreline."""
    thin, thick = np.zeros((11, 11, 30), np.int32), np.zeros((11, 11, 30), np.int32)
    thin[5, 5, 2:28], thick[4:7, 4:7, 2:28] = 1, 1
    values = metrics_of(thick, thin, (1.0, 1.0, 1.0), EVERYTHING)
    assert values["cldice"] == 1 and values["dice"] < 0.25
    half = thin.copy()
    half[:, :, 15:] = 0  # the prediction ends half-way: its line is right, half of the reference's is missing
    assert metrics_of(half, thin, (1.0, 1.0, 1.0), EVERYTHING)["cldice"] == pytest.approx(2 / 3, abs=0.01)
    assert "cldice" not in metrics_of(half, thin, (1.0, 1.0, 1.0))


@pytest.mark.parametrize("shape", [(4, 4, 4), (2, 2, 9), (2, 2, 2), (3, 3, 9), (5, 6), (2, 2), (1, 7)])
def test_every_component_has_a_centreline_inside_of_it(shape) -> None:
    """scikit-image's thinning deletes tubes of two voxels' width, which would leave a vessel without clDice."""
    mask = np.pad(np.ones(shape, bool), 2)
    line = centreline(mask)
    assert line.any() and not (line & ~mask).any()
    assert metrics_of(mask, mask, (1.0,) * len(shape), EVERYTHING)["cldice"] == 1


# ---- what must not matter --------------------------------------------------------------------------------------------


def blobs(shape: tuple[int, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two similar label maps of classes 1 to 3 with many components."""
    from scipy import ndimage

    rng = np.random.default_rng(seed)
    base, noise = (ndimage.gaussian_filter(rng.standard_normal(shape), 2) for _ in range(2))
    return tuple(
        np.digitize(field / base.std(), (0.8, 1.3, 1.9)).astype(np.int32) for field in (base + 0.3 * noise, base)
    )


def test_a_2d_image_has_the_metrics_of_its_slice() -> None:
    pair = blobs((40, 50), 0)
    flat = measure(*pair, [1, 2, 3], (0.7, 1.3), EVERYTHING)
    for axis in range(3):
        thick = [np.expand_dims(labels, axis) for labels in pair]
        spacing = np.insert((0.7, 1.3), axis, 1.0)
        assert measure(*thick, [1, 2, 3], spacing, EVERYTHING) == flat


def test_margin_axes_and_other_classes_change_nothing() -> None:
    prediction, reference = blobs((30, 26, 20), 1)
    spacing = (1.0, 2.0, 3.0)
    expected = measure(prediction, reference, [1, 2, 3], spacing)
    padded = [np.pad(labels, 5) for labels in (prediction, reference)]
    turned = [labels.transpose(2, 0, 1)[::-1] for labels in (prediction, reference)]
    for label in (1, 2, 3):
        alone = [np.where(labels == label, 9, 0) for labels in (prediction, reference)]
        for values in (
            measure(*padded, [3, 2, 1], spacing)[label],
            measure(*turned, [label], (3.0, 1.0, 2.0))[label],
            measure(*alone, [9], spacing)[9],
        ):
            assert dict(values.metrics) == pytest.approx(dict(expected[label].metrics), rel=1e-12, nan_ok=True)


def test_swapped_masks_swap_precision_and_recall_and_keep_distances() -> None:
    first, second = blobs((30, 26, 20), 2)
    there, back = (
        metrics_of(*[labels > 0 for labels in pair], (1, 1, 2)) for pair in ((first, second), (second, first))
    )
    for name in ("dice", "iou", "hd95_mm", "assd_mm", "nsd", "pq", "sq", "rq", "absolute_volume_error_ml"):
        assert there[name] == pytest.approx(back[name], rel=1e-12), name
    assert (there["precision"], there["recall"]) == (back["recall"], back["precision"])
    assert there["volume_error_ml"] == -back["volume_error_ml"]


def test_labels_of_a_map() -> None:
    assert labels_of(np.array([[0, 7], [300, 7]])) == [7, 300] and labels_of(np.zeros((2, 2), np.int32)) == []


def test_label_maps_of_two_grids_are_refused() -> None:
    with pytest.raises(ValueError, match="not of one grid"):
        measure(np.zeros((2, 2), np.int32), np.zeros((2, 3), np.int32), [1], (1, 1))


def test_columns_and_keys_are_distinct_and_complete() -> None:
    metrics = list(METRICS.values())
    for first, second in combinations(metrics, 2):
        assert first.name != second.name and first.key != second.key and first.heading != second.heading
    assert [one.name for one in measured(cldice=False)] == list(metrics_of(*blobs((20, 20), 3), (1, 1)))


# ---- other implementations -------------------------------------------------------------------------------------------


def real_pair(folder: Path, case: str) -> tuple[np.ndarray, np.ndarray, tuple[float, ...]]:
    """A manual mask of the hippocampus, and the same moved and thinned as a prediction; spacing made anisotropic."""
    file = folder / "Task04_Hippocampus" / "labelsTr" / f"{case}.nii.gz"
    reference = np.asarray(nib.load(file).dataobj).astype(np.int32)
    prediction = np.roll(reference, (1, -1, 0), (0, 1, 2))
    prediction[::7] = 0
    return prediction, reference, (0.9, 1.1, 2.5)


@pytest.mark.data
@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")  # MONAI's own call
@pytest.mark.parametrize("case", ["hippocampus_001", "hippocampus_004"])
def test_real_masks_have_the_numbers_of_monai(case, data_folder: Path) -> None:
    from monai.metrics import compute_dice, compute_hausdorff_distance, compute_iou, compute_surface_dice

    prediction, reference, spacing = real_pair(data_folder, case)
    results = measure(prediction, reference, [1, 2], spacing, MeasureOptions(1.2))
    masks = [torch.from_numpy(np.stack([labels == k for k in range(3)])[None]) for labels in (prediction, reference)]
    expected = {
        "dice": compute_dice(*masks, include_background=False),
        "iou": compute_iou(*masks, include_background=False),
        "hd95_mm": compute_hausdorff_distance(*masks, percentile=95, spacing=spacing),
        "nsd": compute_surface_dice(*masks, [1.2, 1.2], spacing=spacing),
    }
    for name, values in expected.items():
        for label in (1, 2):
            assert results[label].metrics[name] == pytest.approx(float(values[0, label - 1]), abs=1e-5), name


@pytest.mark.data
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the package is of 2018
@pytest.mark.parametrize("case", ["hippocampus_001", "hippocampus_004"])
def test_real_masks_have_nearly_the_numbers_of_surface_distance(case, data_folder: Path) -> None:
    """The surface is another one, of area-weighted elements between voxels: numbers are near, but not the same."""
    surface_distance = pytest.importorskip("surface_distance")
    prediction, reference, spacing = real_pair(data_folder, case)
    results = measure(prediction, reference, [1, 2], spacing, MeasureOptions(2.0))
    for label in (1, 2):
        distances = surface_distance.compute_surface_distances(reference == label, prediction == label, spacing)
        hd95 = surface_distance.compute_robust_hausdorff(distances, 95)
        nsd = surface_distance.compute_surface_dice_at_tolerance(distances, 2.0)
        assert results[label].metrics["hd95_mm"] == pytest.approx(hd95, abs=max(spacing) / 2)
        assert results[label].metrics["nsd"] == pytest.approx(nsd, abs=0.1)
