"""Two label maps in memory, compared."""

from __future__ import annotations

from dataclasses import fields
from math import isnan
from pathlib import Path

import numpy as np
import pytest
import torch

from medseg_diffusion.api.evaluation import ClassMetrics, evaluate_arrays
from medseg_diffusion.errors import InputError, UsageError
from medseg_diffusion.metrics.registry import measured
from medseg_diffusion.volumes.io import read_labels
from tests.helpers.volumes import oblique, save


def box(width: int, label: int = 1) -> np.ndarray:
    array = np.zeros((10, 10, 10), np.uint8)
    array[2 : 2 + width, 2:6, 2:6] = label
    return array


def test_the_fields_are_the_metrics_of_an_evaluation() -> None:
    assert [field.name for field in fields(ClassMetrics)] == ["name", *(one.name for one in measured(cldice=False))]


def test_boxes_that_differ_by_two_planes() -> None:
    """4 x 4 x 4 against 6 x 4 x 4 voxels of 2 x 1 x 1 mm: the planes are 2 and 4 mm away."""
    found = evaluate_arrays(box(4), box(6), (2.0, 1.0, 1.0), {1: "box"})[1]
    assert found.name == "box" and found.dice == pytest.approx(2 * 64 / (64 + 96))
    assert (found.precision, found.recall) == (1.0, pytest.approx(64 / 96))
    assert (found.volume_ml, found.reference_volume_ml) == (pytest.approx(0.128), pytest.approx(0.192))
    assert found.hd95_mm == pytest.approx(4.0)
    assert evaluate_arrays(box(4), box(6), (1.0, 1.0, 1.0))[1].hd95_mm == pytest.approx(2.0)
    wide = evaluate_arrays(box(4), box(6), (2.0, 1.0, 1.0), tolerance_mm=4.0)[1]
    assert wide.nsd == 1.0 > found.nsd


def test_labels_are_those_asked_for_or_all_that_occur() -> None:
    both = box(4) + box(6, 3) * (box(4) == 0)
    assert list(evaluate_arrays(both, box(4), (1, 1, 1))) == [1, 3]
    found = evaluate_arrays(both, box(4), (1, 1, 1), [3, 7])
    assert found[3].dice == 0.0 and isnan(found[7].dice) and found[7].name == "label 7"
    assert list(evaluate_arrays(both, both, (1, 1, 1), {0: "background", 1: "box"})) == [1]
    with pytest.raises(UsageError, match="label -1: labels are 0, the background, or above"):
        evaluate_arrays(both, both, (1, 1, 1), [-1, 1])
    with pytest.raises(UsageError, match="a tolerance of 0 mm"):
        evaluate_arrays(both, both, (1, 1, 1), tolerance_mm=0)


def test_files_images_and_volumes_have_their_own_voxel_size(tmp_path: Path) -> None:
    path = save(tmp_path / "reference.nii.gz", box(6), affine=oblique())
    expected = evaluate_arrays(box(4), box(6), (0.9, 1.1, 2.5))[1]
    for reference in (path, str(path), read_labels(path)):
        found = evaluate_arrays(box(4), reference)[1]
        assert found.hd95_mm == pytest.approx(expected.hd95_mm, rel=1e-5)
        assert evaluate_arrays(path, reference)[1].dice == 1.0
    for prediction in (path, box(4)):
        with pytest.raises(UsageError, match="spacing_mm is for arrays"):
            evaluate_arrays(prediction, path, (1, 1, 1))
    with pytest.raises(InputError, match="the array: found no voxel size"):
        evaluate_arrays(box(4), box(4))
    with pytest.raises(InputError, match="resample one onto the other's grid"):
        evaluate_arrays(save(tmp_path / "other.nii.gz", box(4), affine=np.eye(4)), path)
    with pytest.raises(InputError, match="resample one onto the other's grid"):
        evaluate_arrays(box(4)[:-1], box(4), (1, 1, 1))


def test_tensors_are_arrays(tmp_path: Path) -> None:
    """Networks give tensors; one beside a file is on the grid of the file, as an array is."""
    tensor, expected = torch.from_numpy(box(4)), evaluate_arrays(box(4), box(6), (2, 1, 1))
    assert evaluate_arrays(tensor, box(6), (2, 1, 1)) == expected  # type: ignore[arg-type]
    path = save(tmp_path / "reference.nii.gz", box(6), affine=np.diag([2.0, 1.0, 1.0, 1.0]))
    assert evaluate_arrays(tensor, path) == expected  # type: ignore[arg-type]


def test_a_sheared_voxel_has_its_own_volume(tmp_path: Path) -> None:
    """Of a tilted gantry: 1 x 1 mm with 2 mm along an axis at 30 degrees to the others' normal."""
    affine = np.array([[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 3**0.5, 0], [0, 0, 0, 1]], float)
    path = save(tmp_path / "tilted.nii.gz", box(4), affine=affine)
    found = evaluate_arrays(path, path)[1]
    assert read_labels(path).spacing == pytest.approx((1, 1, 2))
    assert found.volume_ml == found.reference_volume_ml == pytest.approx(64 * 3**0.5 / 1000, rel=1e-5)
