"""The Haar transform of images and volumes."""

from __future__ import annotations

import pytest
import torch

from medseg_diffusion.networks.wavelet import HaarWavelet


@pytest.mark.parametrize(("dims", "channels"), [(2, 3), (3, 1)])
def test_the_transform_is_orthogonal_and_can_be_inverted(dims: int, channels: int) -> None:
    wavelet = HaarWavelet(dims, channels)
    image = torch.randn(2, channels, *[4, 6, 8][:dims])
    latent = wavelet.encode(image)
    assert latent.shape == (2, channels * 2**dims, *[2, 3, 4][:dims])
    torch.testing.assert_close(latent.square().sum(), image.square().sum())
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(wavelet.decode(wavelet.encode(image)), image)
    wavelet.shift.fill_(0.3)
    wavelet.scale.fill_(2.0)
    torch.testing.assert_close(wavelet.decode(wavelet.encode(image)), image)


def test_coefficients_are_means_and_differences_of_neighbours() -> None:
    image = torch.tensor([[1.0, 2.0], [4.0, 9.0]])[None, None]
    rows_and_columns = HaarWavelet(2, 1).encode(image).flatten()
    mean, columns, rows, diagonal = (1 + 2 + 4 + 9) / 2, (1 - 2 + 4 - 9) / 2, (1 + 2 - 4 - 9) / 2, (1 - 2 - 4 + 9) / 2
    torch.testing.assert_close(rows_and_columns, torch.tensor([mean, columns, rows, diagonal]))


def test_the_channels_of_an_image_stay_apart() -> None:
    """Each with its mean first."""
    image = torch.cat([torch.ones(1, 1, 4, 4), 2 * torch.ones(1, 1, 4, 4)], dim=1)
    latent = HaarWavelet(2, 2).encode(image)
    assert latent[0, :, 0, 0].tolist() == pytest.approx([2, 0, 0, 0, 4, 0, 0, 0])
