"""Slices of volumes as pictures, in the radiological convention.

Volumes are `(I, J, K)` arrays in LAS+ orientation: I grows to the patient's left, J to anterior, K to superior. So the
patient's right is drawn on the left. Axial slices have anterior on top, coronal ones superior; sagittal slices have
anterior on the left and superior on top. The marks R and L or A and P say so in each picture. The figures use
matplotlib's object interface, without pyplot, so that calls and threads share no state.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .theme import colour_scale
from .theme import label_colour as label_colour

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Axis held fixed -> name of the plane.
PLANES = {2: "Axial", 1: "Coronal", 0: "Sagittal"}
# What lies on the left and on the right side of a plane.
MARKS = {2: ("R", "L"), 1: ("R", "L"), 0: ("A", "P")}
_FIRST = "RPI"  # where the axes begin
INK = "#c9d1d9"  # titles on black
MAP_OPACITY = 0.8  # of a map's highest value
_DPI = 150


@dataclass(frozen=True)
class Slice:
    """One plane of a volume: the axis held fixed, the index along it, and the plane's width and height in mm."""

    axis: int
    index: int
    width_mm: float
    height_mm: float

    def take(self, volume: NDArray[Any]) -> NDArray[Any]:
        """The plane as a picture, `(rows, columns)`, whose first row is the bottom (imshow's origin="lower")."""
        # Indexing makes a view; `take` would copy the whole of a flipped volume.
        picture: NDArray[Any] = volume[(slice(None),) * self.axis + (self.index,)].T
        return picture[:, ::-1] if self.axis == 0 else picture

    @property
    def title(self) -> str:
        """Name of the plane, and its number as counted from a side of the patient, whatever the order of the file."""
        return f"{PLANES[self.axis]} {self.index + 1} from {_FIRST[self.axis]}"


def plane(axis: int, index: int, shape: Sequence[int], spacing_mm: Sequence[float]) -> Slice:
    """The slice `index` along `axis` of a volume with this shape and voxel size."""
    across, up = (a for a in range(3) if a != axis)
    return Slice(axis, index, shape[across] * spacing_mm[across], shape[up] * spacing_mm[up])


def drawable_axes(shape: Sequence[int]) -> list[int]:
    """Axes whose planes are more than one voxel wide, axial first: all three in 3D, one for a 2D image."""
    axes = [axis for axis in PLANES if all(shape[a] > 1 for a in range(3) if a != axis)]
    return axes or [2]


def plain(text: str) -> str:
    """A user's text with escaped dollar signs, which matplotlib would otherwise read as a formula."""
    return text.replace("$", r"\$")


def shortened(text: str, length: int = 32) -> str:
    """A name that fits beside a picture: an ellipsis replaces the middle of a long one."""
    return text if len(text) <= length else f"{text[: length // 2]}\u2026{text[-(length // 2 - 1) :]}"


def display_range(image: NDArray[Any]) -> tuple[float, float]:
    """Grey values to show as black and white: 1st and 99.5th percentile of the finite values above the background.

    The background is the minimum of the image. If it counted, scans with much air would be shown too bright.
    """
    values = _sample(image)
    if values.size == 0:
        return 0.0, 1.0
    inside = values[values > values.min()]
    if inside.size == 0:
        return float(values.min()), float(values.min()) + 1.0
    high = float(np.percentile(inside, 99.5))
    low = min(float(np.percentile(inside, 1)), float(values.min()) if values.min() >= 0 else high)
    return low, high if high > low else low + 1.0


def map_limit(values: NDArray[Any]) -> float:
    """The value of a map that gets the brightest colour: its 99.9th percentile, or its maximum if that is 0."""
    finite = _sample(values)
    if finite.size == 0:
        return 1.0
    high = float(np.percentile(finite, 99.9))
    return high if high > 0 else max(float(np.nanmax(values)), 0.0) or 1.0


def _sample(image: NDArray[Any]) -> NDArray[Any]:
    """The finite values of an image; of a large one, of evenly spread voxels, as sorting them all takes seconds."""
    step = max(1, round((image.size / 1e6) ** (1 / image.ndim)))
    values = image[(slice(None, None, step),) * image.ndim]
    return values[np.isfinite(values)]


def densest_slices(amount: NDArray[Any], axis: int, spacing_mm: Sequence[float], count: int) -> list[Slice]:
    """Up to `count` slices along an axis, from bottom to top: the fullest one of each equal part of the extent.

    Args:
        amount: What is to be seen, `(I, J, K)`, at least 0 everywhere. All 0 gives slices spread over the whole axis.
        axis: The axis.
        spacing_mm: Voxel size along I, J, K.
        count: Number of slices, at least 1.
    """
    totals = amount.sum(axis=tuple(a for a in range(3) if a != axis), dtype=np.float64)
    occupied = np.flatnonzero(totals)
    if occupied.size == 0:
        indices = np.unique(((np.arange(count) + 0.5) / count * len(totals)).astype(int))
    else:
        parts = np.array_split(np.arange(occupied[0], occupied[-1] + 1), count)
        indices = np.array([part[totals[part].argmax()] for part in parts if len(part) and totals[part].any()])
    return [plane(axis, int(index), amount.shape, spacing_mm) for index in indices]


