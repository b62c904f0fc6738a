"""Masks as the diffused tensor, images as the condition.

Labels of K classes become x0 in [-scale, scale]: one channel for K = 2 (background -scale, foreground +scale), else
one-hot. A scale below 1 makes every noise level harder (Chen 2023, arXiv 2301.10972): masks are so redundant that, at
scale 1, they can be recognised through most noise levels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medseg_diffusion.device import at_once
from medseg_diffusion.diffusion.categorical import draw, one_hot
from medseg_diffusion.diffusion.denoiser import Clipped, Condition, Denoiser, NetworkDenoiser
from medseg_diffusion.diffusion.noise import TimeSource, draw_noised, gaussian, generators
from medseg_diffusion.diffusion.objective import Objective
from medseg_diffusion.diffusion.prediction import Prediction
from medseg_diffusion.diffusion.schedule import precise
from medseg_diffusion.sampling.loop import Sampler, sample

from .jitter import Jitter

Batch = Mapping[str, Tensor]
"""A training batch: "image" (B, C, *S) float, "label" (B, *S) int64, "seed" (B,) int64."""


@dataclass(frozen=True)
class MaskEncoding:
    """Labels of ``num_classes`` classes (0 is background) as diffused channels, and back to probabilities."""

    num_classes: int
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.num_classes < 2 or not self.scale > 0:
            raise ValueError(f"a mask has at least 2 classes and a positive scale, got {self}")

    @property
    def channels(self) -> int:
        """Channels of x0: 1 for a binary mask, else one per class."""
        return 1 if self.num_classes == 2 else self.num_classes

    def encode(self, labels: Tensor) -> Tensor:
        """Encodes labels (B, *S) int64 as x0 (B, channels, *S) in [-scale, scale]."""
        channels = (labels > 0)[:, None].float() if self.channels == 1 else one_hot(labels, self.num_classes)
        return self.scale * (2 * channels - 1)

    def decode(self, x0: Tensor) -> Tensor:
        """Decodes x0 (B, channels, *S) to probabilities (B, K, *S).

        p = clip((x0 / scale + 1) / 2) to [0, 1], normalised over classes.
        """
        p = ((x0 / self.scale + 1) / 2).clamp(0, 1)
        if self.channels == 1:
            return torch.cat([1 - p, p], dim=1)
        # A position where every class has 0 becomes uniform instead of 0 / 0.
        p = p + 1e-6
        return p / p.sum(dim=1, keepdim=True)

    def class_logits(self, logits: Tensor) -> Tensor:
        """Turns logits (B, channels, *S) of a classifying head into logits of all K classes (B, K, *S)."""
        return torch.cat([torch.zeros_like(logits), logits], dim=1) if self.channels == 1 else logits


@dataclass(frozen=True)
class AnchorLoss:
    """Loss of the mask that a condition network predicts itself (MedSegDiff-V2, eq. 9): Dice + w cross-entropy.

    It counts only at times t that are multiples of ``every``.
    """

    every: int = 5
    cross_entropy_weight: float = 10.0

    def __call__(self, logits: Tensor, labels: Tensor, t: Tensor) -> Tensor:
        """The mean over the batch, a scalar, for logits (B, K, *S), labels (B, *S) and times ``t`` (B,)."""
        # Imported where used: MONAI takes seconds, which sampling does not need.
        from monai.losses import DiceLoss

        dice = DiceLoss(include_background=False, to_onehot_y=True, softmax=True, reduction="none")
        per_case = dice(logits.float(), labels[:, None]).flatten(1).mean(1)
        entropy = F.cross_entropy(logits.float(), labels, reduction="none").flatten(1).mean(1)
        return ((t % self.every == 0) * (per_case + self.cross_entropy_weight * entropy)).mean()


@dataclass(frozen=True)
class Auxiliary:
    """Losses of the class logits of a classifying head, beside the diffusion loss.

    Attributes:
        dice_ce: weight of Dice + cross-entropy. Their minimum is one mask wherever x_t leaves several possible.
        dice_ce_log_snr: where log(scale^2 alpha^2 / sigma^2) has this value, Dice + cross-entropy have half of their
            weight (`auxiliary_weight`). None gives them their whole weight at all times.
        cross_entropy: weight of the cross-entropy of x0 alone, at all times. Its minimum is the true probabilities.
    """

    dice_ce: float = 0.0
    dice_ce_log_snr: float | None = None
    cross_entropy: float = 0.0

    def __call__(self, logits: Tensor, labels: Tensor, log_snr: Tensor) -> Tensor:
        """The weighted sum, a scalar, for logits (B, K, *S), labels (B, *S) and log-SNR of the scaled mask (B,)."""
        loss = logits.new_zeros(())
        if self.cross_entropy > 0:
            loss = self.cross_entropy * F.cross_entropy(logits.float(), labels)
        if self.dice_ce > 0 and self.dice_ce_log_snr is None:
            loss = loss + self.dice_ce * dice_ce(logits, labels)
        elif self.dice_ce > 0 and self.dice_ce_log_snr is not None:
            weights = auxiliary_weight(log_snr, self.dice_ce_log_snr).to(logits)
            losses = torch.stack([dice_ce(*one) for one in zip(logits.split(1), labels.split(1), strict=True)])
            loss = loss + self.dice_ce * (weights * losses).mean()
        return loss


def auxiliary_weight(log_snr: Tensor, half: float) -> Tensor:
    """1 / (1 + exp(log_snr - half)): near 1 where x_t tells little, near 0 where it tells more.

    With ``half`` = -log d it is 1 / (1 + d SNR). Masks that differ in d pixels can be told apart from d SNR = 1 on.
    """
    return torch.sigmoid(half - log_snr)


class MaskDiffusion(nn.Module):
    """A conditional diffusion model of masks: batch -> training loss; `probabilities` samples masks.

    Args:
        denoiser: its network has ``encode_condition(image)``, which is called once per image, not once per step.
        encoding: how labels become x0.
        objective: the diffusion loss.
        auxiliary: losses of the logits; they need a classifying head.
        anchor_loss: for networks whose condition has an "anchor", the logits of a mask.
        times: draws the training times; None for uniform ones.

    Raises:
        ValueError: auxiliary losses without a classifying head.
    """

    def __init__(
        self,
        denoiser: NetworkDenoiser,
        encoding: MaskEncoding,
        objective: Objective,
        auxiliary: Auxiliary = Auxiliary(),
        anchor_loss: AnchorLoss = AnchorLoss(),
        times: TimeSource | None = None,
    ) -> None:
        super().__init__()
        if denoiser.head == "linear" and max(auxiliary.dice_ce, auxiliary.cross_entropy) > 0:
            raise ValueError("Dice and cross-entropy need logits: use a classifying head or weights of 0")
        self.denoiser = denoiser
        self.encoding = encoding
        self.objective = objective
        self.auxiliary = auxiliary
        self.anchor_loss = anchor_loss
        self.times = times

    @property
    def network(self) -> nn.Module:
        return self.denoiser.network

    def forward(self, batch: Batch) -> Tensor:
        """Training loss, a scalar. Times and noise come from the examples' own seeds."""
        schedule = self.denoiser.schedule
        x0 = self.encoding.encode(batch["label"])
        own = generators(batch["seed"].tolist())
        noised = draw_noised(schedule, x0, own, t=None if self.times is None else self.times(own))
        cond = self.denoiser.network.encode_condition(batch["image"])  # type: ignore[operator]
        prediction: Prediction = self.denoiser(noised.x_t, noised.t, cond)
        loss = self.objective(schedule, self.denoiser.target, prediction, noised).mean()
        if prediction.logits is not None:
            log_snr = schedule.snr(noised.t).log() + 2 * math.log(self.encoding.scale)
            loss = loss + self.auxiliary(self.encoding.class_logits(prediction.logits), batch["label"], log_snr)
        if "anchor" in cond:
            loss = loss + self.anchor_loss(self.encoding.class_logits(cond["anchor"]), batch["label"], noised.t)
        return loss

    @torch.no_grad()
    def probabilities(
        self, image: Tensor, seeds: Sequence[Sequence[int]], sampler: Sampler, times: Sequence[int]
    ) -> Tensor:
        """Samples masks of ``image`` (B, C, *S): probabilities (B, N, K, *S).

        ``seeds`` holds N seeds for each of the B images. ``times`` are those that the sampler visits, decreasing to 0.
        Each image is encoded once for its N samples.
        """
        cond = self.denoiser.network.encode_condition(image)  # type: ignore[operator]
        cond = {name: value for name, value in cond.items() if name != "anchor"}
        denoiser: Denoiser = self.denoiser
        if self.denoiser.head == "linear":  # other heads cannot leave the range of a mask
            denoiser = Clipped(denoiser, -self.encoding.scale, self.encoding.scale)
        shape = (self.encoding.channels, *image.shape[2:])
        x0 = sample_all(denoiser, sampler, times, cond, seeds, shape, image, self.encoding.scale)
        return self.encoding.decode(x0).unflatten(0, (len(image), -1))


