"""Segmentation from a handful of labels: classifiers of a generator's activations, pixel by pixel.

(Baranchuk et al. 2022, arXiv 2112.03126, "DDPM-Seg".) An unlabelled collection trains a generator; K labelled images
then train an ensemble of small classifiers. The published code upsamples and keeps all features of all pixels, 2.2 GB
an image. Here training gathers features at sampled pixels only, and inference upsamples what the first layer makes of
them: the same predictions from the same classifiers.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medseg_diffusion.diffusion.noise import derive_seed
from medseg_diffusion.errors import InputError, MedsegError, UsageError
from medseg_diffusion.networks.pixel_classifier import PixelClassifiers, gathered
from medseg_diffusion.sampling.loop import Sampler
from medseg_diffusion.volumes.fitting import from_generator_grid, to_generator_grid

from .activations import PUBLISHED_BLOCKS, Activations

FEWEST_PIXELS = 20
"""A class with fewer pixels in a labelled image is left out of it, as published."""
PUBLISHED_FEATURES = 8448
"""Of a pixel. Where the finer blocks of a decoder have no more altogether, none is left out."""
SEARCHED_BLOCKS = 5
"""As many as published are chosen where a network has more features, but other blocks."""
SEARCHED_PIXELS = 20_000
"""Of all classes and images, for that choice: the features of every block of the decoder are held."""
_LARGEST_HALF = 65504.0
_ROWS = 1024

Change = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]
"""An image (C, *S), its labels (*S) and a generator to what a copy is to show."""


class PixelSegmentation(nn.Module):
    """A generator's activations and the classifiers of its pixels: images to masks.

    Args:
        activations: of the generator.
        classifiers: trained on these activations.
        size: of the generator's images; others are fitted to it.
        channels: of the generator's images; a single one is repeated.
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
        """Class probabilities (B, N, K, *S) of images (B, C, *S) by the first N members, one for each seed of an image.

        Nothing is sampled: seeds are only counted, and sampler and times are those of other segmenters.

        Raises:
            UsageError: more members than there are.
        """
        members, known = len(seeds[0]), len(self.classifiers.members)
        if members > known:
            raise UsageError(f"an ensemble of {members} was asked for, but the model has {known} members")
        there = to_generator_grid(image.clamp(-1, 1), self.size)
        blocks = self.activations(there.expand(-1, self.channels, *self.size))
        found = self.classifiers.maps(blocks, self.size, members).float().softmax(2)
        return from_generator_grid(found.flatten(1, 2), image.shape[2:]).unflatten(1, found.shape[1:3])


@dataclass(frozen=True, eq=False)
class LabelledPixels:
    """Sampled pixels of the labelled images.

    Attributes:
        features: (P, F) float16, in memory or mapped from a file.
        labels: (P,) int64.
        image: (P,) int64, the number of the labelled image that a pixel is of.
        share: (K,) float64, share of each class among all pixels of the images, sampled or not.
        channels: of each block, F in all.
    """

    features: npt.NDArray[np.float16]
    labels: Tensor
    image: Tensor
    share: Tensor
    channels: tuple[int, ...]


