"""Colours of pages, plots and pictures: one for each meaning.

Reference and prediction have a colour each, and classes have others, so that no colour is read as the wrong thing.
"""

from __future__ import annotations

from collections.abc import Mapping

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

# Structures of the brain, at most 0.1 in OKLab from FreeSurfer's colours, which readers of brain scans know.
# All differ from each other, from the two colours above and from grey: outlines lie on grey scans.
STRUCTURES = {
    "cerebral white matter": "#FFD9FF",
    "cerebral cortex": "#CC3F4F",
    "lateral ventricle": "#771388",
    "cerebellar white matter": "#DCF8A4",
    "cerebellar cortex": "#EF7D39",
    "thalamus": "#00760C",
    "caudate": "#87CBD8",
    "putamen": "#EC0DB0",
    "pallidum": "#0C30FF",
    "hippocampus": "#DDD708",
    "amygdala": "#67FFFF",
    "accumbens": "#FFBE4F",
    "ventral diencephalon": "#A52A2A",
    "brainstem": "#5299B9",
    "third ventricle": "#CDB488",
    "fourth ventricle": "#2ACCA4",
    "other csf": "#364E71",
}
_COLOURS = len(CLASSES) * len(_SHADES)

# Perceptually uniform colormaps of matplotlib.
UNCERTAINTY = "viridis"
ANOMALY = "plasma"


def label_colour(index: int) -> str:
    """Colour of the index-th class (from 0) as #RRGGBB. The first 60 differ; they are repeated after that."""
    colour, shade = CLASSES[index % len(CLASSES)], _SHADES[index // len(CLASSES) % len(_SHADES)]
    return _shaded(colour, shade)


def class_colours(names: Mapping[int, str]) -> dict[int, str]:
    """Class value -> its colour as #RRGGBB, for every picture and file of these classes.

    A class has the colour of its value, so that it looks the same when others are left out; beyond `_COLOURS` values,
    that of its place. Structures of the brain have theirs by name, the right one a shade of the left one.
    """
    by_value = all(0 < value <= _COLOURS for value in names)
    return {
        value: _structure_colour(name) or label_colour(value - 1 if by_value else place)
        for place, (value, name) in enumerate(sorted(names.items()))
    }


def _structure_colour(name: str) -> str | None:
    """Colour of a structure of the brain; None for any other class."""
    side, _, rest = name.lower().partition(" ")
    colour = STRUCTURES.get(rest if side in ("left", "right") else name.lower())
    if colour is None or side != "right":
        return colour
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    bright = 0.299 * red + 0.587 * green + 0.114 * blue > 153
    return _shaded(colour, -0.35 if bright else 0.4)


def _shaded(colour: str, shade: float) -> str:
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
