"""Find, then segment: the box holds the organ in any scan, and the segmenter sees this box alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from medseg_diffusion.models.finder import LEAST_ML, Finder, box_of
from medseg_diffusion.volumes.preprocessing import Preprocessing
from medseg_diffusion.volumes.volume import Volume, orientation_transform, reorient

CPU = torch.device("cpu")


def scan_with_ball(
    size: tuple[int, int, int], spacing: list[float], centre: list[float], radius: float, axcodes: str, turn: float
) -> Volume:
    """A bright ball of ``radius`` mm at a relative ``centre``, with axes of any direction, turned by an angle."""
    import nibabel as nib

    cos, sin = np.cos(turn), np.sin(turn)
    affine = np.eye(4)
    affine[:3, :3] = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]]) @ np.diag(spacing)
    transform = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(axcodes)
    )
    grid = torch.stack(torch.meshgrid(*[torch.arange(n).double() for n in size], indexing="ij"), -1)
    middle = torch.tensor([n * share for n, share in zip(size, centre, strict=True)])
    distance = ((grid - middle) * torch.tensor(spacing)).norm(dim=-1)
    volume = Volume((distance < radius).float()[None], affine)
    data = reorient(volume.data, transform)
    return Volume(data, affine @ nib.orientations.inv_ornt_aff(transform, size))


class Bright(nn.Module):
    """Marks what is bright, as a finder's network would."""

    def logits(self, image: Tensor) -> Tensor:
        return torch.stack([-image[:, 0], image[:, 0]], 1)


@settings(max_examples=40, deadline=None)
@given(
    centre=st.lists(st.floats(0.2, 0.8), min_size=3, max_size=3),
    spacing=st.lists(st.floats(0.8, 5.0), min_size=3, max_size=3),
    axcodes=st.sampled_from(["RAS", "LPS", "PIR", "SAL"]),
    turn=st.floats(-0.5, 0.5),
)
def test_the_box_never_cuts_the_organ(centre: list[float], spacing: list[float], axcodes: str, turn: float) -> None:
    """Organs that the border of the scan cuts, oblique scans and scans of thick slices are among them."""
    size = tuple(int(120 / mm) for mm in spacing)
    volume = scan_with_ball(size, spacing, centre, 30.0, axcodes, turn)  # type: ignore[arg-type]
    box = Finder(Bright(), "RAS", 4.0, 6.0).box(volume, CPU)  # type: ignore[arg-type]
    assert box is not None
    organ = reorient(volume.data, orientation_transform(volume.affine, "RAS"))[0] > 0
    within = torch.zeros_like(organ)
    within[tuple(slice(first, stop) for first, stop in box)] = True
    assert not bool((organ & ~within).any())
    image, placement = Preprocessing("RAS", (2.0, 2.0, 2.0)).apply(volume, box)
    assert placement.box == box and tuple(image.shape[1:]) == placement.shape
    assert int(placement.restore(torch.ones(1, *placement.shape), 0.0).sum()) == int(within.sum())


def test_the_box_is_small_and_of_the_largest_part_alone() -> None:
    volume = scan_with_ball((120, 120, 120), [1.0] * 3, [0.5] * 3, 25.0, "RAS", 0.0)
    volume.data[0, 5:15, 5:15, 5:15] = 1  # a bright eye
    box = Finder(Bright(), "RAS", 4.0, 6.0).box(volume, CPU)  # type: ignore[arg-type]
    assert box is not None
    for first, stop in box:
        assert 25 <= first <= 60 - 25 and 60 + 25 <= stop <= 95, "the margin is 6 mm, and a coarse voxel 4 mm"


@pytest.mark.parametrize(("radius", "found"), [(15.0, False), (25.0, True)])  # 14 and 65 ml
def test_a_scan_without_the_organ_has_no_box(radius: float, found: bool) -> None:
    volume = scan_with_ball((100, 100, 100), [1.0] * 3, [0.5] * 3, radius, "RAS", 0.0)
    assert (4 / 3 * np.pi * radius**3 / 1000 > LEAST_ML) is found
    box = Finder(Bright(), "RAS", 4.0, 6.0).box(volume, CPU)  # type: ignore[arg-type]
    assert (box is not None) is found


def test_nothing_marked_has_no_box() -> None:
    volume = Volume(torch.rand(1, 40, 40, 40), np.eye(4))
    _, placement = Preprocessing("RAS", (4.0, 4.0, 4.0)).apply(volume)
    assert box_of(torch.zeros(placement.shape, dtype=torch.bool), placement, 6.0) is None
