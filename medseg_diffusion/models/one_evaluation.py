"""A segmenter whose answer is one evaluation of its network, as a function of tensors alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medseg_diffusion.build import Segmenter
from medseg_diffusion.tasks.mask import FeedForward, MaskDiffusion, start_deviation


class OneEvaluation(nn.Module):
    """Class probabilities (B, K, *S) of preprocessed images, without seeds, samplers or windows.

    The arguments of the call are the image (B, C, *S) and, for a mask diffusion model, standard normal noise
    (B, noise_channels, *S), from which the member follows in one step.

    Args:
        model: the trained model.
        times: the times of its single step, T' and 0.

    Raises:
        ValueError: a model that takes more steps, or that is neither a mask diffusion model nor feed-forward.
    """

    def __init__(self, model: Segmenter, times: Sequence[int]) -> None:
        super().__init__()
        if isinstance(model, FeedForward) and not model.pixels:
            self.noise_channels = 0
        elif isinstance(model, MaskDiffusion) and len(times) == 2 and times[1] == 0:
            self.noise_channels = model.encoding.channels
        else:
            raise ValueError("not a mask diffusion model of one step, and not a feed-forward network")
        self.model = model
        self.start = times[0]

    def forward(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        if isinstance(self.model, FeedForward):
            return self.model.logits(image).softmax(dim=1)
        assert isinstance(self.model, MaskDiffusion) and noise is not None
        denoiser, encoding = self.model.denoiser, self.model.encoding
        cond = denoiser.network.encode_condition(image)  # type: ignore[operator]
        cond = {name: value for name, value in cond.items() if name != "anchor"}
        t = torch.full((image.shape[0],), self.start, dtype=torch.int64, device=image.device)
        x_t = start_deviation(denoiser, self.start, encoding.scale) * noise
        x0 = denoiser(x_t, t, cond).x0  # every sampler's step to t = 0 is the predicted x0
        if denoiser.head == "linear":
            x0 = x0.clamp(-encoding.scale, encoding.scale)
        return encoding.decode(x0)
