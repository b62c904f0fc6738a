"""The shape prior: what hangs on an organ goes, the organ stays, wherever it is cut off, and doubt changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from medseg_diffusion.methods.shape_prior import ShapePrior, average_shape

SPACING = 3.0
SHAPE = (64, 72, 80)


def egg(centre: tuple[float, float, float], half_axes: tuple[float, float, float], degrees: float = 0.0) -> Tensor:
    """An egg in millimetres, pitched about the first axis: bool (*SHAPE) on voxels of 3 mm."""
    axes = [torch.arange(n) * SPACING for n in SHAPE]
    x, y, z = (a - c for a, c in zip(torch.meshgrid(*axes, indexing="ij"), centre, strict=True))
    angle = torch.deg2rad(torch.tensor(degrees))
    y, z = angle.cos() * y - angle.sin() * z, angle.sin() * y + angle.cos() * z
    wide = 1 + 0.25 * (y / half_axes[1]).clamp(-1, 1)  # blunter behind than in front
    return (x / (half_axes[0] * wide)) ** 2 + (y / half_axes[1]) ** 2 + (z / (half_axes[2] * wide)) ** 2 < 1


@pytest.fixture(scope="module")
def prior() -> ShapePrior:
    sizes = [(60, 80, 60), (64, 84, 62), (57, 78, 63), (62, 75, 57)]
    made = [egg((96, 108 + 6 * i, 130), size, degrees=4.0 * i) for i, size in enumerate(sizes)]
    return average_shape(made, SPACING)


@pytest.mark.parametrize("degrees", [-15.0, 0.0, 12.0])
@pytest.mark.parametrize("scale", [0.88, 1.1])
def test_what_hangs_on_the_organ_goes_and_the_organ_stays(prior, degrees, scale) -> None:
    organ = egg((90, 114, 150), (60 * scale, 80 * scale, 60 * scale), degrees)
    neck = egg((90, 120, 40), (33, 45, 60))
    found = organ | neck
    near = prior.near(found, [SPACING] * 3, 6.0)
    assert near is not None
    assert float((organ & ~near).sum() / organ.sum()) < 0.01
    assert float((neck & ~organ & near).sum() / (neck & ~organ).sum()) < 0.35


@pytest.mark.parametrize("cut", ["upper half", "lower half", "left half", "slab", "box"])
def test_an_organ_that_the_border_cuts_off_stays(prior, cut) -> None:
    organ = egg((96, 108, 120), (60, 80, 60))
    parts = {
        "upper half": (slice(None), slice(None), slice(40, None)),
        "lower half": (slice(None), slice(None), slice(0, 40)),
        "left half": (slice(0, 32), slice(None), slice(None)),
        "slab": (slice(None), slice(None), slice(34, 46)),
        "box": (slice(11, 54), slice(9, 63), slice(20, 61)),
    }
    found = organ[parts[cut]]
    near = prior.near(found, [SPACING] * 3, 6.0)
    assert near is None or float((found & ~near).sum() / found.sum()) < 0.01


def test_the_voxel_size_does_not_matter(prior) -> None:
    found = egg((90, 114, 150), (60, 80, 60)) | egg((90, 120, 40), (33, 45, 60))
    fine = found.repeat_interleave(3, 0).repeat_interleave(2, 2)
    coarse = prior.near(found, [SPACING] * 3, 6.0)
    near = prior.near(fine, [SPACING / 3, SPACING, SPACING / 2], 6.0)
    assert near is not None and coarse is not None and near.shape == fine.shape
    again = coarse.repeat_interleave(3, 0).repeat_interleave(2, 2)
    assert float((near == again).float().mean()) > 0.98


def test_another_thing_is_left_alone(prior) -> None:
    assert prior.near(torch.zeros(SHAPE, dtype=torch.bool), [SPACING] * 3, 6.0) is None
    speckles = torch.rand(SHAPE, generator=torch.Generator().manual_seed(0)) < 0.1
    assert prior.near(speckles, [SPACING] * 3, 6.0) is None


@pytest.mark.parametrize("voxels", [(3, 40, 40), (40, 40, 1), (2, 2, 2)])
def test_a_thin_image_is_left_alone(prior, voxels) -> None:
    """There is nothing to register, and ITK smooths no axis of less than four voxels."""
    assert prior.near(torch.ones(voxels, dtype=torch.bool), [SPACING] * 3, 6.0) is None
