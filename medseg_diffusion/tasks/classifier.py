"""Training the classifier of noisy images: nothing is diffused, but its inputs are noised as for a diffusion model."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from medseg_diffusion.diffusion.noise import gaussian, generators
from medseg_diffusion.diffusion.objective import uniform_times
from medseg_diffusion.diffusion.schedule import NoiseSchedule


class NoisyClassification(nn.Module):
    """Batch -> cross-entropy of log p(y | x_t) at uniform times (Dhariwal & Nichol 2021, sec. 4 and appendix H).

    Args:
        network: (x_t (B, C, *S), timesteps (B,) in 0..T-1) -> logits (B, K).
        schedule: that of the diffusion model to be guided.
    """

    def __init__(self, network: nn.Module, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.network = network
        self.schedule = schedule

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The loss, a scalar, of "image" (B, C, *S), "label" (B,) int64, "seed" (B,) int64."""
        own = generators(batch["seed"].tolist())
        image = batch["image"]
        t = uniform_times(self.schedule.num_steps, own).to(image.device)
        x_t = self.schedule.add_noise(image, gaussian(image.shape[1:], own, like=image), t)
        return F.cross_entropy(self.network(x_t, t - 1).float(), batch["label"])
