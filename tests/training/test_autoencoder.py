"""The loss of an autoencoder of images: its precision and its gradients."""

from __future__ import annotations

import pytest
import torch

from medseg_diffusion.networks.autoencoder import KLAutoencoder
from medseg_diffusion.training.autoencoder import AutoencoderTraining, GradientSSIM, LossWeights


def test_the_loss_of_an_autoencoder_is_float32_under_autocast() -> None:
    """SSIM's variance is a difference of nearly equal moments: in bfloat16 the loss of flat images went to -inf."""
    torch.manual_seed(0)
    training = AutoencoderTraining(KLAutoencoder(2, 3, 3, 2, (32, 32), 1, (False, False)), GradientSSIM()).eval()
    flat = torch.linspace(-1, 1, 4).reshape(4, 1, 1, 1) + 0.01 * torch.randn(4, 3, 16, 16)
    batch = {"image": flat, "seed": torch.arange(4)}
    seen: list[torch.dtype] = []
    kept, training._perceptual[0] = training._perceptual[0], lambda a, b: (seen.append(a.dtype), kept(a, b))[1]
    with torch.no_grad():
        exact = training(batch)
        with torch.autocast("cpu", torch.bfloat16):
            half = training(batch)
    assert seen == [torch.float32, torch.float32]
    torch.testing.assert_close(half, exact, rtol=0.02, atol=0)  # what is left is the rounding of the network


@pytest.mark.parametrize("adversarial", [0.0, 0.5])
def test_whatever_asks_for_a_gradient_gets_one(adversarial) -> None:
    """Of what does not, several processes would wait for each other without end."""
    torch.manual_seed(0)
    codec = KLAutoencoder(2, 1, 1, 2, channels=(32, 32), attention_levels=(False, False))
    weights = LossWeights(adversarial=adversarial, adversarial_start=0)
    model = AutoencoderTraining(codec, GradientSSIM(), weights, 8, 1).train()
    model({"image": torch.rand(2, 1, 16, 16), "seed": torch.arange(2)}).backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    asking = [name for name, p in model.named_parameters() if p.requires_grad and name.startswith("discriminator")]
    assert bool(asking) == (adversarial > 0)