@torch.no_grad()
def labelled_pixels(
    activations: Activations,
    images: Sequence[Tensor],
    labels: Sequence[Tensor],
    classes: Sequence[str],
    per_class: int,
    seed: int,
    store: Path | None = None,
    on_image: Callable[[int, int], None] = lambda done, total: None,
    copies: int = 0,
    change: Change = lambda image, label, generator: (image, label),
) -> LabelledPixels:
    """Samples pixels of every class alike and gathers their features.

    One image shows one brightness, one pose and one size of what is labelled: changed copies (not published) show more.
    They share the pixels, so that there are no more features, and the slices: each is changed once, or a single one (a
    picture, a volume) in every copy.

    Args:
        activations: of the generator, on its device.
        images: each (n, C, *size) on the generator's grid: the n slices of one labelled image, or n = 1.
        labels: each (n, *size) integers.
        classes: names, background first.
        per_class: most pixels of a class from a labelled image, all of its slices and copies together.
        seed: of the choice of pixels and the changes.
        store: file for the features; None keeps them in memory.
        on_image: called with (images done, images in all), copies included.
        copies: of every labelled image, beside itself.
        change: makes an image (C, *size) and its labels (*size) those of a copy. Called twice for each, so that copies
            need not be held.

    Raises:
        InputError: a class that has too few pixels in each of the images.
        MedsegError: no room for the features on the disk of ``store``.
    """
    device = activations.noise.device
    chosen, values, share = [], [], torch.zeros(len(classes), dtype=torch.float64)
    examples = [(i, copy) for i in range(len(images)) for copy in range(1 + copies)]

    def example(i: int, copy: int) -> tuple[Tensor, Tensor]:
        if not copy:
            return images[i], labels[i]
        count = len(images[i])
        order = torch.randperm(count, generator=torch.Generator().manual_seed(derive_seed(seed, "slices", i))).tolist()
        generator = torch.Generator().manual_seed(derive_seed(seed, "copy", i, copy))
        own = order[copy - 1 :: copies] or [order[(copy - 1) % count]]
        changed = [change(images[i][k], labels[i][k], generator) for k in own]
        image, label = (torch.stack(part) for part in zip(*changed, strict=True))
        return image.clamp(-1, 1), label

    for i in range(len(images)):
        shown = [example(i, copy)[1] for copy in range(1 + copies)]
        count = torch.stack([torch.bincount(label.flatten(), minlength=len(classes)) for label in shown]).numpy()
        share += torch.from_numpy(count[0])
        # As many of each as if a class' pixels were drawn from all that show it.
        random = np.random.default_rng(derive_seed(seed, "pixels", i))
        quota = np.zeros_like(count)
        for value in np.flatnonzero(count[0] >= FEWEST_PIXELS):
            wanted = min(per_class, int(count[:, value].sum()))
            quota[:, value] = random.multivariate_hypergeometric(count[:, value], wanted, method="marginals")
        for label, wanted_of in zip(shown, quota, strict=True):
            flat, positions = label.flatten(), []
            for value in np.flatnonzero(wanted_of):
                there = (flat == int(value)).nonzero().flatten()
                positions.append(there[torch.from_numpy(random.permutation(len(there))[: wanted_of[value]])])
            together = torch.cat(positions or [flat[:0].long()])
            values.append(flat[together].long())
            chosen.append(torch.stack(torch.unravel_index(together, label.shape), 1))
    target = torch.cat(values)
    if missing := sorted(set(range(len(classes))) - set(target.tolist())):
        raise InputError(
            None,
            f"fewer than {FEWEST_PIXELS} pixels of label {missing[0]} ({classes[missing[0]]}) in each of the "
            f"{len(images)} labelled images",
            "enough of every class in at least one of them",
            "label more images, or take the class out of the names of the labels",
        )
    features: npt.NDArray[np.float16] | None = None
    channels: tuple[int, ...] = ()
    first = 0
    for done, ((i, copy), positions_of) in enumerate(zip(examples, chosen, strict=True), 1):
        image, _ = example(i, copy)
        for k in torch.unique(positions_of[:, 0]).tolist():
            blocks = activations(image[k : k + 1].to(device))
            if features is None:
                channels = tuple(block.shape[1] for block in blocks)
                shape = (len(target), sum(channels))
                features = np.empty(shape, np.float16) if store is None else _mapped(store, shape)
            full = [block[0].float() for block in blocks]
            for own in (positions_of[:, 0] == k).nonzero().flatten().split(_ROWS):
                rows = torch.cat([gathered(block, positions_of[own, 1:], image.shape[2:]) for block in full], 1)
                features[(first + own).numpy()] = rows.clamp(-_LARGEST_HALF, _LARGEST_HALF).half().cpu().numpy()
        first += len(positions_of)
        on_image(done, len(examples))
    assert features is not None
    numbers = torch.tensor([i for i, _ in examples])
    image_of = numbers.repeat_interleave(torch.tensor([len(positions) for positions in chosen]))
    return LabelledPixels(features, target, image_of, share / share.sum(), channels)


def _mapped(store: Path, shape: tuple[int, int]) -> npt.NDArray[np.float16]:
    store.parent.mkdir(parents=True, exist_ok=True)
    needed, free = 2 * math.prod(shape), shutil.disk_usage(store.parent).free
    if needed > free:  # writing to a mapped file on a full disk kills the process
        raise MedsegError(
            f"{store.parent}: {free / 1e9:.1f} GB free, but the features of the sampled pixels are {needed / 1e9:.1f} "
            "GB; free the disk, or lower data.pixels_per_class"
        )
    return np.lib.format.open_memmap(store, "w+", np.float16, shape)


