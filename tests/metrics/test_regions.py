"""Size, place and intensity of classes: compared with the same numbers computed voxel by voxel."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest

from medseg_diffusion.metrics.regions import regions

SHEARED = np.array([[-0.9, 0.1, 0.3, 40.0], [0.1, 1.1, 0.2, -30.0], [0.05, -0.2, 2.0, 5.0], [0.0, 0.0, 0.0, 1.0]])
TURNED = np.eye(4)
TURNED[:3, :3] = nib.eulerangles.euler2mat(0.4, -0.3, 0.2) @ np.diag([0.5, 1.0, 3.0])


@pytest.mark.parametrize("affine", [np.diag([1.0, 2.0, 3.0, 1.0]), SHEARED, TURNED], ids=["plain", "sheared", "turned"])
def test_against_every_voxel_alone(affine: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    labels = rng.choice([0, 0, 0, 1, 2, 4], (9, 7, 8)).astype(np.uint8)
    labels[:, :2] = labels[-1] = labels[..., 0] = 0
    image = rng.normal(100, 20, (2, *labels.shape)).astype(np.float32)
    measured = regions(labels, image, affine, 5)
    assert len(measured) == 5
    for value in (1, 2, 4):
        found, index = measured[value - 1], np.argwhere(labels == value)
        places = index @ affine[:3, :3].T + affine[:3, 3]
        assert found.voxels == len(index)
        np.testing.assert_allclose(found.centroid_mm, places.mean(0), atol=1e-9)
        expected = places.max(0) - places.min(0) + np.abs(affine[:3, :3]).sum(1)
        np.testing.assert_allclose(found.extent_mm, expected, atol=1e-9)
        for channel, both in zip(image.astype(np.float64), found.intensities, strict=True):
            np.testing.assert_allclose(both, (channel[labels == value].mean(), channel[labels == value].std()))
    for empty in (measured[2], measured[4]):
        assert (empty.voxels, empty.extent_mm, empty.centroid_mm, empty.touches_border) == (0, None, None, False)
        assert empty.intensities == (None, None)


def test_a_block_has_the_extent_of_its_edges() -> None:
    labels = np.zeros((10, 10, 10), np.uint8)
    labels[2:5, 3:4, 1:9] = 1
    (block,) = regions(labels, np.ones((1, 10, 10, 10), np.float32), np.diag([-2.0, 1.0, 0.5, 1.0]), 1)
    assert block.extent_mm == (6.0, 1.0, 4.0) and block.intensities == ((1.0, 0.0),)


@pytest.mark.parametrize(("index", "touches"), [((0, 3, 3), True), ((3, 3, 5), True), ((1, 4, 4), False)])
def test_the_border_is_the_first_and_the_last_layer(index: tuple[int, int, int], touches: bool) -> None:
    labels = np.zeros((6, 6, 6), np.uint8)
    labels[index] = 1
    assert regions(labels, labels[None].astype(np.float32), np.eye(4), 1)[0].touches_border == touches


def test_a_single_layer_is_no_border() -> None:
    labels = np.zeros((6, 6, 1), np.uint8)
    labels[2:4, 2:4] = 1
    assert not regions(labels, labels[None].astype(np.float32), np.eye(4), 1)[0].touches_border
