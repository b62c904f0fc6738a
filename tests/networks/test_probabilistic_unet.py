"""The Gaussians and encoders of the Probabilistic U-Net."""

from __future__ import annotations

import pytest
import torch

from medseg_diffusion.networks.probabilistic_unet import (
    HIGHEST_LOG_SCALE,
    LOWEST_LOG_SCALE,
    DiagonalGaussian,
    ProbabilisticUNet,
    posterior_input,
)
from medseg_diffusion.networks.unet import UNet


def network(dims: int) -> ProbabilisticUNet:
    torch.manual_seed(0)
    unet = UNet(dims, 1, 8, channels=8, channel_mult=(1, 2), num_res_blocks=1, norm_groups=4)
    return ProbabilisticUNet(unet, 8, 1, 1, 1, latent_channels=3, norm_groups=4)


def test_the_divergence_is_that_of_normal_distributions() -> None:
    torch.manual_seed(0)
    p, q = (DiagonalGaussian(torch.randn(4, 3), torch.randn(4, 3) / 2) for _ in range(2))
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(p.mean, p.log_scale.exp()), torch.distributions.Normal(q.mean, q.log_scale.exp())
    ).sum(1)
    torch.testing.assert_close(p.divergence(q), expected)
    torch.testing.assert_close(p.divergence(p), torch.zeros(4), rtol=0, atol=1e-6)


def test_samples_have_the_mean_and_the_scale() -> None:
    one = DiagonalGaussian(torch.tensor([[1.0, -2.0]]), torch.tensor([[0.0, 1.0]]))
    samples = one.sample(torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(samples.mean(0), one.mean[0], rtol=0, atol=0.1)
    torch.testing.assert_close(samples.std(0), one.log_scale.exp()[0], rtol=0.03, atol=0)


@pytest.mark.parametrize("dims", [2, 3])
def test_shapes_also_of_sides_that_the_encoder_does_not_divide(dims: int) -> None:
    model, image = network(dims), torch.rand(2, 1, *[9] * dims)
    prior = model.prior(image)
    posterior = model.posterior(posterior_input(image, torch.zeros_like(image)))
    assert prior.mean.shape == posterior.log_scale.shape == (2, 3)
    logits = model.logits(model.features(image), posterior.mean)
    assert logits.shape == (2, 1, *[9] * dims)


def test_the_mask_reaches_the_posterior_and_the_latent_the_logits() -> None:
    model, image = network(2), torch.rand(1, 1, 8, 8)
    masks = torch.zeros(2, 1, 1, 8, 8)
    masks[1, ..., :4] = 1
    first, second = (model.posterior(posterior_input(image, mask)).mean for mask in masks)
    assert not torch.allclose(first, second)
    features = torch.rand(1, 8, 8, 8)
    assert not torch.allclose(model.logits(features, first), model.logits(features, first + 1))


def test_scales_are_bounded() -> None:
    model, image = network(2), torch.rand(1, 1, 8, 8)
    for bias, bound in ((1e6, HIGHEST_LOG_SCALE), (-1e6, LOWEST_LOG_SCALE)):
        torch.nn.init.constant_(model.prior.out.bias, bias)
        torch.testing.assert_close(model.prior(image).log_scale, torch.full((1, 3), bound))
