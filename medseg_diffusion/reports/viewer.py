"""The scans of a report page, to scroll through: NiiVue and the voxels of chosen cases, in the page itself.

Where the browser lacks WebGL 2 or runs no scripts, and on paper, still pictures of the same cases take its place.
"""

from __future__ import annotations

import gzip
import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, Literal

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from medseg_diffusion.volumes.paths import is_image
from medseg_diffusion.volumes.volume import Volume

from .preview import Map, Outlines, Still, still
from .slices import MAP_OPACITY, display_range, map_limit, to_jpeg
from .theme import ANOMALY, PREDICTION, REFERENCE, UNCERTAINTY, class_colours, colour_scale, css_gradient

LayerKind = Literal["scan", "prediction", "reference", "uncertainty", "anomaly", "counterpart"]

# NiiVue draws layers in this order, the last one on top.
_ORDER: Sequence[LayerKind] = ("scan", "counterpart", "uncertainty", "anomaly", "reference", "prediction")
_TITLES: Mapping[LayerKind, str] = {
    "scan": "Scan",
    "prediction": "Prediction",
    "reference": "Reference",
    "uncertainty": "Uncertainty",
    "anomaly": "Anomaly score",
    "counterpart": "Healthy counterpart",
}
_LABELS = ("prediction", "reference")
_MAPS = {"uncertainty": UNCERTAINTY, "anomaly": ANOMALY}
_LARGEST_AXIS = 192  # voxels; more are slow without a graphics card, and few screens show them
_SMALLEST_AXIS = 16


@dataclass(frozen=True)
class Layer:
    """One image of a case.

    Attributes:
        kind: What it is.
        data: `(I, J, K)`: grey values of a scan or its counterpart, whole numbers of a label map with 0 as background,
            or a non-negative map.
        title: Its name in the page; empty takes the usual one of its kind.
        labels: Label value -> class name, of a label map.
    """

    kind: LayerKind
    data: NDArray[Any]
    title: str = ""
    labels: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ViewedCase:
    """A case that is shown.

    Attributes:
        name: Its name.
        reason: Why it is shown, such as "worst case".
        affine: (4, 4), voxel indices -> RAS millimetres, of all layers.
        layers: The images, all of one shape; at most one of each kind.
        oriented: Whether it is known which side is the patient's right. If it is not, as in a PNG, the layers are drawn
            as they are: I to the right, J upwards.
    """

    name: str
    reason: str
    affine: NDArray[np.float64]
    layers: Sequence[Layer]
    oriented: bool = True


@dataclass(frozen=True)
class Viewer:
    """The parts of a page.

    Attributes:
        html: The viewer with its data and the still pictures. A page has one.
        script: NiiVue and what connects it with `html`, for the end of the page.
        names: Names of the cases.
    """

    html: Markup
    script: Markup
    names: Sequence[str]


def viewed_case(
    name: str,
    reason: str,
    volumes: Mapping[LayerKind, Volume],
    labels: Mapping[int, str] | None = None,
    titles: Mapping[LayerKind, str] | None = None,
) -> ViewedCase:
    """A case from volumes on one grid.

    Args:
        name: Name of the case.
        reason: Why it is shown.
        volumes: Kind -> image. One from a colour image file is shown in grey, and of several channels the first.
        labels: Class names of the label maps.
        titles: Names of layers, where they differ from the usual ones.

    Raises:
        InputError: The volumes are on different grids.
    """
    first, *others = volumes.values()
    for other in others:
        first.require_same_grid(other)
    # An image file is read with the axes of ITK: drawn as in the file, its I goes to the right if the axes are LAS.
    oriented = not any(volume.source is not None and is_image(volume.source) for volume in volumes.values())
    layers = []
    for kind, volume in volumes.items():
        data = (volume if oriented else volume.oriented("LAS")).data
        grey = data[0] if oriented or len(data) == 1 else data.float().mean(0)
        names = labels if labels is not None and kind in _LABELS else {}
        layers.append(Layer(kind, grey.numpy(), (titles or {}).get(kind, ""), names))
    affine = first.affine if oriented else np.diag([*first.oriented("LAS").spacing, 1.0])
    return ViewedCase(name, reason, affine, layers, oriented)


