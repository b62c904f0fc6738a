"""Images, or their latents, as the diffused tensor; nothing, a class, a mask or a small image as the condition."""

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
        drop: probability that a training example loses its class or mask.
        context_channels: width of a class's token for cross-attention; None adds the class embedding to the time
            embedding instead.
        factor: of an upsampler, how much smaller than x0 its low-resolution image is; None for other models.
        noise: source of the noise.
        mask_classes: number of classes of the masks that condition the model, background included; 0 for none. Label
            ``mask_classes`` everywhere means "no mask".
    """

    # many: one for each part of the objective and for each kind of condition
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
        mask_classes: int = 0,
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.objective = objective
        self.times = times
        self.num_classes = num_classes
        self.drop = drop
        self.factor = factor
        self.noise = noise
        self.mask_classes = mask_classes
        with_token = num_classes > 0 and context_channels is not None
        self.token = nn.Embedding(num_classes + 1, context_channels or 1) if with_token else None

    @property
    def network(self) -> nn.Module:
        return self.denoiser.network

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The loss, a scalar, of "image" (B, C, *S), "label" (B,) int64 and "seed" (B,) int64.

        A model of masks also needs "mask" (B, *S'), labels at the resolution of the image, and an upsampler of latents
        the low-resolution image "low" (B, C', *s), which it cannot compute from x0. Times, noise and dropped classes
        and masks come from the examples' own seeds. In evaluation mode times are uniform and nothing is dropped.
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
        mask = batch["mask"] if self.mask_classes else None
        if mask is not None and self.training:
            nothing = torch.full((1,) * mask.ndim, self.mask_classes, device=mask.device)
            mask = dropped({"mask": mask}, {"mask": nothing}, self.drop, own)["mask"]
        low = None
        if self.factor is not None:
            low = batch["low"] if "low" in batch else reduced(x0, self.factor)
        cond = self.condition(label, low, x0.shape[2:], mask)
        prediction = self.denoiser(noised.x_t, noised.t, cond)
        losses = self.objective(schedule, self.denoiser.target, prediction, noised)
        if importance is None or weights is None:
            return losses.mean()
        importance.update(*_of_all_processes(noised.t, losses.detach()))
        return (weights.to(losses) * losses).mean()

    def condition(
        self,
        label: Tensor | None = None,
        low: Tensor | None = None,
        size: Sequence[int] | None = None,
        mask: Tensor | None = None,
    ) -> Condition:
        """The network's condition.

        Args:
            label: (B,) int64 classes, for a model that is conditioned by classes.
            low: (B, C', *s) low-resolution images, for an upsampler.
            size: spatial size of x0, to which ``low`` and ``mask`` are resized.
            mask: (B, *S') whole numbers, the label of every pixel, for a model that is conditioned by masks.

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
        if self.mask_classes:
            if mask is None or size is None:
                raise ValueError("this model is conditioned by masks")
            cond["concat"] = class_shares(mask, self.mask_classes, size)
        return cond

    def null(self, like: Tensor) -> Condition:
        """The condition "no class" or "no mask" for `medseg_diffusion.diffusion.guidance.ClassifierFreeGuided`.

        Args:
            like: x0 (B, C, *S) or, for a model of classes, any tensor on the device.

        Returns:
            The condition, each entry (1, ...); empty for a model without classes and masks.
        """
        if self.mask_classes:
            return self.condition(size=like.shape[2:], mask=self.no_mask(like[:1]))
        if not self.num_classes:
            return {}
        nothing = self._no_class(like)["label"]
        return {"label": nothing} if self.token is None else {"context": self.token(nothing)[:, None]}

    def no_mask(self, x0: Tensor) -> Tensor | None:
        """The mask (B, *S) that means "no mask" for each of x0 (B, C, *S); None for a model without masks."""
        if not self.mask_classes:
            return None
        return torch.full((len(x0), *x0.shape[2:]), self.mask_classes, device=x0.device)

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


def class_shares(mask: Tensor, num_classes: int, size: Sequence[int]) -> Tensor:
    """The condition (B, num_classes, *size) of masks (B, *S): the share of each class in each cell.

    At the mask's own size these are zeros and ones; a latent's cells hold several pixels. Background has a channel, so
    that the shares of a cell add up to 1. Label ``num_classes`` has none: "no mask" is 0 everywhere, which no mask is,
    not even an empty one.
    """
    shares = F.one_hot(mask.long(), num_classes + 1)[..., :num_classes].movedim(-1, 1).float()
    return enlarged(shares, size)


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
