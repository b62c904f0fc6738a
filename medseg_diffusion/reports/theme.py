"""Colours of pages, plots and pictures: one for each meaning.

Reference and prediction have a colour each, and classes have others, so that no colour is read as the wrong thing.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# On scans and on dark pages. They differ most on grey for any colour vision (Okabe and Ito, "Color Universal Design").
REFERENCE = "#E69F00"
PREDICTION = "#56B4E9"
# The same hues, dark enough for lines and text on a white page (contrast of at least 4.5 to 1).
REFERENCE_ON_WHITE = "#966600"
PREDICTION_ON_WHITE = "#0072B2"

# Classes. Any two of these and the two above are at least 0.08 apart in OKLab, also for eyes without red, green or blue
# cones; the first six at least 0.1. All are bright enough for black and dark enough for white.
CLASSES = (
    "#EB3B76", "#14FFEB", "#D8EB4E", "#8976FF", "#B11414", "#9DD89D",
    "#008962", "#B16200", "#4E27EB", "#B176B1", "#893B89", "#7662C4",
)  # fmt: skip
# Shares of white (positive) or black (negative) that are mixed into the colours when there are more classes.
_SHADES = (0.0, 0.45, -0.35, 0.7, -0.6)

# Perceptually uniform colormaps of matplotlib.
UNCERTAINTY = "viridis"
ANOMALY = "plasma"


def label_colour(index: int) -> str:
    """Colour of the index-th class (from 0) as #RRGGBB. The first 60 differ; they are repeated after that."""
    colour, shade = CLASSES[index % len(CLASSES)], _SHADES[index // len(CLASSES) % len(_SHADES)]
    target = 255 if shade > 0 else 0
    channels = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(channel + abs(shade) * (target - channel)):02X}" for channel in channels)


def colour_scale(name: str, count: int = 256) -> NDArray[np.uint8]:
    """Colours of a colormap from its lowest to its highest value, `(count, 3)`."""
    # Imported where used: segmenting without pictures does not need matplotlib.
    from matplotlib import colormaps

    rgb: NDArray[np.float64] = colormaps[name](np.linspace(0, 1, count))[:, :3]
    return np.rint(rgb * 255).astype(np.uint8)


def css_gradient(name: str) -> str:
    """A colormap as a CSS background, lowest value on the left."""
    stops = ("#" + bytes(colour).hex() for colour in colour_scale(name, 9))
    return f"linear-gradient(to right, {', '.join(stops)})"
