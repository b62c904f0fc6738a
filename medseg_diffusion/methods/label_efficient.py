"""Segmentation from a few labelled images: classifiers of a generator's activations at each pixel.

Baranchuk et al. 2022 (arXiv 2112.03126, "DDPM-Seg"). A generator is trained on an unlabelled collection. An ensemble of
small classifiers is then trained on K labelled images. The published code upsamples all features of all pixels. Here
training gathers features only at sampled pixels (`labelled_pixels`), and inference upsamples the output of each
classifier's first layer. The predictions are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medseg_diffusion.diffusion.noise import derive_seed
from medseg_diffusion.errors import MedsegError, UsageError
from medseg_diffusion.networks.pixel_classifier import PixelClassifiers
from medseg_diffusion.sampling.loop import Sampler
from medseg_diffusion.volumes.fitting import from_generator_grid, to_generator_grid

from .activations import PUBLISHED_BLOCKS, Activations
from .labelled_pixels import ALONE, LabelledPixels, PixelSampling, WorkerGroup, labelled_pixels

PUBLISHED_FEATURES = 8448
"""Number of features of a pixel. If the finer blocks of a decoder have no more than this, all of them are used."""
SEARCHED_BLOCKS = 5
"""Number of blocks that are chosen from a network with more features: as many as published."""
SEARCHED_PIXELS = 20_000
"""Number of pixels, over all classes and images, for that choice. The features of all blocks must fit into memory."""
_ROWS = 1024


class PixelSegmentation(nn.Module):
    """A generator's activations and pixel classifiers on them: images to masks.

    Args:
        activations: activations of the generator.
        classifiers: classifiers that were trained on these activations.
        size: size of the generator's images. Other images are brought to this grid.
        channels: channels of the generator's images. A single channel is repeated.
    """

    def __init__(
        self, activations: Activations, classifiers: PixelClassifiers, size: Sequence[int], channels: int = 1
    ) -> None:
        super().__init__()
        self.activations = activations
        self.classifiers = classifiers
        self.size, self.channels = tuple(size), channels

    def probabilities(
        self, image: Tensor, seeds: Sequence[Sequence[int]], sampler: Sampler, times: Sequence[int]
    ) -> Tensor:
        """Class probabilities (B, N, K, *S) of images (B, C, *S) from the first N members, N seeds for each image.

        Nothing is sampled. Only the number of seeds matters; ``sampler`` and ``times`` are not used.

        Raises:
            UsageError: more members than the model has.
        """
        members, available = len(seeds[0]), len(self.classifiers.members)
        if members > available:
            raise UsageError(f"an ensemble of {members} was asked for, but the model has {available} members")
        on_grid = to_generator_grid(image.clamp(-1, 1), self.size)
        blocks = self.activations(on_grid.expand(-1, self.channels, *self.size))
        maps = self.classifiers.maps(blocks, self.size, members).float().softmax(2)
        return from_generator_grid(maps.flatten(1, 2), image.shape[2:]).unflatten(1, maps.shape[1:3])


@dataclass(frozen=True)
class ClassifierOptions:
    """Training of the classifiers. The defaults are published (Baranchuk et al. 2022; the stopping rule in their code).

    Attributes:
        members: number of classifiers in the ensemble.
        hidden: widths of the hidden layers; None for the published widths.
        batch_size: pixels in a batch.
        learning_rate: learning rate of Adam.
        max_epochs: largest number of passes over the pixels.
        min_epochs: smallest number of passes.
        min_steps: smallest number of batches. It is not published: there, four epochs are 80,000 batches.
        patience: a classifier stops after this many batches without a smaller loss.
    """

    members: int = 10
    hidden: tuple[int, int] | None = None
    batch_size: int = 64
    learning_rate: float = 1e-3
    max_epochs: int = 100
    min_epochs: int = 4
    min_steps: int = 1000
    patience: int = 50


def fit_classifiers(
    pixels: LabelledPixels,
    options: ClassifierOptions = ClassifierOptions(),
    seed: int = 0,
    device: torch.device | str = "cpu",
    on_member: Callable[[int, int], None] = lambda done, total: None,
    together: WorkerGroup = ALONE,
) -> PixelClassifiers:
    """Train the classifiers on the sampled pixels, one after another, and correct them for the sampling.

    Of several processes (``together``), each trains its own members only: `WorkerGroup.mine`.

    The sample is balanced, so the classifiers overestimate rare classes. The logarithm of each class's share in the
    images, divided by its share in the sample, is added to the last biases. The probabilities then have the images'
    class frequencies as their prior.

    Raises:
        MedsegError: the loss is not finite.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "classifiers"))
        model = PixelClassifiers(options.members, pixels.features.shape[1], len(pixels.share), options.hidden)
    model.to(device)
    mean, std = _moments(pixels.features)
    model.mean.copy_(mean)
    model.std.copy_(std)
    for i, member in enumerate(model.members):
        if together.mine(i):
            _fit(member, model, pixels, options, derive_seed(seed, "member", i))
        on_member(i + 1, options.members)
    sampled = torch.bincount(pixels.labels, minlength=len(pixels.share)).double()
    correction = (pixels.share / (sampled / sampled.sum())).log().float().to(device)
    with torch.no_grad():
        for member in model.members:
            member.rest[-1].bias += correction  # type: ignore[union-attr,index]
    return model.eval()


