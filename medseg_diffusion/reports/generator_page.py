"""The page and the Markdown summary of `medseg evaluate-generator`."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg_diffusion.metrics.generation_summary import FLOOR, GeneratorEvaluation, GeneratorRow

from .markdown import markdown_page, markdown_table
from .page import Cell, Row, Table, number, plural, render, rules_table

TILES = 16
"""Images of a row that are shown."""
TILE_PIXELS = 160
"""Largest side of an image on the page; larger ones are shrunk."""

_RULES = {
    "Features": "All scores compare features of images. Those of different extractors cannot be compared.",
    "FID, sFID": "Distances between the means and covariances of the features (sFID: of spatial ones), 0 for equal "
    "ones (Heusel et al. 2017). Both fall with the number of images: only rows of equal N compare.",
    "KID": "Kernel distance of the features (Binkowski et al. 2018); its mean does not depend on the number of images.",
    "Precision": "Share of samples that lie among the real images (Kynkäänniemi et al. 2019, third nearest neighbour).",
    "Recall": "Share of real images that lie among the samples. Copies of a few good images have a high precision and "
    "a low recall.",
    "IS": "Inception Score: is a classifier sure of each image, and does it see many classes? It knows no real image.",
    "Volumes": "FID and KID compare slices in three planes, and are means over them. Precision and recall compare "
    "volumes by their three middle slices.",
    "MS-SSIM": "Mean structural similarity of pairs of samples, 1 if all are alike (Wang et al. 2003). That of real "
    "volumes is in the row of the floor: samples of a higher value differ too little.",
    "Floor": "Real images against other real images, at most as many as there are samples: a perfect generator could "
    "not be expected to do better.",
}


@dataclass(frozen=True, eq=False)
class Pictures:
    """Images of a row.

    Attributes:
        title: Name of the row.
        images: (N, H, W, 1 or 3) uint8; the first `TILES` are shown.
        classes: Class of each image, or empty.
    """

    title: str
    images: NDArray[np.uint8]
    classes: Sequence[str] = ()


def generator_page(
    result: GeneratorEvaluation, pictures: Sequence[Pictures], *, command: str = "", date: str | None = None
) -> str:
    """The text of the page.

    Args:
        result: The scores.
        pictures: The real images, then the samples of every row.
        command: The command line; empty shows none.
        date: Date and time; None takes the present.
    """
    sides = {max(one.images.shape[1:3]) for one in pictures}
    return render(
        "generator.html.j2",
        command=command,
        date=date,
        made=_made(result),
        rules=rules_table(_rules(result)),
        lead=lead(result),
        sentences=sentences(result),
        warnings=result.warnings,
        facts=_facts(result),
        scores=scores_table(result),
        pictures=[{"title": one.title, "tiles": _tiles(one)} for one in pictures],
        volumes=any(row.scores.ms_ssim is not None for row in result.rows),
        shrunk=max(sides, default=0) > TILE_PIXELS,
        tile_pixels=TILE_PIXELS,
    )


def generator_markdown(result: GeneratorEvaluation, command: str = "") -> str:
    """A summary of the scores for a pull request, in GitHub-flavoured Markdown."""
    said, table = [lead(result), *sentences(result)], markdown_table(scores_table(result))
    return markdown_page("Evaluation of generators", said, [table], result.warnings, command)


def lead(result: GeneratorEvaluation) -> str:
    """What was compared."""
    counts = sorted({row.scores.count for row in _models(result)})
    samples = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}" if counts else "0"
    real = plural(result.reference_count, "real image")
    return f"{samples} samples a row against {real}; features of {result.extractor}."


def sentences(result: GeneratorEvaluation) -> list[str]:
    """What the scores say."""
    rows, floor = _models(result), [row for row in result.rows if row.model == FLOOR]
    if not rows:
        return []
    best = min(rows, key=lambda row: row.scores.fid)
    called = ", ".join(filter(None, [_short_names(result)[best.model], _sampler(best)]))
    said = [f"The lowest FID is {best.scores.fid:.2f}: {called}."]
    if floor:
        said.append(f"Real images against other real images have {floor[0].scores.fid:.2f}, the floor.")
    return said


def scores_table(result: GeneratorEvaluation) -> Table:
    """One row for each model and sampler, the floor first."""
    planes = list(dict.fromkeys(name for row in result.rows for name in row.scores.planes))
    columns = ["Model", "Sampler", "Recall", "Precision", "IS", "FID", "sFID", "KID"]
    columns += ["MS-SSIM", "N", *(f"FID {name}" for name in planes)]
    rows, names = [], _short_names(result)
    for row in result.rows:
        s = row.scores
        values: list[tuple[float | None, int]] = [(s.recall, 3), (s.precision, 3), (s.inception_score, 2)]
        values += [(s.fid, 2), (s.sfid, 2), (s.kid, 5), (s.ms_ssim, 3)]
        cells = [Cell(names[row.model]), Cell(_sampler(row)), *(number(value, digits) for value, digits in values)]
        cells += [Cell(f"{s.count:,}", s.count), *(number(s.planes[name].fid, 2) for name in planes)]
        rows.append(Row(cells))
    empty = [i for i in range(2, len(columns)) if all(row.cells[i].text == "\u2013" for row in rows)]
    kept = [i for i in range(len(columns)) if i not in empty]
    return Table(
        "Scores",
        [columns[i] for i in kept],
        [Row([row.cells[i] for i in kept]) for row in rows],
        sortable=True,
        text_columns=(1,),
    )


def _rules(result: GeneratorEvaluation) -> dict[str, str]:
    """How the numbers of this page are computed."""
    volumes = any(row.scores.planes for row in result.rows)
    absent = set() if volumes else {"Volumes"}
    if not any(row.scores.ms_ssim is not None for row in result.rows):
        absent.add("MS-SSIM")
    if all(row.scores.inception_score is None for row in result.rows):
        absent.add("IS")
    return {name: text for name, text in _RULES.items() if name not in absent}


def _short_names(result: GeneratorEvaluation) -> dict[str, str]:
    """Model or folder as given -> the last part of its path; names of runs differ, which is checked before sampling."""
    paths = {row.model: Path(row.model) for row in result.rows}
    return {model: (path.parent.name if path.name == "model" else path.name) or model for model, path in paths.items()}


def _models(result: GeneratorEvaluation) -> list[GeneratorRow]:
    return [row for row in result.rows if row.model != FLOOR]


def _sampler(row: GeneratorRow) -> str:
    return f"{row.sampler}, {plural(row.steps, 'step')}" if row.sampler else ""


def _facts(result: GeneratorEvaluation) -> dict[str, str]:
    rows, floor = _models(result), [row for row in result.rows if row.model == FLOOR]
    facts = {"Lowest FID": f"{min(row.scores.fid for row in rows):.2f}"} if rows else {}
    if floor:
        facts["FID of real images"] = f"{floor[0].scores.fid:.2f}"
    if rows:
        facts["Samples a row"] = f"{max(row.scores.count for row in rows):,}"
    return {**facts, "Real images": f"{result.reference_count:,}"}


def _made(result: GeneratorEvaluation) -> dict[str, str]:
    made = {
        "models": ", ".join(dict.fromkeys(row.model for row in _models(result))),
        "real images": result.reference,
        "features": result.extractor,
        "sFID": result.maps,
    }
    return made | ({"enlarged by": result.upsampler} if result.upsampler else {})


def _tiles(pictures: Pictures) -> list[dict[str, Any]]:
    """Data and class of each image that is shown."""
    from PIL import Image

    from .pictures import png

    tiles = []
    for i, pixels in enumerate(pictures.images[:TILES]):
        grey = pixels.shape[-1] == 1
        picture = Image.fromarray(np.ascontiguousarray(pixels[..., 0] if grey else pixels))
        picture.thumbnail((TILE_PIXELS, TILE_PIXELS))
        data = b64encode(png(np.asarray(picture))).decode("ascii")
        tiles.append({"data": data, "name": pictures.classes[i] if i < len(pictures.classes) else ""})
    return tiles
