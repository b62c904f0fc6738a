"""Pixels of a PNG, and the size of what is drawn there."""

from __future__ import annotations

import io

import numpy as np
from matplotlib.image import imread
from scipy.ndimage import label


def pixels(png: bytes) -> np.ndarray:
    """A PNG as (H, W, 3) in [0, 1]."""
    return imread(io.BytesIO(png), format="png")[..., :3]


def extent(mask: np.ndarray) -> tuple[int, int]:
    """Height and width in pixels of the largest connected part: not of the letters, which hold any shade."""
    parts, _ = label(mask)
    rows, columns = np.nonzero(parts == np.bincount(parts[mask]).argmax())
    return int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1