def _fit(
    member: nn.Module, model: PixelClassifiers, pixels: LabelledPixels, options: ClassifierOptions, seed: int
) -> None:
    device = model.mean.device
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(member.parameters(), lr=options.learning_rate, fused=device.type != "mps")
    best, waited, steps = float("inf"), 0, 0
    member.train()
    for epoch in range(options.max_epochs):
        for batch in torch.randperm(len(pixels.labels), generator=generator).split(options.batch_size):
            if len(batch) < 2:  # too small for batch statistics
                continue
            rows = torch.from_numpy(pixels.features[batch.numpy()]).to(device).float()
            loss = F.cross_entropy(member((rows - model.mean) / model.std), pixels.labels[batch].to(device))
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            value = float(loss.detach())
            if not math.isfinite(value):
                raise MedsegError(
                    f"the loss of the classifiers became {value}: lower classifier.learning_rate, or use a generator "
                    "whose activations are finite"
                )
            steps += 1
            if epoch < options.min_epochs or steps < options.min_steps:
                continue
            best, waited = (value, 0) if value < best else (best, waited + 1)
            if waited > options.patience:
                member.eval()
                return
    member.eval()


def _moments(features: npt.NDArray[np.float16]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (F,) of the rows, computed in float64 part by part to save memory.

    A deviation that is no larger than the rounding of the mean to float16 is replaced by 1.
    """
    total = np.zeros(features.shape[1])
    squares = np.zeros(features.shape[1])
    shift = features[0].astype(np.float64)
    for first in range(0, len(features), _ROWS):
        part = features[first : first + _ROWS].astype(np.float64) - shift
        total += part.sum(0)
        squares += np.square(part).sum(0)
    shifted = total / len(features)
    mean, std = shifted + shift, np.sqrt(np.maximum(squares / len(features) - shifted**2, 0))
    varies = std > np.maximum(1e-6, 1e-3 * np.abs(mean))
    return torch.from_numpy(mean).float(), torch.from_numpy(np.where(varies, std, 1.0)).float()


def choose_blocks(
    activations: Activations,
    images: Sequence[Tensor],
    labels: Sequence[Tensor],
    classes: Sequence[str],
    seed: int,
    per_class: int = 200,
) -> tuple[str, ...]:
    """Choose the decoder's blocks whose activations are the features.

    The published blocks are chosen if the generator has them. Otherwise the candidates are the blocks at the finer half
    of the decoder's resolutions. Coarser blocks show where a pixel is in a labelled image, which does not carry over to
    other images: with five labelled images, results are better without them (docs/results/label-efficient.md). The
    published blocks are not the coarsest either.

    All candidates are chosen if there are at most five, or if they have no more features than the published blocks.
    Otherwise the best five are chosen. Each candidate is scored by the balanced accuracy of ridge regression onto the
    classes, cross-validated on two halves of the labelled images (of the pixels if there is one image).

    Args:
        activations: activations of the generator, on its device.
        images: see `labelled_pixels`.
        labels: see `labelled_pixels`.
        classes: names, background first.
        seed: seed of the choice of pixels.
        per_class: largest number of pixels of a class from one image.
    """
    names = activations.decoder_blocks()
    if set(PUBLISHED_BLOCKS) <= set(names):
        return PUBLISHED_BLOCKS
    blocks = activations.with_blocks(names)(images[0][:1].to(activations.noise.device))
    shapes = [block.shape[1:3] for block in blocks[: len(names)]]  # channels and first side, at the first time
    del blocks
    sides = sorted({side for _, side in shapes})
    coarsest = sides[len(sides) // 2]
    names = [name for name, (_, side) in zip(names, shapes, strict=True) if side >= coarsest]
    features = len(activations.times) * sum(channels for channels, side in shapes if side >= coarsest)
    if len(names) <= SEARCHED_BLOCKS or features <= PUBLISHED_FEATURES:
        return tuple(names)
    every = activations.with_blocks(names)
    few = max(1, min(per_class, SEARCHED_PIXELS // (len(images) * len(classes))))
    pixels = labelled_pixels(every, images, labels, classes, PixelSampling(few, seed))
    mean, std = _moments(pixels.features)
    columns = torch.arange(len(mean)).split(pixels.channels)
    target = F.one_hot(pixels.labels, len(classes)).float()
    odd = pixels.image % 2 == 1 if len(images) > 1 else torch.arange(len(target)) % 2 == 1
    scores = []
    for i in range(len(names)):
        columns_of_block = torch.cat(columns[i :: len(names)])  # at every time
        x = torch.from_numpy(pixels.features[:, columns_of_block.numpy()]).float()
        x = (x - mean[columns_of_block]) / std[columns_of_block]
        scores.append(sum(_ridge_accuracy(x, target, pixels.labels, half) for half in (odd, ~odd)))
    best = sorted(range(len(names)), key=lambda i: -scores[i])[:SEARCHED_BLOCKS]
    return tuple(names[i] for i in sorted(best))


def _ridge_accuracy(x: Tensor, target: Tensor, labels: Tensor, fit: Tensor) -> float:
    """Balanced accuracy, on the rows outside ``fit``, of ridge regression on the rows in ``fit`` (bool)."""
    inside, outside = x[fit], x[~fit]
    centre = target[fit].mean(0)
    gram = inside.T @ inside + len(inside) * 0.01 * torch.eye(x.shape[1])
    coefficients = torch.linalg.solve(gram, inside.T @ (target[fit] - centre))
    right = (outside @ coefficients + centre).argmax(1) == labels[~fit]
    classes = torch.unique(labels[~fit])
    return float(torch.stack([right[labels[~fit] == value].float().mean() for value in classes]).mean())