def start_deviation(denoiser: Denoiser, time: int, scale: float) -> float:
    """Standard deviation of x_t at ``time``, for x0 of the standard deviation ``scale``.

    Before T, alpha is not 0, and a scale below 1 makes x_t narrower than standard normal noise.
    """
    signal = denoiser.schedule.value(time)
    return math.sqrt(signal * scale**2 + 1 - signal)


def sample_all(
    denoiser: Denoiser,
    sampler: Sampler,
    times: Sequence[int],
    cond: Condition,
    seeds: Sequence[Sequence[int]],
    shape: Sequence[int],
    like: Tensor,
    scale: float,
) -> Tensor:
    """Draws N samples for each of the B conditions, one for each seed: (B N, *shape), dtype and device of ``like``.

    They are sampled in batches of `at_once`, from noise of the standard deviation `start_deviation`.
    """
    deviation = start_deviation(denoiser, times[0], scale)
    count = len(seeds[0])
    own = generators([seed for members in seeds for seed in members])
    batch = at_once(math.prod(shape[1:]), like.device)
    samples = []
    for first in range(0, len(own), batch):
        part = own[first : first + batch]
        which = [i // count for i in range(first, first + len(part))]
        own_cond = {name: value[which] for name, value in cond.items()}
        noise = deviation * gaussian(shape, part, like=like)
        samples.append(sample(denoiser, sampler, noise, times, own_cond, generators=part))
    return torch.cat(samples)


class FeedForward(nn.Module):
    """The baseline without diffusion: the same backbone maps the image to logits in one pass.

    Args:
        network: the backbone.
        encoding: the number of classes.
        dice: the loss is Dice + cross-entropy; else it is cross-entropy alone.
        pixels: every member draws each pixel's class from its probabilities. Neighbours are independent then, as they
            are in any model that predicts a probability for each pixel.

    Attributes:
        jitter: how the members of an ensemble differ if no pixels are drawn; None in training and for one member, which
            is the plain pass.
    """

    def __init__(self, network: nn.Module, encoding: MaskEncoding, dice: bool = True, pixels: bool = False) -> None:
        super().__init__()
        self.network = network
        self.encoding = encoding
        self.dice = dice
        self.pixels = pixels
        self.jitter: Jitter | None = None

    def logits(self, image: Tensor) -> Tensor:
        """Logits (B, K, *S) of ``image`` (B, C, *S); the backbone's timestep is always 0."""
        out = self.network(image, torch.zeros(len(image), dtype=torch.int64, device=image.device), None)
        return self.encoding.class_logits(out.to(image.dtype))

    def forward(self, batch: Batch) -> Tensor:
        """Training loss, a scalar."""
        logits, labels = self.logits(batch["image"]), batch["label"]
        return dice_ce(logits, labels) if self.dice else F.cross_entropy(logits.float(), labels)

    @torch.no_grad()
    def probabilities(
        self, image: Tensor, seeds: Sequence[Sequence[int]], sampler: Sampler, times: Sequence[int]
    ) -> Tensor:
        """Probabilities (B, N, K, *S), see `MaskDiffusion.probabilities`; members of drawn pixels are 0 or 1."""
        if self.jitter is not None:
            return self.jitter.passes(self.logits, image, seeds)
        probabilities = self.logits(image).softmax(dim=1)
        if not self.pixels:
            return probabilities[:, None].expand(-1, len(seeds[0]), *[-1] * (image.ndim - 1))
        count = probabilities.shape[1]
        members = [
            draw(p.expand(len(own), *p.shape), generators(own)) for p, own in zip(probabilities, seeds, strict=True)
        ]
        return one_hot(torch.stack(members).flatten(0, 1), count).unflatten(0, (len(image), -1)).to(image)


_SMOOTH = 1e-5
"""Makes the Dice of a class that is neither there nor predicted 1; MONAI's value."""


def dice_ce(logits: Tensor, labels: Tensor) -> Tensor:
    """Soft Dice of the foreground classes over the batch, plus cross-entropy: logits (B, K, *S), labels (B, *S).

    The value of MONAI's DiceCELoss without a mask of each class, which takes a tenth of the training step of a brain
    model of 31 classes.
    """
    log_probabilities = logits.float().log_softmax(dim=1)
    of_label = log_probabilities.gather(1, labels[:, None]).flatten()

    def of_class(values: Tensor) -> Tensor:  # sums by label; one voxel is added after the other: float64
        sums = torch.zeros(logits.shape[1], dtype=precise(logits.device), device=logits.device)
        return sums.index_add(0, labels.flatten(), values.to(sums.dtype))

    predicted = log_probabilities.exp().sum(dim=[0, *range(2, logits.ndim)])
    overlap, sizes = of_class(of_label.exp()), predicted + of_class(torch.ones_like(of_label))
    dice = (2 * overlap + _SMOOTH) / (sizes + _SMOOTH)
    return 1 - dice[1:].mean().float() - of_label.mean()
