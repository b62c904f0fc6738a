"""A CT with a tilted gantry: its slices are shifted against each other. Shapes, places and volumes stay right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from medseg_diffusion.volumes.io import read_volume, write_labels
from medseg_diffusion.volumes.preprocessing import Preprocessing
from medseg_diffusion.volumes.resample import straight_grid
from medseg_diffusion.volumes.volume import Volume
from tests.volumes.test_dicom import LPS_RAS, SPACING, series, turned

RADIUS = 14.0  # mm
TILT = np.tan(np.radians(20))


@pytest.fixture
def ball(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """A series with a tilt of 20 degrees and a bright ball in it, and the ball's centre in RAS mm."""
    along, down, normal = turned()
    slices, rows, columns = 20, 40, 72
    k, row, column = np.meshgrid(np.arange(slices), np.arange(rows), np.arange(columns), indexing="ij")
    shift = k * SPACING[2] * TILT
    mm = [column * SPACING[1] + shift, row * SPACING[0], k * SPACING[2]]
    centre = np.array([36.0, 29.0, 28.0])
    inside = sum((x - c) ** 2 for x, c in zip(mm, centre, strict=True)) <= RADIUS**2
    shifts = [i * SPACING[2] * TILT for i in range(slices)]
    values = np.where(inside, 900, 100)
    folder = series(tmp_path / "s", values, modality="CT", shifts=shifts, Rows=rows, Columns=columns)
    lps = np.array([10.0, -20.0, 30.0]) + centre @ np.stack([along, down, normal])
    return folder, lps * LPS_RAS


def moments(mask: torch.Tensor, affine: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Volume in mm3, centre in mm, and standard deviations of the positions along the array's own axes, in mm."""
    places = torch.nonzero(mask).double().numpy()
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    centre = affine[:3, :3] @ places.mean(0) + affine[:3, 3]
    return (
        len(places) * abs(np.linalg.det(affine[:3, :3])),
        centre,
        np.sqrt(np.linalg.eigvalsh(np.cov((places * spacing).T))),
    )


def test_a_ball_stays_a_ball_for_the_model(ball) -> None:
    """On the scan's own sheared grid it is none: its longest axis is a third longer than its shortest."""
    folder, centre = ball
    volume = read_volume(folder)
    truth = 4 / 3 * np.pi * RADIUS**3
    own, place, axes = moments(volume.data[0] > 500, volume.affine)
    assert own == pytest.approx(truth, rel=0.03) and volume.voxel_mm3 == pytest.approx(np.prod(SPACING))
    np.testing.assert_allclose(place, centre, atol=0.3)
    assert axes.max() / axes.min() > 1.3
    model, placement = Preprocessing(spacing_mm=(1.0, 1.0, 1.0)).apply(volume)
    size, place, axes = moments(model[0] > 0, placement.affine)
    assert size == pytest.approx(truth, rel=0.05) and axes.max() / axes.min() < 1.05
    np.testing.assert_allclose(place, centre, atol=0.3)
    columns = placement.affine[:3, :3]
    np.testing.assert_allclose(columns.T @ columns, np.eye(3), atol=1e-6)


def test_the_way_back_gives_the_scans_grid(ball, tmp_path: Path) -> None:
    """The result has the series' own grid, in the file, too."""
    folder, centre = ball
    volume = read_volume(folder)
    model, placement = Preprocessing(spacing_mm=(1.0, 1.0, 1.0)).apply(volume)
    back = placement.restore((model > 0).float())[0] > 0.5
    scan = volume.data[0] > 500
    assert 2 * float((back & scan).sum()) / float(back.sum() + scan.sum()) > 0.95
    write_labels(back.to(torch.uint8), volume, tmp_path / "mask.nii.gz")
    written = read_volume(tmp_path / "mask.nii.gz")
    np.testing.assert_allclose(written.affine, volume.affine, atol=1e-4)
    np.testing.assert_allclose(moments(written.data[0] > 0, written.affine)[1], centre, atol=0.3)


@pytest.mark.parametrize("flips", [(1, 1, 1), (1, -1, 1), (-1, 1, -1)])
def test_the_straight_grid_covers_the_sheared_one(flips) -> None:
    """Slices stay where they are; every voxel of the old grid lies in the new one."""
    affine = np.eye(4)
    affine[:3, :3] = np.array([[0.5, 0.0, 0.0], [0.0, 0.5, 1.8], [0.0, 0.0, 5.0]]) * flips
    shape = (30, 40, 12)
    straight, size = straight_grid(shape, affine)
    assert size == (30, 84, 12)  # 12 slices that move by 3.6 voxels each
    np.testing.assert_allclose(straight[2], affine[2])  # the heights of the slices
    corners = np.array([[i, j, k, 1] for i in (0, 29) for j in (0, 39) for k in (0, 11)])
    places = (np.linalg.inv(straight) @ affine @ corners.T)[:3]
    assert places.min() > -0.51 and (places.max(1) < np.array(size) - 0.49).all()
    flat, same = straight_grid(shape, np.diag([1.0, 2.0, 3.0, 1.0]))
    assert same == shape and (flat == np.diag([1.0, 2.0, 3.0, 1.0])).all()


def test_voxels_of_a_sheared_volume_are_smaller_than_their_sides() -> None:
    affine = np.eye(4)
    affine[1, 2] = 1.0
    assert Volume(torch.zeros(1, 2, 2, 2), affine).voxel_mm3 == pytest.approx(1.0)
