"""Preview of a segmentation as a PNG: the scan with coloured labels on several slices, and the uncertainty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .slices import Slice, display_range, drawable_axes, label_colour, panel_grid, plain, plane, shortened, show, to_png

_OPACITY = 0.5
_LEGEND_COLUMNS = 4
# A legend of more classes would outgrow the picture. Labels that are not in the legend are still drawn.
_LEGEND_CLASSES = 24


def preview_png(
    image: NDArray[Any],
    labels: NDArray[Any],
    spacing_mm: Sequence[float],
    names: Mapping[int, str],
    uncertainty: NDArray[Any] | None = None,
    map_name: str = "Uncertainty",
    *,
    slices_per_plane: int = 4,
) -> bytes:
    """Draw a scan with its segmentation: one row per plane, and one for the uncertainty.

    Arrays are in RAS+ orientation (see `medseg_diffusion.reports.slices`). The slices are spread over the extent of the
    labels. A 2D image (one axis of length 1) gives a single slice.

    Args:
        image: Grey values, `(I, J, K)`, any range.
        labels: Integer labels, same shape; 0 is background and stays transparent.
        spacing_mm: Voxel size along I, J, K.
        names: Label value -> class name, for the legend; a label without a name is shown by its value.
        uncertainty: Non-negative map of the same shape, shown below the slices of the first row.
        map_name: Title of that map.
        slices_per_plane: Number of slices in each row, at least 1.

    Returns:
        A PNG on black in which a millimetre has the same length along every axis and in every panel.

    Raises:
        ValueError: The arrays differ in shape or are not three-dimensional.
    """
    # Imported where used: segmenting without pictures does not need matplotlib.
    from matplotlib.patches import Patch

    if image.ndim != 3 or labels.shape != image.shape or (uncertainty is not None and uncertainty.shape != image.shape):
        shapes = [array.shape for array in (image, labels, uncertainty) if array is not None]
        raise ValueError(f"shapes are {shapes}; image, labels and uncertainty must share one shape (I, J, K)")
    rows = [_spread(labels, axis, spacing_mm, slices_per_plane) for axis in drawable_axes(image.shape)]
    scan_rows = len(rows)
    if uncertainty is not None:
        rows.append(rows[0])

    colours = {int(label): label_colour(i) for i, label in enumerate(sorted({*names, *_values(labels)}))}
    shown = [label for label in colours if label in names or len(colours) <= _LEGEND_CLASSES][:_LEGEND_CLASSES]
    legend_rows = -(-len(shown) // _LEGEND_COLUMNS)
    figure, panels = panel_grid(
        rows, header_in=0.22 * legend_rows + 0.1 if shown else 0.0, footer_in=0.35 if uncertainty is not None else 0.0
    )
    low, high = display_range(image)
    for slices, axes_row in zip(rows[:scan_rows], panels[:scan_rows], strict=True):
        for where, axes in zip(slices, axes_row, strict=True):
            show(axes, where, image, cmap="gray", vmin=low, vmax=high)
            _colour_labels(axes, where, labels, colours)
    if shown:
        figure.legend(
            handles=[
                Patch(color=colours[label], label=plain(shortened(names.get(label, f"label {label}"), 24)))
                for label in shown
            ],
            loc="upper center",
            ncols=min(len(shown), _LEGEND_COLUMNS),
            frameon=False,
            labelcolor="white",
            fontsize=8,
            borderaxespad=0.3,
        )
    if uncertainty is not None:
        _map_row(figure, rows[-1], panels[-1], uncertainty, map_name)
    return to_png(figure)


def _spread(labels: NDArray[Any], axis: int, spacing_mm: Sequence[float], count: int) -> list[Slice]:
    """Up to `count` slices spread evenly over the labelled extent, or over the whole axis if nothing is labelled."""
    occupied = np.flatnonzero(labels.any(axis=tuple(a for a in range(3) if a != axis)))
    first, last = (occupied[0], occupied[-1]) if occupied.size else (0, labels.shape[axis] - 1)
    # Centres of `count` equal parts. The first and the last slice are avoided, as they show next to nothing.
    positions = first + (np.arange(count) + 0.5) / count * (last - first + 1) - 0.5
    indices = np.unique(np.clip(np.rint(positions), first, last).astype(int))
    return [plane(axis, int(index), labels.shape, spacing_mm) for index in indices]


def _colour_labels(axes: Any, where: Slice, labels: NDArray[Any], colours: Mapping[int, Any]) -> None:
    from matplotlib.colors import to_rgba

    picture = labels.astype(np.int64)
    rgba = np.zeros((*where.take(picture).shape, 4))
    for label, colour in colours.items():
        rgba[where.take(picture) == label] = to_rgba(colour, _OPACITY)
    extent = (0.0, where.width_mm, 0.0, where.height_mm)
    axes.imshow(rgba, origin="lower", extent=extent, interpolation="nearest", aspect="auto")


def _map_row(figure: Any, slices: Sequence[Slice], panels: Sequence[Any], uncertainty: NDArray[Any], name: str) -> None:
    finite = uncertainty[np.isfinite(uncertainty)]
    high = float(finite.max()) if finite.size and finite.max() > 0 else 1.0
    for where, axes in zip(slices, panels, strict=True):
        drawn = show(axes, where, uncertainty, cmap="magma", vmin=0.0, vmax=high)
        axes.set_title(f"{name}, {where.title.lower()}", color="#c9d1d9", fontsize=8, pad=3)
    height = figure.get_size_inches()[1]
    bar = figure.colorbar(
        drawn, cax=figure.add_axes((0.3, 0.22 / height, 0.4, 0.07 / height)), orientation="horizontal"
    )
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors="#c9d1d9", labelsize=7, length=0, pad=2)


def _values(labels: NDArray[Any]) -> list[int]:
    return [int(label) for label in np.unique(labels) if label != 0]
