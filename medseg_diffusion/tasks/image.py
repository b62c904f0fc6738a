"""Images, or their latents, as the diffused tensor; nothing, a class or a low-resolution image as the condition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from medseg_diffusion.diffusion.denoiser import Condition, NetworkDenoiser
from medseg_diffusion.diffusion.guidance import dropped
from medseg_diffusion.diffusion.noise import LogitNormalTimes, NoiseSource, draw_noised, gaussian, generators
from medseg_diffusion.diffusion.objective import ImportanceTimes, Objective


class ImageDiffusion(nn.Module):
    """A generator: batch -> training loss.

    Args:
        denoiser: of x0 (B, C, *S), the image in [-1, 1] or its standardised latent.
        objective: the diffusion loss.
        times: how training times are drawn; None for uniform ones.
        num_classes: number of classes that condition the model, 0 for none. Label ``num_classes`` means "no class".
        drop: probability that a training example loses its class.
        context_channels: width of a class's token for cross-attention; None adds the class embedding to the time
            embedding instead.
        factor: of an upsampler, how much smaller than x0 its low-resolution image is; None for other models.
        noise: source of the noise.
    """

    def __init__(
        self,
        denoiser: NetworkDenoiser,
        objective: Objective,
        times: ImportanceTimes | LogitNormalTimes | None = None,
        num_classes: int = 0,
        drop: float = 0.1,
        context_channels: int | None = None,
        factor: int | None = None,
        noise: NoiseSource = gaussian,
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.objective = objective
        self.times = times
        self.num_classes = num_classes
        self.drop = drop
        self.factor = factor
        self.noise = noise
        with_token = num_classes > 0 and context_channels is not None
        self.token = nn.Embedding(num_classes + 1, context_channels or 1) if with_token else None

    @property
    def network(self) -> nn.Module:
        return self.denoiser.network

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The loss, a scalar, of "image" (B, C, *S), "label" (B,) int64 and "seed" (B,) int64.

        An upsampler of latents also needs the low-resolution image "low" (B, C', *s), which it cannot compute from x0.
        Times, noise and dropped classes come from the examples' own seeds. In evaluation mode times are uniform and no
        class is dropped.
        """
        x0, schedule = batch["image"], self.denoiser.schedule
        own = generators(batch["seed"].tolist())
        times = self.times if self.training else None
        importance = times if isinstance(times, ImportanceTimes) else None
        t, weights = (None, None) if importance is None else importance.draw(own)
        if isinstance(times, LogitNormalTimes):
            t = times(own)
        noised = draw_noised(schedule, x0, own, self.noise, t)
        label = batch["label"] if self.num_classes else None
        if label is not None and self.training:
            label = dropped({"label": label}, self._no_class(label), self.drop, own)["label"]
        low = None
        if self.factor is not None:
            low = batch["low"] if "low" in batch else reduced(x0, self.factor)
        cond = self.condition(label, low, x0.shape[2:])
        prediction = self.denoiser(noised.x_t, noised.t, cond)
        losses = self.objective(schedule, self.denoiser.target, prediction, noised)
        if importance is None or weights is None:
            return losses.mean()
        importance.update(*_of_all_processes(noised.t, losses.detach()))
        return (weights.to(losses) * losses).mean()

    def condition(
        self, label: Tensor | None = None, low: Tensor | None = None, size: Sequence[int] | None = None
    ) -> Condition:
        """The network's condition.

        Args:
            label: (B,) int64 classes, for a model that is conditioned by classes.
            low: (B, C', *s) low-resolution images, for an upsampler.
            size: spatial size of x0, to which ``low`` is resized.

        Raises:
            ValueError: an input that the model needs is missing.
        """
        cond: dict[str, Tensor] = {}
        if self.num_classes:
            if label is None:
                raise ValueError("this model is conditioned by classes")
            if self.token is None:
                cond["label"] = label
            else:
                cond["context"] = self.token(label)[:, None]
        if self.factor is not None:
            if low is None or size is None:
                raise ValueError("this model is conditioned by low-resolution images")
            cond["concat"] = enlarged(low, size)
        return cond

    def null(self, like: Tensor) -> Condition:
        """The condition "no class" for `medseg_diffusion.diffusion.guidance.ClassifierFreeGuided`, each entry (1, ...).

        It is empty for a model without classes, and lies on the device of ``like``.
        """
        if not self.num_classes:
            return {}
        nothing = self._no_class(like)["label"]
        return {"label": nothing} if self.token is None else {"context": self.token(nothing)[:, None]}

    def _no_class(self, like: Tensor) -> dict[str, Tensor]:
        return {"label": torch.full((1,), self.num_classes, device=like.device)}


def reduced(image: Tensor, factor: int) -> Tensor:
    """Reduces an image (B, C, *S) to (B, C, *S / factor) by averaging blocks."""
    pool = F.avg_pool2d if image.ndim == 4 else F.avg_pool3d
    return pool(image, factor)


def enlarged(low: Tensor, size: Sequence[int]) -> Tensor:
    """Resizes low-resolution images (B, C, *s) to ``size`` by linear interpolation (Dhariwal & Nichol 2021, appendix).

    With latents ``size`` is that of the latent (Rombach et al. 2022, section 4.4), which may be smaller: the images
    are then averaged over areas.
    """
    if any(new < old for new, old in zip(size, low.shape[2:], strict=True)):
        return F.interpolate(low, size=tuple(size), mode="area")
    return F.interpolate(low, size=tuple(size), mode="bilinear" if low.ndim == 4 else "trilinear")


def _of_all_processes(*values: Tensor) -> Sequence[Tensor]:
    """Concatenates each tensor over all processes; every process gets the same result."""
    if not torch.distributed.is_initialized():
        return values
    gathered = []
    for value in values:
        parts = [torch.empty_like(value) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, value.contiguous())
        gathered.append(torch.cat(parts))
    return gathered
