"""Autoencoders convolve a single small volume as they do several."""

from __future__ import annotations

import torch

from medseg_diffusion.networks.autoencoder import KLAutoencoder


def test_what_monai_builds_convolves_lone_volumes_like_two_and_not_by_the_slow_fallback() -> None:
    torch.manual_seed(0)
    codec = KLAutoencoder(3, 1, 1, 2, (8, 8), 1, (False, False), norm_groups=8, middle_attention=False)
    pair = torch.randn(2, 1, 8, 12, 8)
    with torch.no_grad(), torch.profiler.profile() as profile:
        lone = codec.decode(codec.encode(pair[:1]))
    assert not [event.name for event in profile.events() if "slow_conv" in event.name]
    with torch.no_grad():
        torch.testing.assert_close(lone, codec.decode(codec.encode(pair))[:1], rtol=1e-4, atol=1e-5)
