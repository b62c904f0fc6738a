"""Masks diffused as labels (`medseg_diffusion.diffusion.categorical`), images as the condition.

(Hoogeboom et al. 2021, arXiv 2102.05379; for segmentation Zbinden et al. 2023, arXiv 2303.08888.) The network sees the
noised labels as one-hot channels in [-1, 1] and predicts logits of the classes of x_0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medseg_diffusion.device import at_once
from medseg_diffusion.diffusion.categorical import bound_loss, draw_noised_labels, one_hot, uniform_labels
from medseg_diffusion.diffusion.denoiser import Condition
from medseg_diffusion.diffusion.noise import generators, uniform_times
from medseg_diffusion.diffusion.schedule import NoiseSchedule
from medseg_diffusion.sampling.categorical import sample_categorical
from medseg_diffusion.sampling.loop import Sampler

from .mask import Batch


class CategoricalMaskDiffusion(nn.Module):
    """A conditional categorical diffusion model of masks: batch -> training loss; `probabilities` samples masks.

    Args:
        network: (x (B, K, *S), timesteps (B,) in 0..T-1, cond) -> logits (B, K, *S), with ``encode_condition(image)``,
            which is called once per image, not once per step.
        schedule: its ``alpha_bar`` is the share of labels that are still those of x_0.
        num_classes: K.
        cross_entropy_weight: weight of the cross-entropy of x_0 beside the variational bound.
        times: the first and the last time that training draws; None for 1 and T.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: NoiseSchedule,
        num_classes: int,
        cross_entropy_weight: float = 0.0,
        times: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.schedule = schedule
        self.num_classes = num_classes
        self.cross_entropy_weight = cross_entropy_weight
        self.times = times or (1, schedule.num_steps)

    def forward(self, batch: Batch) -> Tensor:
        """Training loss, a scalar. Times and noised labels come from the examples' own seeds."""
        labels = batch["label"]
        own = generators(batch["seed"].tolist())
        first, last = self.times
        noised = draw_noised_labels(self.schedule, labels, self.num_classes, own, uniform_times(last, own, first))
        cond = self.network.encode_condition(batch["image"])  # type: ignore[operator]
        logits = self._logits(noised.x_t, noised.t, cond, batch["image"])
        loss = bound_loss(self.schedule, logits, noised).mean()
        if self.cross_entropy_weight > 0:
            loss = loss + self.cross_entropy_weight * F.cross_entropy(logits, labels)
        return loss

    @torch.no_grad()
    def probabilities(
        self, image: Tensor, seeds: Sequence[Sequence[int]], sampler: Sampler, times: Sequence[int]
    ) -> Tensor:
        """Samples masks of ``image`` (B, C, *S): probabilities (B, N, K, *S) of their last step.

        ``seeds`` holds N seeds for each of the B images, each of which is encoded once. ``times`` decrease to 0; the
        update rule is ancestral, and ``sampler``, which is that of other segmenters, is not used.
        """
        cond = self.network.encode_condition(image)  # type: ignore[operator]
        count = len(seeds[0])
        own = generators([seed for members in seeds for seed in members])
        batch = at_once(math.prod(image.shape[2:]), image.device)
        samples = []
        for first in range(0, len(own), batch):
            part = own[first : first + batch]
            which = [i // count for i in range(first, first + len(part))]
            own_cond = {name: value[which] for name, value in cond.items()}

            def predict(x: Tensor, t: Tensor, own_cond: Condition = own_cond) -> Tensor:
                return self._logits(x, t, own_cond, image).softmax(1)

            start = uniform_labels(self.num_classes, image.shape[2:], part).to(image.device)
            samples.append(sample_categorical(predict, self.schedule, start, times, part))
        return torch.cat(samples).unflatten(0, (len(image), count))

    def _logits(self, x_t: Tensor, t: Tensor, cond: Condition, like: Tensor) -> Tensor:
        shown = (2 * one_hot(x_t, self.num_classes) - 1).to(like)
        out: Tensor = self.network(shown, t - 1, cond)
        return out.float()
