"""Training of a classifier of noisy images, which later guides a diffusion model."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from medseg_diffusion.diffusion.noise import draw_noised, generators
from medseg_diffusion.diffusion.schedule import NoiseSchedule


class NoisyClassification(nn.Module):
    """Batch -> cross-entropy of log p(y | x_t) at uniform times (Dhariwal & Nichol 2021, sec. 4 and appendix H).

    Args:
        network: (x_t (B, C, *S), timesteps (B,) in 0..T-1) -> logits (B, K).
        schedule: noise schedule of the diffusion model that the classifier guides.
    """

    def __init__(self, network: nn.Module, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.network = network
        self.schedule = schedule

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The loss, a scalar, of "image" (B, C, *S), "label" (B,) int64, "seed" (B,) int64."""
        noised = draw_noised(self.schedule, batch["image"], generators(batch["seed"].tolist()))
        logits = self.network(noised.x_t, noised.t - 1)
        return F.cross_entropy(logits.float(), batch["label"])