def panel_grid(
    rows: Sequence[Sequence[Slice]], *, header_in: float = 0.0, footer_in: float = 0.0, cell_in: float = 2.4
) -> tuple[Figure, list[list[Axes]]]:
    """An empty black figure with one axes per slice, all to the same scale and with a title above.

    Args:
        rows: The slices of each row.
        header_in: Free space above the first row in inches.
        footer_in: Free space below the last row in inches.
        cell_in: Length of the longest side of all slices in inches.

    Returns:
        The figure and its axes, in the structure of `rows`.
    """
    from matplotlib.figure import Figure

    gap, title = 0.06, 0.22
    scale = cell_in / max(side for row in rows for s in row for side in (s.width_mm, s.height_mm))
    widths = [sum(s.width_mm * scale + gap for s in row) + gap for row in rows]
    heights = [max(s.height_mm for s in row) * scale for row in rows]
    # A minimum width leaves room for the titles and the legend of a narrow slice.
    width, height = max(*widths, 2.6), header_in + footer_in + sum(h + title + gap for h in heights)
    figure = Figure(figsize=(width, height), facecolor="black")
    panels: list[list[Axes]] = []
    top = height - header_in
    for row, row_width, row_height in zip(rows, widths, heights, strict=True):
        left, bottom = (width - row_width) / 2 + gap, top - title - row_height
        panels.append([])
        for where in row:
            w, h = where.width_mm * scale, where.height_mm * scale
            box = (left / width, (bottom + (row_height - h) / 2) / height, w / width, h / height)
            axes = figure.add_axes(box)
            axes.set_title(where.title, color=INK, fontsize=8, pad=3)
            panels[-1].append(axes)
            left += w + gap
        top = bottom - gap
    return figure, panels


def show(axes: Axes, where: Slice, volume: NDArray[Any], **style: Any) -> Any:
    """Draw one plane of a volume in millimetres; `style` goes to `Axes.imshow`."""
    axes.set_axis_off()
    extent = (0.0, where.width_mm, 0.0, where.height_mm)
    return axes.imshow(
        where.take(volume), origin="lower", extent=extent, interpolation="nearest", aspect="auto", **style
    )


def draw_marks(axes: Axes, where: Slice) -> None:
    """Write which side of the patient lies left and right."""
    from matplotlib.patheffects import withStroke

    outline = [withStroke(linewidth=2, foreground="black")]
    for text, x, side in zip(MARKS[where.axis], (0.02, 0.98), ("left", "right"), strict=True):
        axes.text(
            x, 0.98, text, transform=axes.transAxes, ha=side, va="top", color="white", fontsize=8, path_effects=outline
        )  # fmt: skip


def draw_contours(
    axes: Axes, where: Slice, labels: NDArray[Any], colours: str | Mapping[int, str], style: Any, width: float = 1.3
) -> None:
    """Outline every label of one plane. A mask that touches the border is closed along the border.

    Args:
        axes: Where it is drawn.
        where: The plane.
        labels: Integer labels, `(I, J, K)`; 0 is background.
        colours: One colour for all labels, or the colour of each; a label without one is left out.
        style: Line style of matplotlib.
        width: Width of the lines in points.
    """
    picture = where.take(labels)
    rows, columns = picture.shape
    # Centres of the pixels in millimetres, with one ring of padding around the picture.
    y = (np.arange(rows + 2) - 0.5) * where.height_mm / rows
    x = (np.arange(columns + 2) - 0.5) * where.width_mm / columns
    for label in np.unique(picture[picture > 0]):
        colour = colours if isinstance(colours, str) else colours.get(int(label))
        if colour is not None:
            mask = np.pad(picture == label, 1).astype(np.float32)
            axes.contour(x, y, mask, levels=[0.5], colors=[colour], linestyles=[style], linewidths=width)
    axes.set_xlim(0, where.width_mm)
    axes.set_ylim(0, where.height_mm)


def draw_map(axes: Axes, where: Slice, values: NDArray[Any], colours: str, high: float) -> None:
    """Draw a map over what is there. Its opacity grows with the square of its value, so that the anatomy stays visible.

    Args:
        axes: Where it is drawn.
        where: The plane.
        values: `(I, J, K)`; negative values and NaN are drawn as 0.
        colours: A colormap of matplotlib.
        high: The value of the brightest colour.
    """
    picture = np.clip(np.nan_to_num(where.take(values).astype(np.float32)) / high, 0.0, 1.0)
    rgba = np.concatenate([colour_scale(colours)[np.rint(picture * 255).astype(int)] / 255, 0 * picture[..., None]], -1)
    rgba[..., 3] = MAP_OPACITY * picture**2
    extent = (0.0, where.width_mm, 0.0, where.height_mm)
    axes.imshow(rgba, origin="lower", extent=extent, interpolation="nearest", aspect="auto")


def to_png(figure: Figure) -> bytes:
    """Render a figure as PNG bytes without date and version, so that equal figures give equal files."""
    return _rendered(figure, "png", _DPI, metadata={"Software": None})


def to_jpeg(figure: Figure) -> bytes:
    """Render a figure of scans as JPEG bytes at 110 dots per inch: a third of the size of the PNG."""
    return _rendered(figure, "jpeg", 110, pil_kwargs={"quality": 76, "subsampling": 0, "optimize": True})


def _rendered(figure: Figure, kind: str, dpi: int, **options: Any) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=dpi, facecolor=figure.get_facecolor(), **options)
    return buffer.getvalue()
