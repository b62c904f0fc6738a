"""How much samples differ from each other: their structural similarity, without any feature extractor."""

from __future__ import annotations

import torch
from torch import Tensor

WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Weights of the five scales of MS-SSIM (Wang et al. 2003, sec. 3.2), from fine to coarse."""
WINDOW = 11
"""Side of the Gaussian window, in voxels."""
PAIRS = 100
"""Pairs of samples that are compared."""


def ms_ssim_diversity(volumes: Tensor, pairs: int = PAIRS, seed: int = 0) -> float:
    """Mean multi-scale structural similarity of pairs of different volumes: 1 if all are equal, lower if they differ.

    The usual measure of diversity for volumes (Kwon et al. 2019, arXiv 1908.02498, sec. 3.2). It says nothing about
    how real they are, so that it has to be read beside that of real volumes. Volumes with a side below 176 have fewer
    than the five published scales (`count_of_scales`); only volumes of equal shape compare.

    Args:
        volumes: (N, C, I, J, K) uint8 levels, N at least 2.
        pairs: Largest number of pairs: each volume and the next one in an order drawn by ``seed``.
        seed: Seed of that order.

    Raises:
        ValueError: Fewer than two volumes, or a side below `WINDOW`.
    """
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    scales = count_of_scales(min(volumes.shape[2:]))
    if len(volumes) < 2 or scales == 0:
        found = f"{len(volumes)} volumes of {' x '.join(map(str, volumes.shape[2:]))}"
        raise ValueError(f"{found}: expected two volumes or more, with sides of {WINDOW} or more")
    weights = torch.tensor(WEIGHTS[:scales], dtype=torch.float64)
    betas = tuple((weights / weights.sum()).tolist())
    order = torch.randperm(len(volumes), generator=torch.Generator().manual_seed(seed))
    similarities = []
    for a, b in list(zip(order.tolist(), order.roll(-1).tolist(), strict=True))[:pairs]:
        one, other = (volumes[i][None].float() for i in (a, b))
        similarities.append(
            multiscale_structural_similarity_index_measure(
                one, other, kernel_size=WINDOW, data_range=255.0, betas=betas, normalize="relu"
            )
        )
    return float(torch.stack(similarities).mean())


def count_of_scales(side: int) -> int:
    """How many scales, at most five, have a side of at least `WINDOW`; each scale halves the one before it.

    torchmetrics divides by the square of the number of halvings instead: for four scales it asks for a side of 99.
    """
    scales = 0
    while scales < len(WEIGHTS) and side // max(2**scales, scales**2) >= WINDOW:
        scales += 1
    return scales
