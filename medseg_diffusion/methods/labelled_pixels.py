"""Sampled pixels of labelled images and their features: what the classifiers of `label_efficient` are trained on.

The published code upsamples and keeps all features of all pixels, 2.2 GB for each image. Here features are gathered at
the sampled pixels only.
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
from torch import Tensor

from medseg_diffusion.diffusion.noise import derive_seed
from medseg_diffusion.errors import InputError, MedsegError
from medseg_diffusion.networks.pixel_classifier import gathered

from .activations import Activations

FEWEST_PIXELS = 20
"""A class with fewer pixels than this in a labelled image is not sampled from it, as published."""
_LARGEST_HALF = 65504.0
_ROWS = 1024

Change = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]
"""Makes the image (C, *S) and the labels (*S) of a copy from an image, its labels and a generator."""


@dataclass(frozen=True, eq=False)
class LabelledPixels:
    """Sampled pixels of the labelled images.

    Attributes:
        features: (P, F) float16, in memory or mapped from a file.
        labels: (P,) int64.
        image: (P,) int64, index of the labelled image of each pixel.
        share: (K,) float64, share of each class among all pixels of the images, sampled or not.
        channels: channels of each block, F in total.
    """

    features: npt.NDArray[np.float16]
    labels: Tensor
    image: Tensor
    share: Tensor
    channels: tuple[int, ...]


@dataclass(frozen=True)
class PixelSampling:
    """How pixels are sampled, and from how many changed copies of each image.

    A labelled image shows one brightness, one pose and one size. Changed copies show more (not published). They share
    the image's number of pixels, so that there are no more features. They also share its slices: each slice is changed
    once, but a single slice (a picture or a volume) is changed in every copy.

    Attributes:
        per_class: largest number of pixels of a class from one labelled image, all of its slices and copies together.
        seed: seed of the choice of pixels and of the changes.
        copies: changed copies of every labelled image, beside the image itself.
        change: makes an image (C, *size) and its labels (*size) those of a copy. It is called twice for each copy, so
            that copies need not be kept in memory.
    """

    per_class: int
    seed: int
    copies: int = 0
    change: Change = lambda image, label, generator: (image, label)


@dataclass(frozen=True)
class WorkerGroup:
    """Process ``index`` of ``count`` that share the work. ``wait`` returns when all of them have called it."""

    index: int = 0
    count: int = 1
    wait: Callable[[], None] = lambda: None

    def mine(self, number: int) -> bool:
        """Whether the part of this number is done by this process."""
        return number % self.count == self.index


ALONE = WorkerGroup()


@torch.no_grad()
def labelled_pixels(
    activations: Activations,
    images: Sequence[Tensor],
    labels: Sequence[Tensor],
    classes: Sequence[str],
    sampling: PixelSampling,
    store: Path | None = None,
    on_image: Callable[[int, int], None] = lambda done, total: None,
    together: WorkerGroup = ALONE,
) -> LabelledPixels:
    """Sample the same number of pixels of every class, as far as there are enough, and gather their features.

    Args:
        activations: activations of the generator, on its device.
        images: each (n, C, *size) on the generator's grid: the n slices of one labelled image, or n = 1.
        labels: each (n, *size) integers.
        classes: names, background first.
        sampling: number of pixels, seed and copies.
        store: file for the features; None keeps them in memory.
        on_image: called with (images done, images in all), copies included.
        together: the processes, each of which computes the features of its own images; all of them get the features of
            all images, through files beside ``store``.

    Raises:
        InputError: a class that has too few pixels in each of the images.
        MedsegError: no room for the features on the disk of ``store``.
    """
    source = _Examples(images, labels, sampling)
    positions, targets, share = _draw(source, len(classes))
    target = torch.cat(targets)
    if missing := sorted(set(range(len(classes))) - set(target.tolist())):
        raise InputError(
            None,
            f"fewer than {FEWEST_PIXELS} pixels of label {missing[0]} ({classes[missing[0]]}) in each of the "
            f"{len(images)} labelled images",
            "enough of every class in at least one of them",
            "label more images, or take the class out of the names of the labels",
        )
    channels = tuple(block.shape[1] for block in activations(images[0][:1].to(activations.noise.device)))
    shape = (len(target), sum(channels))
    own = store if store is None or together.count == 1 else store.with_suffix(f".{together.index}.npy")
    features = np.empty(shape, np.float16) if own is None else _mapped(own, shape)
    firsts = np.cumsum([0, *(len(pixels) for pixels in positions)])
    for number, ((i, copy), pixels) in enumerate(zip(source.numbers, positions, strict=True)):
        if together.mine(number):
            image, _ = source.example(i, copy)
            _gather(activations, image, pixels, features[firsts[number] : firsts[number + 1]])
        on_image(number + 1, len(source.numbers))
    if own != store and own is not None and store is not None:
        del features
        features = _joined(own, store, shape, firsts, together)
    image_of = torch.tensor([i for i, _ in source.numbers])
    image_of = image_of.repeat_interleave(torch.tensor([len(pixels) for pixels in positions]))
    return LabelledPixels(features, target, image_of, share / share.sum(), channels)


def _gather(activations: Activations, image: Tensor, pixels: Tensor, features: npt.NDArray[np.float16]) -> None:
    """Writes the features of the pixels (P, 1 + dims), slice first, of the slices (n, C, *size) to ``features``."""
    for k in torch.unique(pixels[:, 0]).tolist():
        blocks = activations(image[k : k + 1].to(activations.noise.device))
        full = [block[0].float() for block in blocks]
        for part in (pixels[:, 0] == k).nonzero().flatten().split(_ROWS):
            rows = torch.cat([gathered(block, pixels[part, 1:], image.shape[2:]) for block in full], 1)
            features[part.numpy()] = rows.clamp(-_LARGEST_HALF, _LARGEST_HALF).half().cpu().numpy()


def _joined(
    own: Path, store: Path, shape: tuple[int, int], firsts: npt.NDArray[np.int64], together: WorkerGroup
) -> npt.NDArray[np.float16]:
    """The features of all processes, each of which has written a file of its own; the first process joins them.

    One file for all would not do: across machines, two of them would write to the same pages of it.
    """
    together.wait()
    if together.index == 0:
        whole = _mapped(store, shape)
        for rank in range(together.count):
            part = np.load(store.with_suffix(f".{rank}.npy"), mmap_mode="r")
            for number in range(rank, len(firsts) - 1, together.count):
                rows = slice(firsts[number], firsts[number + 1])
                whole[rows] = part[rows]
        del whole  # writes it
    together.wait()
    own.unlink()
    joined: npt.NDArray[np.float16] = np.load(store, mmap_mode="r")
    return joined


@dataclass(frozen=True, eq=False)
class _Examples:
    """The labelled images and their changed copies, which are made when they are asked for."""

    images: Sequence[Tensor]
    labels: Sequence[Tensor]
    sampling: PixelSampling

    @property
    def numbers(self) -> list[tuple[int, int]]:
        """(image, copy) of every example; copy 0 is the image itself."""
        return [(i, copy) for i in range(len(self.images)) for copy in range(1 + self.sampling.copies)]

    def example(self, i: int, copy: int) -> tuple[Tensor, Tensor]:
        """The slices (n, C, *size) of image ``i`` or of a copy of it, and their labels (n, *size)."""
        images, labels, sampling = self.images[i], self.labels[i], self.sampling
        if not copy:
            return images, labels
        shuffle = torch.Generator().manual_seed(derive_seed(sampling.seed, "slices", i))
        order = torch.randperm(len(images), generator=shuffle).tolist()
        generator = torch.Generator().manual_seed(derive_seed(sampling.seed, "copy", i, copy))
        slices = order[copy - 1 :: sampling.copies] or [order[(copy - 1) % len(images)]]
        changed = [sampling.change(images[k], labels[k], generator) for k in slices]
        image, label = (torch.stack(part) for part in zip(*changed, strict=True))
        return image.clamp(-1, 1), label


def _draw(source: _Examples, classes: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Draw the pixels of every example.

    Returns:
        For each example the positions (P_i, 1 + dims), slice first, and the labels (P_i,); and the number of pixels
        (K,) of each class in the images.
    """
    sampling = source.sampling
    positions, targets, share = [], [], torch.zeros(classes, dtype=torch.float64)
    for i in range(len(source.images)):
        labels = [source.example(i, copy)[1] for copy in range(1 + sampling.copies)]
        count = torch.stack([torch.bincount(label.flatten(), minlength=classes) for label in labels]).numpy()
        share += torch.from_numpy(count[0])
        # The quota of each copy is that of a draw from the pixels of all copies together.
        random = np.random.default_rng(derive_seed(sampling.seed, "pixels", i))
        quota = np.zeros_like(count)
        for value in np.flatnonzero(count[0] >= FEWEST_PIXELS):
            number = min(sampling.per_class, int(count[:, value].sum()))
            quota[:, value] = random.multivariate_hypergeometric(count[:, value], number, method="marginals")
        for label, numbers in zip(labels, quota, strict=True):
            flat, indices = label.flatten(), []
            for value in np.flatnonzero(numbers):
                of_class = (flat == int(value)).nonzero().flatten()
                indices.append(of_class[torch.from_numpy(random.permutation(len(of_class))[: numbers[value]])])
            drawn = torch.cat(indices or [flat[:0].long()])
            targets.append(flat[drawn].long())
            positions.append(torch.stack(torch.unravel_index(drawn, label.shape), 1))
    return positions, targets, share


def _mapped(store: Path, shape: tuple[int, int]) -> npt.NDArray[np.float16]:
    """A new file of features in memory; MedsegError if the disk is too full for it."""
    store.parent.mkdir(parents=True, exist_ok=True)
    needed, free = 2 * math.prod(shape), shutil.disk_usage(store.parent).free
    if needed > free:  # writing to a mapped file on a full disk kills the process
        raise MedsegError(
            f"{store.parent}: {free / 1e9:.1f} GB free, but the features of the sampled pixels are {needed / 1e9:.1f} "
            "GB; free the disk, or lower data.pixels_per_class"
        )
    return np.lib.format.open_memmap(store, "w+", np.float16, shape)
