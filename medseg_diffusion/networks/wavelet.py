"""The Haar wavelet transform as the first stage of a generator (Friedrich et al. 2024, arXiv 2402.19043).

An orthogonal transform in place of an autoencoder: nothing is trained or lost, and each side is halved. Diffusion in
its coefficients needs an eighth of the positions of a volume.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .autoencoder import Standardised
from .unet import fold, unfold


class HaarWavelet(Standardised):
    """Image (B, channels, *S) <-> standardised coefficients (B, channels * 2^dims, *S / 2); the sides must be even.

    The first coefficient of a channel is the mean of 2^dims neighbours times 2^(dims / 2), the others are differences
    along one axis or several (wdm-3d's LLL, LLH, ..., HHH).

    Args:
        dims: 2 or 3.
        channels: of the image.
    """

    matrix: Tensor

    def __init__(self, dims: int, channels: int) -> None:
        super().__init__(channels * 2**dims)
        pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]]) / math.sqrt(2)
        matrix = torch.ones(1, 1)
        for _ in range(dims):
            matrix = torch.kron(matrix, pair)
        self.register_buffer("matrix", matrix, persistent=False)

    def encode(self, image: Tensor) -> Tensor:
        """The standardised coefficients of ``image``."""
        return self.standardised(self._transformed(fold(image.float(), 2)))

    def decode(self, latent: Tensor) -> Tensor:
        """The image of standardised coefficients."""
        return unfold(self._transformed(self.unstandardised(latent)), 2)

    def _transformed(self, patches: Tensor) -> Tensor:
        """The transform of the values of each patch, which is its own inverse."""
        groups = patches.unflatten(1, (-1, len(self.matrix)))
        with torch.autocast(patches.device.type, enabled=False):  # it would lose what makes the transform its inverse
            return torch.einsum("ij,bcj...->bci...", self.matrix, groups).flatten(1, 2)