def viewer(cases: Sequence[ViewedCase], *, max_bytes: int = 13_500_000) -> Viewer:
    """The viewer of some cases; the first is shown first.

    Cases share the bytes equally. What is larger is averaged over blocks of voxels, and the page says so.

    Args:
        cases: At least one.
        max_bytes: Size of both parts together. It is exceeded only by very many cases, as none is made smaller than
            16 voxels along an axis.

    Raises:
        ValueError: No case, or a case with layers of different shapes or two of one kind.
    """
    if not cases:
        raise ValueError("a viewer needs at least one case")
    for case in cases:
        _check(case)
    upright = [_upright(case) for case in cases]
    classes = _classes(upright)
    stills = [_still(case, classes, several=len(cases) <= 8) for case in upright]
    script = _script()
    # Small cases first: what they leave of their share is the larger ones'.
    left, entries = max_bytes - len(script) - 20_000, {}
    for done, i in enumerate(sorted(range(len(cases)), key=lambda i: upright[i].layers[0].data.size)):
        own = len(stills[i]["still"]) + 1500
        entries[i] = _encoded(upright[i], classes, left // (len(cases) - done) - own)
        left -= own + sum(len(layer["data"]) for layer in entries[i]["layers"])
    data = {
        "cases": [entries[i] for i in range(len(cases))],
        "classes": [{"name": name, "colour": colour} for name, colour in classes.values()],
        "reference": REFERENCE,
        "prediction": PREDICTION,
        "opacity": MAP_OPACITY,
        "maps": {kind: _colour_map(colours) for kind, colours in _MAPS.items()},
    }
    html = _template("viewer.html.j2").render(
        cases=[{"name": case.name, "reason": case.reason, **s} for case, s in zip(cases, stills, strict=True)],
        oriented=any(case.oriented for case in cases),
        # In a script element, only "<" could end the element; in JSON, \u003c is the same letter.
        data=Markup(json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")),
    )
    return Viewer(Markup(html), script, [case.name for case in cases])


def _check(case: ViewedCase) -> None:
    shapes, kinds = {layer.data.shape for layer in case.layers}, [layer.kind for layer in case.layers]
    if len(shapes) != 1 or len(next(iter(shapes))) != 3:
        raise ValueError(f"the layers of {case.name} have the shapes {sorted(shapes)}; they must share one (I, J, K)")
    if len(set(kinds)) < len(kinds):
        raise ValueError(f"{case.name} has several layers of one kind: {kinds}")


def _upright(case: ViewedCase) -> ViewedCase:
    """The case with axes as near to RAS as turning them gets, and with its layers in the order of drawing."""
    import nibabel as nib

    # An image of unknown sides is drawn as it is.
    affine = case.affine if case.oriented else np.diag([*_spacing(case.affine), 1.0])
    orientation = nib.orientations.io_orientation(affine)
    shape = case.layers[0].data.shape
    layers = [
        Layer(
            layer.kind,
            nib.orientations.apply_orientation(layer.data, orientation),
            layer.title or _TITLES[layer.kind],
            layer.labels,
        )
        for layer in sorted(case.layers, key=lambda layer: _ORDER.index(layer.kind))
    ]
    turned = affine @ nib.orientations.inv_ornt_aff(orientation, shape)
    return ViewedCase(case.name, case.reason, turned, layers, case.oriented)


def _classes(cases: Sequence[ViewedCase]) -> dict[int, tuple[str, str]]:
    """Label value -> name and colour, of all cases: a class has one colour in the page."""
    maps = [layer for case in cases for layer in case.layers if layer.kind in _LABELS]
    names: dict[int, str] = {}
    for layer in maps:
        names = {**layer.labels, **names}
    values = sorted({*names, *(int(value) for layer in maps for value in np.unique(layer.data) if value != 0)})
    titles = {value: names.get(value, f"label {value}") for value in values}
    return {value: (titles[value], colour) for value, colour in class_colours(titles).items()}


def _values(labels: NDArray[Any]) -> list[int]:
    """The labels of a map in ascending order, without 0. Counting takes a tenth of the time of sorting."""
    return [int(value) for value in np.flatnonzero(np.bincount(labels.ravel())) if value]


def _layer(case: ViewedCase, kind: LayerKind) -> Layer | None:
    return next((layer for layer in case.layers if layer.kind == kind), None)


# ---- still pictures --------------------------------------------------------------------------------------------------


def _still(case: ViewedCase, classes: Mapping[int, tuple[str, str]], several: bool) -> dict[str, Any]:
    """The picture of a case as base64, its size in pixels of the page, and what it shows, in words.

    It has several slices of each plane if there is room for them.
    """
    # Pictures are drawn from LAS arrays; those of unknown sides as they are.
    turn = (lambda data: data[::-1]) if case.oriented else (lambda data: data)
    prediction, reference = _layer(case, "prediction"), _layer(case, "reference")
    outlines = []
    for layer, colour in ((reference, REFERENCE), (prediction, PREDICTION)):
        if layer is not None and reference is not None and prediction is not None:
            outlines.append(Outlines(turn(layer.data), colour, [(layer.title, colour)], layer is prediction))
        elif layer is not None:
            present = _values(layer.data)[:12]
            colours = {value: colour for value, (_, colour) in classes.items()}
            outlines.append(Outlines(turn(layer.data), colours, [classes[value] for value in present]))
    drawn = _layer(case, "anomaly") or _layer(case, "uncertainty")
    scan, counterpart = _layer(case, "scan"), _layer(case, "counterpart")
    content = Still(
        turn(scan.data if scan is not None else _blank(case)),
        _spacing(case.affine),
        outlines,
        Map(turn(drawn.data), drawn.title, _MAPS[drawn.kind]) if drawn is not None else None,
        turn(counterpart.data) if counterpart is not None else None,
        case.oriented,
    )
    panels = 1 + bool(outlines) + (drawn is not None) + (counterpart is not None)
    figure = still(content, slices_per_plane=2 if several and panels <= 3 else 1, cell_in=1.8)
    width, height = figure.get_size_inches()
    return {
        "still": b64encode(to_jpeg(figure)).decode("ascii"),
        "width": round(width * 110),
        "height": round(height * 110),
        "shown": ", ".join(layer.title.lower() for layer in case.layers if layer.kind != "scan") or "nothing else",
    }


def _blank(case: ViewedCase) -> NDArray[np.uint8]:
    """A black image, in place of a scan that is not there."""
    return np.zeros(case.layers[0].data.shape, np.uint8)


# ---- voxels ----------------------------------------------------------------------------------------------------------


def _encoded(case: ViewedCase, classes: Mapping[int, tuple[str, str]], max_bytes: int) -> dict[str, Any]:
    """A case for the script, in at most so many bytes if 16 voxels along each axis allow it."""
    scan = _layer(case, "scan")
    drawn = [*case.layers] if scan is not None else [Layer("scan", _blank(case), _TITLES["scan"]), *case.layers]
    window = display_range(drawn[0].data)
    shape, spacing = drawn[0].data.shape, np.array(_spacing(case.affine))
    factors = np.ones(3, int)
    while (axes := np.flatnonzero(-(-np.array(shape) // factors) > _LARGEST_AXIS)).size:
        _coarsen(factors, axes, spacing)
    # Base64 of a scan takes at least a quarter of a byte a voxel: what cannot fit is not even tried.
    voxels = max_bytes / (0.25 * sum(layer.kind not in _LABELS for layer in drawn))
    _coarsen_to(np.prod(shape) / max(voxels, 1.0), factors, shape, spacing)
    while True:
        layers = [_encoded_layer(layer, factors, spacing, window, classes) for layer in drawn]
        size = sum(len(layer["data"]) for layer in layers)
        if size <= max_bytes or not _reducible(shape, factors).size:
            break
        _coarsen(factors, _reducible(shape, factors), spacing)
        _coarsen_to(0.8 * np.prod(factors) * size / max(max_bytes, 1), factors, shape, spacing)
    layers[0]["empty"] = scan is None
    steps = factors.tolist()
    reduced = [-(-length // step) for length, step in zip(shape, steps, strict=True)]
    start = [index // step for index, step in zip(_start(case), steps, strict=True)]
    note = _note(spacing, factors, shape) if case.oriented else _image_note(factors)
    return {
        "name": case.name, "oriented": case.oriented, "shape": reduced, "start": start, "note": note, "layers": layers,
        "affine": np.round(case.affine @ _block_affine(factors), 6)[:3].tolist(),
    }  # fmt: skip


def _coarsen(factors: NDArray[Any], axes: NDArray[Any], spacing: NDArray[np.float64]) -> None:
    """Take larger blocks along that of the axes whose blocks are smallest in millimetres."""
    factors[axes[(spacing * factors)[axes].argmin()]] += 1


def _coarsen_to(volume: float, factors: NDArray[Any], shape: Sequence[int], spacing: NDArray[np.float64]) -> None:
    """Take larger blocks until they have so many voxels."""
    while np.prod(factors) < volume and (axes := _reducible(shape, factors)).size:
        _coarsen(factors, axes, spacing)


def _reducible(shape: Sequence[int], factors: NDArray[Any]) -> NDArray[Any]:
    return np.flatnonzero(-(-np.array(shape) // (factors + 1)) >= _SMALLEST_AXIS)


def _encoded_layer(
    layer: Layer,
    factors: NDArray[Any],
    spacing: NDArray[np.float64],
    window: tuple[float, float],
    classes: Mapping[int, tuple[str, str]],
) -> dict[str, Any]:
    entry: dict[str, Any] = {"kind": layer.kind, "title": layer.title}
    if layer.kind in _LABELS:
        # Consecutive numbers in the order of the classes, so that any label value fits.
        dtype = np.uint8 if len(classes) < 256 else np.uint16
        numbers = np.zeros(max(classes, default=0) + 1, dtype)
        numbers[sorted(classes)] = np.arange(1, len(classes) + 1)
        stored = reduced_labels(numbers[layer.data], factors).astype(dtype)
        entry["labels"] = _values(stored)
    elif layer.kind in _MAPS:
        high = map_limit(layer.data)
        # 64 levels are more than the eye tells apart in a colormap, and take half the space of 256.
        stored = _bytes(reduced_image(np.nan_to_num(layer.data), factors), 0.0, high, levels=64)
        entry |= {"high": high, "clipped": bool((layer.data > high).any()), "gradient": css_gradient(_MAPS[layer.kind])}
    else:
        stored = _bytes(reduced_image(layer.data, factors), *window)
    # Along the axes, as the voxels are drawn: of a scan far from the patient's axes, NiiVue would choose others.
    affine = np.diag([*spacing * factors, 1.0])
    return entry | {"data": _nifti(stored, affine, is_labels=layer.kind in _LABELS)}


def reduced_image(image: NDArray[Any], factors: Sequence[int] | NDArray[Any]) -> NDArray[np.float32]:
    """Means over blocks of `factors` voxels; blocks at the end of an axis repeat its last voxel."""
    blocks = _blocks(image, factors, "edge")
    means: NDArray[np.float32] = blocks.mean(axis=(1, 3, 5), dtype=np.float32)
    return means


def reduced_labels(labels: NDArray[Any], factors: Sequence[int] | NDArray[Any]) -> NDArray[np.int64]:
    """A label map over blocks of `factors` voxels in which every class keeps about its volume.

    A class gets the blocks with its largest shares, as many as have its volume: of a large structure those that it
    fills by half or more, of a thin one those that it fills most. Where two classes want a block, the larger share
    wins; but at least one block of every class is left, unless all its blocks are the last ones of others.
    """
    from scipy.ndimage import find_objects

    steps = [int(factor) for factor in factors]
    result = np.zeros([-(-n // step) for n, step in zip(labels.shape, steps, strict=True)], np.int64)
    if max(steps) == 1:
        return labels.astype(np.int64)
    won = np.zeros(result.shape, np.float32)
    boxes = {label: box for label, box in enumerate(find_objects(labels.astype(np.int32)), 1) if box is not None}

    def shares_of(label: int) -> tuple[tuple[slice, ...], NDArray[np.float32]]:
        inner = tuple(slice(b.start // step, -(-b.stop // step)) for b, step in zip(boxes[label], steps, strict=True))
        outer = tuple(slice(i.start * step, i.stop * step) for i, step in zip(inner, steps, strict=True))
        return inner, _blocks(labels[outer] == label, steps, "constant").mean(axis=(1, 3, 5), dtype=np.float32)

    for label in boxes:
        inner, shares = shares_of(label)
        count = max(1, round(float(shares.sum())))
        least = np.partition(shares, -count, axis=None)[-count]
        takes = (shares >= max(least, 1e-6)) & (shares > won[inner])
        result[inner][takes] = label
        won[inner][takes] = shares[takes]
    # A small structure within a large one, such as a core in its oedema, has won no block.
    sizes = np.bincount(result.ravel(), minlength=max(boxes, default=0) + 1)
    for label in boxes:
        if not sizes[label]:
            inner, shares = shares_of(label)
            blocks = result[inner].flat
            places = [int(place) for place in np.argsort(-shares, axis=None) if shares.flat[place] > 0]
            free = next((place for place in places if not blocks[place] or sizes[blocks[place]] > 1), None)
            if free is not None:
                sizes[blocks[free]] -= 1
                sizes[label] = 1
                blocks[free] = label
    return result


def _blocks(array: NDArray[Any], factors: Sequence[int] | NDArray[Any], padding: Any) -> NDArray[Any]:
    """(I, J, K) -> (blocks, voxels, blocks, voxels, blocks, voxels)."""
    widths = [(0, -n % int(factor)) for n, factor in zip(array.shape, factors, strict=True)]
    padded = np.pad(array, widths, mode=padding) if any(after for _, after in widths) else array
    sizes = [size for n, f in zip(padded.shape, factors, strict=True) for size in (n // int(f), int(f))]
    return padded.reshape(sizes)


def _bytes(values: NDArray[np.float32], low: float, high: float, levels: int = 256) -> NDArray[np.uint8]:
    """Numbers from 0 for `low` or less (and for NaN) to 255 for `high` or more, of so many different ones."""
    steps = np.rint(np.nan_to_num(np.clip((values - low) / (high - low), 0.0, 1.0)) * (levels - 1))
    return np.rint(steps * (255 / (levels - 1))).astype(np.uint8)


def _nifti(data: NDArray[Any], affine: NDArray[np.float64], *, is_labels: bool) -> str:
    """A gzip-compressed NIfTI file in base64."""
    import nibabel as nib

    image = nib.Nifti1Image(data, affine)
    if is_labels:
        image.header.set_intent(1002)  # label
    return b64encode(gzip.compress(image.to_bytes(), 6, mtime=0)).decode("ascii")


def _block_affine(factors: NDArray[Any]) -> NDArray[np.float64]:
    """Indices of blocks -> voxel indices of their centres."""
    step = np.diag([*factors.astype(float), 1.0])
    step[:3, 3] = (factors - 1) / 2
    return step


def _spacing(affine: NDArray[np.float64]) -> list[float]:
    return [float(length) for length in np.linalg.norm(affine[:3, :3], axis=0)]


def _note(spacing: NDArray[np.float64], factors: NDArray[Any], shape: Sequence[int]) -> str:
    """The resolution of a case, in words."""

    def millimetres(sizes: NDArray[np.float64]) -> str:
        return " x ".join(f"{size:.3g}" for size in sizes) + " mm"

    if (factors == 1).all():
        return f"Shown in full resolution: voxels of {millimetres(spacing)}."
    return (
        f"Shown at a lower resolution, so that the page stays small: voxels of {millimetres(spacing * factors)}; the"
        f" files have {millimetres(spacing)} ({' x '.join(map(str, shape))})."
        " Grey values are averaged; every class keeps about its volume."
    )


def _image_note(factors: NDArray[Any]) -> str:
    """The same of an image file, whose pixels have no known size."""
    if (factors == 1).all():
        return "Shown in full resolution."
    blocks = " x ".join(str(factor) for factor in factors[:2])
    return f"Shown at a lower resolution, so that the page stays small: means of {blocks} pixels."


def _start(case: ViewedCase) -> list[int]:
    """The voxel that is shown first: in the fullest axial slice, the labelled one nearest to the labels' centre."""
    amount: NDArray[np.bool_] = np.zeros(case.layers[0].data.shape, bool)
    for layer in case.layers:
        if layer.kind in _LABELS:
            amount |= layer.data > 0
    heat = _layer(case, "anomaly") or _layer(case, "uncertainty")
    if not amount.any() and heat is not None:
        amount = np.nan_to_num(heat.data) > 0.5 * map_limit(heat.data)
    if not amount.any():
        return [length // 2 for length in amount.shape]
    height = int(amount.sum(axis=(0, 1)).argmax())
    places = np.argwhere(amount[..., height])
    nearest = places[((places - places.mean(axis=0)) ** 2).sum(axis=1).argmin()]
    return [int(nearest[0]), int(nearest[1]), height]


# ---- the page --------------------------------------------------------------------------------------------------------


def _colour_map(colours: str) -> dict[str, list[int]]:
    """A colormap for NiiVue, transparent at its lowest value."""
    scale = colour_scale(colours)
    channels = {name: scale[:, i].tolist() for i, name in enumerate("RGB")}
    return {**channels, "A": [0] + [255] * (len(scale) - 1), "I": list(range(len(scale)))}


def _script() -> Markup:
    """NiiVue with its licences, which the pages carry along, and the script of the viewer."""
    folder = files("medseg_diffusion.reports") / "vendor" / "niivue"
    licences = "".join((folder / name).read_text("utf-8") for name in ("LICENSE", "LICENSES-bundled.txt"))
    library = (folder / "niivue.min.js").read_text("utf-8")
    glue = _template("viewer.js.j2").render()
    return Markup(
        f"<script>\n/*\nNiiVue 0.69.0, https://github.com/niivue/niivue\n\n{licences}*/\n{library}\n</script>\n"
        f"<script>\n{glue}\n</script>\n"
    )


def _template(name: str) -> Any:
    # Imported where used: segmenting without a report does not need it.
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("medseg_diffusion.reports")
    environment = Environment(
        loader=loader, undefined=StrictUndefined, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(name)
