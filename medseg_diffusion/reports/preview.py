"""Still pictures of a scan with its masks and maps: the plain slice beside the same slice with what was drawn on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .slices import (
    INK,
    Slice,
    densest_slices,
    display_range,
    draw_contours,
    draw_map,
    draw_marks,
    drawable_axes,
    map_limit,
    panel_grid,
    plain,
    shortened,
    show,
    to_png,
)
from .theme import UNCERTAINTY, class_colours

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DASHES = (0, (3, 1.6))
_LEGEND_COLUMNS = 4
# A legend of more classes would outgrow the picture. Labels that are not in the legend are still drawn.
_LEGEND_CLASSES = 24


@dataclass(frozen=True)
class Outlines:
    """A label map that is outlined on the scan.

    Attributes:
        labels: Integer labels, `(I, J, K)`; 0 is background.
        colours: One colour for all labels, or the colour of each.
        legend: Text and colour of each entry of the legend.
        dashed: Whether the lines are dashed.
    """

    labels: NDArray[Any]
    colours: str | Mapping[int, str]
    legend: Sequence[tuple[str, str]] = ()
    dashed: bool = False


@dataclass(frozen=True)
class Map:
    """A non-negative map that is drawn over the scan: values `(I, J, K)`, its title and its colormap."""

    values: NDArray[Any]
    title: str
    colours: str = UNCERTAINTY


@dataclass(frozen=True)
class Still:
    """What a still picture shows; all arrays share one shape and are oriented as in `medseg_diffusion.reports.slices`.

    Attributes:
        image: Grey values of the scan, `(I, J, K)`.
        spacing_mm: Voxel size along I, J, K.
        outlines: Label maps on the scan.
        map: A map over the scan.
        counterpart: Another image in the grey values of the scan, such as its healthy counterpart.
        oriented: Whether it is known which side is the patient's right; without it, there are no marks.
        made_by: The model that made the results, for the legend.
    """

    image: NDArray[Any]
    spacing_mm: Sequence[float]
    outlines: Sequence[Outlines] = ()
    map: Map | None = None
    counterpart: NDArray[Any] | None = None
    oriented: bool = True
    made_by: str = ""

    def focus(self) -> NDArray[Any]:
        """What the slices should show: the labelled voxels, or the upper half of the map if there are none."""
        labelled = np.zeros(self.image.shape, bool)
        for outlines in self.outlines:
            labelled |= outlines.labels > 0
        if not labelled.any() and self.map is not None:
            labelled = np.nan_to_num(self.map.values) > 0.5 * map_limit(self.map.values)
        return labelled


# many: the arrays, and how each is named and coloured
def preview_png(
    image: NDArray[Any],
    labels: NDArray[Any],
    spacing_mm: Sequence[float],
    names: Mapping[int, str],
    uncertainty: NDArray[Any] | None = None,
    map_name: str = "Uncertainty",
    *,
    map_colours: str = UNCERTAINTY,
    oriented: bool = True,
    made_by: str = "",
) -> bytes:
    """Draw a scan with the outlines of its segmentation, and with its uncertainty: one row per plane.

    Arrays are oriented as in `medseg_diffusion.reports.slices`. The slices are those with the most labelled voxels. A
    2D image (one axis of length 1) gives a single slice.

    Args:
        image: Grey values, `(I, J, K)`, any range.
        labels: Integer labels, same shape; 0 is background.
        spacing_mm: Voxel size along I, J, K.
        names: Label value -> class name, for the legend; a label without a name is shown by its value.
        uncertainty: Non-negative map of the same shape.
        map_name: Title of that map.
        map_colours: Colormap of that map.
        oriented: False for an image whose sides are unknown: it gets no marks.
        made_by: Name of the model, for the legend; empty for none.

    Returns:
        A PNG on black in which a millimetre has the same length along every axis and in every panel.

    Raises:
        ValueError: The arrays differ in shape or are not three-dimensional.
    """
    drawn = Map(uncertainty, map_name, map_colours) if uncertainty is not None else None
    outlines = [class_outlines(labels, names)]
    return to_png(still(Still(image, spacing_mm, outlines, drawn, oriented=oriented, made_by=made_by)))


def class_outlines(labels: NDArray[Any], names: Mapping[int, str]) -> Outlines:
    """A label map in the colours of its classes (`theme.class_colours`)."""
    values = sorted({*names, *(int(label) for label in np.unique(labels) if label != 0)})
    titles = {label: names.get(label, f"label {label}") for label in values}
    colours = class_colours(titles)
    listed = [label for label in values if label in names or len(values) <= _LEGEND_CLASSES][:_LEGEND_CLASSES]
    return Outlines(labels, colours, [(titles[label], colours[label]) for label in listed])


def still(content: Still, *, slices_per_plane: int | None = None, cell_in: float = 2.0) -> Figure:
    """Draw slices of all planes: each plain, beside that with the outlines, with the map, and in the counterpart.

    Args:
        content: The arrays.
        slices_per_plane: Number of slices in each row; None takes as many as fit in about six panels.
        cell_in: Length of the longest side of all slices in inches.

    Raises:
        ValueError: The arrays differ in shape or are not three-dimensional.
    """
    arrays = [content.image, *(outlines.labels for outlines in content.outlines), content.counterpart]
    arrays += [content.map.values] if content.map is not None else []
    shapes = [array.shape for array in arrays if array is not None]
    if content.image.ndim != 3 or len(set(shapes)) > 1:
        raise ValueError(f"shapes are {shapes}; image, labels and maps must share one shape (I, J, K)")
    panels_of = [name for name, given in _panels(content) if given]
    count = slices_per_plane or max(1, 6 // len(panels_of))
    focus, axes = content.focus(), drawable_axes(content.image.shape)
    rows = [densest_slices(focus, axis, content.spacing_mm, count) for axis in axes]
    legend = [entry for outlines in content.outlines for entry in outlines.legend]
    entries = len(legend) + bool(content.made_by)
    figure, panels = panel_grid(
        [[where for where in row for _ in panels_of] for row in rows],
        header_in=0.22 * -(-entries // _LEGEND_COLUMNS) + 0.1 if entries else 0.0,
        footer_in=0.45 if content.map is not None else 0.0,
        cell_in=cell_in * (1.0 if len(axes) > 1 else 1.6),
    )
    limits = display_range(content.image)
    high = map_limit(content.map.values) if content.map is not None else 1.0
    for row, drawn in zip(rows, panels, strict=True):
        for number, ax in enumerate(drawn):
            where, name = row[number // len(panels_of)], panels_of[number % len(panels_of)]
            _draw_panel(ax, where, name, content, limits, high)
    if entries:
        _draw_legend(figure, content.outlines, content.made_by)
    if content.map is not None:
        _draw_scale(figure, content.map, high)
    return figure


def _panels(content: Still) -> list[tuple[str, bool]]:
    return [
        ("plain", True),
        ("outlines", bool(content.outlines)),
        ("map", content.map is not None),
        ("counterpart", content.counterpart is not None),
    ]


def _draw_panel(axes: Any, where: Slice, name: str, content: Still, limits: tuple[float, float], high: float) -> None:
    image = content.counterpart if name == "counterpart" and content.counterpart is not None else content.image
    show(axes, where, image, cmap="gray", vmin=limits[0], vmax=limits[1])
    title = where.title if content.oriented else "image"
    if name == "outlines":
        title = "outlined"
        for outlines in content.outlines:
            draw_contours(axes, where, outlines.labels, outlines.colours, DASHES if outlines.dashed else "-", 1.1)
    elif name == "map" and content.map is not None:
        title = content.map.title
        draw_map(axes, where, content.map.values, content.map.colours, high)
    elif name == "counterpart":
        title = "healthy counterpart"
    axes.set_title(title, color=INK, fontsize=8, pad=3)
    if content.oriented:
        draw_marks(axes, where)


def _draw_legend(figure: Any, drawn: Sequence[Outlines], made_by: str) -> None:
    # Imported where used: segmenting without pictures does not need matplotlib.
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [], [], color=colour, linewidth=2, linestyle=DASHES if o.dashed else "-", label=plain(shortened(text, 24))
        )
        for o in drawn
        for text, colour in o.legend
    ]
    if made_by:
        handles.append(Line2D([], [], linestyle="none", label=plain(shortened(made_by, 24))))
    figure.legend(
        handles=handles,
        loc="upper center",
        ncols=min(len(handles), _LEGEND_COLUMNS),
        frameon=False,
        labelcolor="white",
        fontsize=8,
        borderaxespad=0.3,
    )


def _draw_scale(figure: Any, drawn: Map, high: float) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    height = figure.get_size_inches()[1]
    scale = ScalarMappable(Normalize(0.0, high), drawn.colours)
    bar = figure.colorbar(scale, cax=figure.add_axes((0.3, 0.2 / height, 0.4, 0.07 / height)), orientation="horizontal")
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=INK, labelsize=7, length=0, pad=2)
    title = f"{drawn.title} (brightest: {high:.3g} or more)" if (drawn.values > high).any() else drawn.title
    bar.ax.set_title(title, color=INK, fontsize=8, pad=2)
