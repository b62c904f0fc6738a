"""The structural similarity of samples to each other."""

from __future__ import annotations

import pytest
import torch
from skimage.metrics import structural_similarity

from medseg_diffusion.metrics.diversity import WINDOW, count_of_scales, ms_ssim_diversity


def levels(count: int, side: int, seed: int = 0) -> torch.Tensor:
    shape = (count, 1, side, side, side)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_equal_volumes_are_alike_and_noise_is_not() -> None:
    volumes = levels(3, 24)
    assert ms_ssim_diversity(volumes[:1].expand(4, -1, -1, -1, -1)) == pytest.approx(1)
    blurred = torch.nn.functional.avg_pool3d(volumes.float(), 5, 1, 2)
    between = (0.7 * blurred[:1] + 0.3 * blurred).round().to(torch.uint8)  # three volumes that have much in common
    assert ms_ssim_diversity(volumes) < 0.1 < ms_ssim_diversity(between) < 1


def test_at_one_scale_it_is_the_structural_similarity_of_scikit_image() -> None:
    first, noise = levels(1, 19)[0, 0], levels(1, 19, 1)[0, 0]
    other = (0.7 * first + 0.3 * noise).to(torch.uint8)
    one, two = (volume.double().numpy() for volume in (first, other))
    settings = {"gaussian_weights": True, "use_sample_covariance": False, "full": True}
    _, everywhere = structural_similarity(one, two, data_range=255, **settings)
    found = ms_ssim_diversity(torch.stack([first, other])[:, None])
    assert found == pytest.approx(everywhere.mean(), abs=2e-3)  # the two mirror the volume at its borders differently


def test_pairs_depend_on_the_seed_alone() -> None:
    volumes = torch.nn.functional.avg_pool3d(levels(6, 14).float(), 3, 1, 1)
    assert ms_ssim_diversity(volumes, pairs=2, seed=1) == ms_ssim_diversity(volumes, pairs=2, seed=1)
    assert ms_ssim_diversity(volumes, pairs=1, seed=1) != ms_ssim_diversity(volumes, pairs=1, seed=2)


@pytest.mark.parametrize("side", [*range(11, 25), 43, 44, 45, 98, 99])
def test_every_number_of_scales_can_be_computed(side: int) -> None:
    scales = count_of_scales(side)
    assert side // 2 ** (scales - 1) >= WINDOW
    if side < 50:
        assert 0 <= ms_ssim_diversity(levels(2, side)) <= 1


def test_what_cannot_be_compared_is_refused() -> None:
    assert [count_of_scales(side) for side in (10, 11, 22, 44, 98, 99, 175, 176)] == [0, 1, 2, 3, 3, 4, 4, 5]
    with pytest.raises(ValueError, match="two volumes or more"):
        ms_ssim_diversity(levels(1, 12))
    with pytest.raises(ValueError, match="sides of 11 or more"):
        ms_ssim_diversity(levels(2, 10))
