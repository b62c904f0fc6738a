"""Low-resolution images are brought to the size that an upsampler works at."""

from __future__ import annotations

import torch

from medseg_diffusion.tasks.image import enlarged, reduced


def test_a_low_resolution_image_is_brought_to_the_size_of_any_latent() -> None:
    low = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(enlarged(low, (8, 8)), low)
    torch.testing.assert_close(enlarged(low, (4, 4)), reduced(low, 2))  # means, not every other pixel
    assert enlarged(low, (16, 16)).shape == (2, 3, 16, 16)