@dataclass(frozen=True)
class ClassifierOptions:
    """Published settings (Baranchuk et al. 2022, and their code for the stopping rule).

    Attributes:
        members: classifiers in the ensemble.
        hidden: widths of the hidden layers, None for the published ones.
        batch_size: pixels.
        learning_rate: of Adam.
        max_epochs: passes over the pixels.
        min_epochs: before a classifier may stop.
        min_steps: the same in batches. Published collections are so large that four epochs are 80,000 of them.
        patience: batches without a smaller loss after which it stops.
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
) -> PixelClassifiers:
    """Trains the classifiers on the sampled pixels, one after another, and corrects them for the sampling.

    Classes were sampled alike, so a rare class would be found everywhere: the last biases get the logarithm of each
    class' share in the images over its share in the sample, which makes the probabilities those of the images.

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
            if len(batch) < 2:  # no batch statistics
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
    """Mean and standard deviation (F,) of the rows, in float64, without a copy of all of them.

    Where the deviation is no more than what float16 rounds off the mean, it is 1.
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
    """The published blocks where the generator has them; else those of the finer half of the decoder's resolutions.

    Coarser ones tell where in a labelled image a pixel is, which is another place in the next image: without them five
    labels teach more (docs/results/label-efficient.md), and the published blocks are none of the coarsest either.

    All that are left are taken where they have no more features than the published ones. Else each is scored alone, by
    the balanced accuracy of ridge regression onto the classes, fitted on half of the labelled images and tried on the
    other half, and the other way round (on halves of the pixels where there is one image); the best five are taken.
    """
    known = activations.decoder_blocks()
    if set(PUBLISHED_BLOCKS) <= set(known):
        return PUBLISHED_BLOCKS
    found = activations.with_blocks(known)(images[0][:1].to(activations.noise.device))
    shapes = [block.shape[1:3] for block in found[: len(known)]]  # channels and a side, at one of the times
    del found
    sides = sorted({side for _, side in shapes})
    coarsest = sides[len(sides) // 2]
    known = [name for name, (_, side) in zip(known, shapes, strict=True) if side >= coarsest]
    features = len(activations.times) * sum(channels for channels, side in shapes if side >= coarsest)
    if len(known) <= SEARCHED_BLOCKS or features <= PUBLISHED_FEATURES:
        return tuple(known)
    every = activations.with_blocks(known)
    few = max(1, min(per_class, SEARCHED_PIXELS // (len(images) * len(classes))))
    pixels = labelled_pixels(every, images, labels, classes, few, seed)
    mean, std = _moments(pixels.features)
    columns = torch.arange(len(mean)).split(pixels.channels)
    wanted = F.one_hot(pixels.labels, len(classes)).float()
    odd = pixels.image % 2 == 1 if len(images) > 1 else torch.arange(len(wanted)) % 2 == 1
    scores = []
    for i in range(len(known)):
        own = torch.cat(columns[i :: len(known)])  # the block at every time
        x = (torch.from_numpy(pixels.features[:, own.numpy()]).float() - mean[own]) / std[own]
        scores.append(sum(_ridge_accuracy(x, wanted, pixels.labels, side) for side in (odd, ~odd)))
    best = sorted(range(len(known)), key=lambda i: -scores[i])[:SEARCHED_BLOCKS]
    return tuple(known[i] for i in sorted(best))


def _ridge_accuracy(x: Tensor, wanted: Tensor, labels: Tensor, fit: Tensor) -> float:
    """Balanced accuracy, outside of ``fit``, of ridge regression within it."""
    inside, outside = x[fit], x[~fit]
    centre = wanted[fit].mean(0)
    gram = inside.T @ inside + len(inside) * 0.01 * torch.eye(x.shape[1])
    coefficients = torch.linalg.solve(gram, inside.T @ (wanted[fit] - centre))
    right = (outside @ coefficients + centre).argmax(1) == labels[~fit]
    classes = torch.unique(labels[~fit])
    return float(torch.stack([right[labels[~fit] == value].float().mean() for value in classes]).mean())
