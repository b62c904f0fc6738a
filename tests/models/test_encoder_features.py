"""Features of scans from the encoders of trained segmenters."""

from __future__ import annotations

import pytest
import torch

from medseg_diffusion.errors import ModelError, UsageError
from medseg_diffusion.metrics.generation import frechet_distance
from medseg_diffusion.models.encoder_features import EncoderFeatures
from tests.helpers.generators import QUIET

pytestmark = QUIET


def slices(count: int, seed: int, noise: float) -> torch.Tensor:
    """(N, 64, 64, 1) uint8 of a bright disc in a darker body."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.linspace(-1, 1, 64)
    disc = (x[:, None] ** 2 + x**2 < 0.1).float()
    images = 80 + 100 * disc + noise * torch.randn(count, 64, 64, generator=generator)
    return images.clamp(0, 255).to(torch.uint8)[..., None]


def test_an_image_has_the_same_features_in_any_batch_and_at_any_contrast() -> None:
    extract = EncoderFeatures("lung-nodule-ct")
    images = slices(3, 0, 10.0)
    features = extract(images)
    assert features.pooled.shape[0] == 3 and features.pooled.shape[1] >= 64
    assert features.spatial.shape == features.logits.shape == (3, 0)
    alone = torch.cat([extract(image[None]).pooled for image in images])
    torch.testing.assert_close(features.pooled, alone, rtol=1e-4, atol=1e-4)
    halved = extract((images.float() / 2).to(torch.uint8)).pooled  # the scaling of the training takes it out
    assert (halved - features.pooled).norm() < 0.2 * (features.pooled[0] - features.pooled[1]).norm() * 3
    assert extract.name.startswith("lung-nodule-ct (") and extract.fingerprints and extract.dims == 2


def test_they_tell_noisy_images_from_clean_ones() -> None:
    extract = EncoderFeatures("lung-nodule-ct")
    clean, others, noisy = (extract(slices(12, seed, noise)).pooled for seed, noise in ((0, 5.0), (1, 5.0), (2, 40.0)))
    assert frechet_distance(clean, noisy) > 10 * frechet_distance(clean, others)


def test_volumes_are_seen_as_a_whole() -> None:
    extract = EncoderFeatures("hippocampus-t1")
    volumes = torch.randint(0, 256, (2, 10, 12, 9, 1), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert extract.dims == 3 and extract(volumes).pooled.shape[0] == 2
    with pytest.raises(UsageError, match="takes volumes of 1 channels, and these have 3 and 2 axes"):
        extract(slices(2, 0, 1.0).expand(-1, -1, -1, 3))


def test_only_segmenters_of_this_package_have_such_an_encoder(image_models) -> None:
    with pytest.raises(ModelError, match="not a segmenter"):
        EncoderFeatures(image_models["pixel"])
    with pytest.raises(ModelError, match="no-such-model"):
        EncoderFeatures("no-such-model")
