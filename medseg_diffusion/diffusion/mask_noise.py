"""How much of a mask its noised version shows by itself, without the image.

A mask of a share f of the positions lies in {-s, +s}. At log-SNR l = log(s^2 alpha^2 / sigma^2), foreground and
background of x_t are normal distributions with a distance of d' = 2 exp(l / 2) standard deviations. Two levels matter:

* From some l on, a threshold finds the mask. A network has nothing to learn from the image there.
* A threshold finds an object of n positions only if every position can be read, but a network can add up all n of them:
  two masks that differ in n positions can be told apart from l = -log n on (the two log-likelihoods then differ by 2).
"""

from __future__ import annotations

import torch


def threshold_dice(log_snr: float, share: float) -> float:
    """The largest Dice that any threshold on x_t has with the mask, in expectation over many positions.

    Args:
        log_snr: log(scale^2 alpha^2 / sigma^2).
        share: share of the positions that are foreground, between 0 and 1.
    """
    if not 0 < share < 1:
        raise ValueError(f"the share of the foreground must lie between 0 and 1, got {share}")
    distance = 2 * torch.tensor(log_snr / 2, dtype=torch.float64).exp()
    threshold = torch.linspace(-8, float(distance) + 8, 20_001, dtype=torch.float64)
    upper = torch.special.ndtr
    true = share * upper(distance - threshold)  # background has mean 0 and foreground mean d'
    false = (1 - share) * upper(-threshold)
    return float((2 * true / (true + false + share)).max())
