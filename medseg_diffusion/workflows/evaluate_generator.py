"""Generators to a table of scores: the whole of `medseg evaluate-generator` as a function.

OUT/scores.json, scores.csv     one row per model and sampler, and the floor: real images against other real ones
OUT/samples/<row>/<i>.npy       the samples, 64 a file; they are not made again
OUT/<row>.png                   the first 64 of them
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from medseg_diffusion import build
from medseg_diffusion.config.generator import ImageDataSection
from medseg_diffusion.config.shared import PreprocessingSection
from medseg_diffusion.data.cases import Bounds
from medseg_diffusion.data.image_cache import PackedImages, packed, to_unit
from medseg_diffusion.data.images import find_images
from medseg_diffusion.device import choose_device
from medseg_diffusion.errors import InputError, ModelError, UsageError
from medseg_diffusion.files import write_files
from medseg_diffusion.metrics.generation import NEIGHBOUR, Features, Scores, scores
from medseg_diffusion.models.image_source import ImageSource, SampleOptions
from medseg_diffusion.models.store import home
from medseg_diffusion.networks.extractors import Extractor, extractor
from medseg_diffusion.reports.pictures import grid, png

CHUNK = 64
DEFAULTS = SampleOptions(count=10_000)
FLOOR = "real images (floor)"
FAST_IS_BAD = 2.0
"""A fast sampler whose FID is so many times that of the slowest one does not sample what the model has learned."""


@dataclass(frozen=True)
class Row:
    """A row of the table; ``model`` is what was named, ``sampler`` is empty for folders of samples and the floor."""

    model: str
    sampler: str
    steps: int
    scores: Scores

    def cells(self) -> dict[str, Any]:
        """The row as the table shows it, in the order of the published ones."""
        s = self.scores
        return {
            "model": self.model,
            "sampler": f"{self.sampler}-{self.steps}" if self.sampler else "",
            "recall": round(s.recall, 4),
            "precision": round(s.precision, 4),
            "IS": None if s.inception_score is None else round(s.inception_score, 2),
            "FID": round(s.fid, 2),
            "sFID": None if s.sfid is None else round(s.sfid, 2),
            "KID": round(s.kid, 5),
            "N": s.count,
        }


@dataclass
class GeneratorEvaluation:
    """The table, what the scores are scores of, and what the reader must know."""

    extractor: str
    maps: str
    reference: str
    reference_count: int
    upsampler: str | None = None
    rows: list[Row] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def table(self) -> list[dict[str, Any]]:
        """All rows, printable."""
        return [row.cells() for row in self.rows]


def evaluate_generator(
    models: Sequence[str],
    reference: Path,
    output: Path,
    samplers: Sequence[tuple[str, int]] = (("ddim", 50), ("ddim", 200), ("ddpm", 1000)),
    options: SampleOptions = DEFAULTS,
    extractor_name: str = "auto",
    inception: Path | None = None,
    download: bool = False,
    skip_broken: bool = False,
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    on_row: Callable[[Row], None] = lambda row: None,
) -> GeneratorEvaluation:
    """Samples ``options.count`` images of every model with every sampler and scores them against real ones.

    An interrupted call can be repeated: samples that are there are not made again.

    Args:
        models: generators (folder or installed name), or folders of sampled images, which need no sampler.
        reference: real images (`medseg_diffusion.data.images`); their test side if they have one, else all.
        output: folder for the results.
        samplers: pairs of a sampler and its number of steps.
        options: of the sampling.
        extractor_name: see `medseg_diffusion.networks.extractors`.
        inception: Inception's weight file.
        download: fetch Inception's weights if they are missing; nothing is downloaded otherwise.
        skip_broken: leave broken files of the reference out instead of stopping.
        on_progress: called with (what, images done, all).
        on_row: called after every row.

    Raises:
        UsageError: an unknown sampler or extractor, or too few images for the scores.
        InputError: an unusable reference.
        ModelError: no usable model or extractor, or one that a model was trained with.
    """
    device = choose_device(options.device)
    extract = extractor(extractor_name, device, inception, download=download)
    _check(models, samplers, options, extract)
    real, size, seen = _reference(reference, models, options.upsampler, device, skip_broken, on_progress)
    # Half of the real images are scored against the other half, for comparison.
    if options.count < NEIGHBOUR + 2 or len(real) < 2 * (NEIGHBOUR + 2):
        raise UsageError(
            f"{options.count} samples against {len(real)} real images are too few: the scores need {NEIGHBOUR + 2} and "
            f"{2 * (NEIGHBOUR + 2)}"
        )
    for model in filter(_is_samples, models):
        if (count := len(_sampled(model, size))) < NEIGHBOUR + 2:
            raise UsageError(f"{model}: {count} images are too few: the scores need {NEIGHBOUR + 2}")
    known = _features(real, extract, partial(on_progress, "real images"))
    result = GeneratorEvaluation(extract.name, extract.maps, str(reference), len(real), options.upsampler)
    fewest, features = min(options.count, len(real)), known.pooled.shape[1]
    if fewest <= features:
        result.warnings.append(
            f"FID is biased upwards ({fewest} images for {features} features): compare rows of this table only"
        )

    if seen:
        result.warnings.append("the reference is what generators train on: no images of it are held out")

    def add(row: Row) -> None:
        result.rows.append(row)
        on_row(row)

    add(Row(FLOOR, "", 0, _floor(known, options.count)))
    for model in models:
        for name, sampler, steps, images in _rows(model, samplers, options, output, size, extract, on_progress):
            found = _features(images, extract, partial(on_progress, f"{name}: features"))
            write_files(output, {f"{name}.png": _picture(images)})
            add(Row(model, sampler, steps, scores(found, known)))
            _write(result, output)
    result.warnings += _suspicious(result.rows)
    _write(result, output)
    return result


def _check(
    models: Sequence[str], samplers: Sequence[tuple[str, int]], options: SampleOptions, extract: Extractor
) -> None:
    """What would fail at a later row fails now: sampling may take hours."""
    names = [_name(model) for model in models]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"{twice[0]}: the name of two models or folders; rename one")
    if options.upsampler and all(map(_is_samples, models)):
        raise UsageError("--upsampler enlarges what a model samples, but only folders of samples are given")
    for model in models:
        if _is_samples(model):
            continue
        for sampler, steps in samplers:
            source = ImageSource(model, _with(options, sampler, steps))
            if extract.fingerprints & source.loss_extractors:
                raise ModelError(
                    f"{model}: was trained with {extract.name}, which cannot score it; use another --extractor"
                )


def _with(options: SampleOptions, sampler: str, steps: int) -> SampleOptions:
    return SampleOptions(**{**asdict(options), "sampler": sampler, "steps": steps})


Images = np.ndarray | np.memmap
"""(N, H, W, C) uint8."""


def _rows(
    model: str,
    samplers: Sequence[tuple[str, int]],
    options: SampleOptions,
    output: Path,
    size: tuple[int, int],
    extract: Extractor,
    on_progress: Callable[[str, int, int], None],
) -> Iterator[tuple[str, str, int, Images]]:
    if _is_samples(model):
        yield _name(model), "", 0, _sampled(model, size)[: options.count]
        return
    for sampler, steps in samplers:
        name, own = f"{_name(model)}-{sampler}-{steps}", _with(options, sampler, steps)
        source = ImageSource(model, own)
        yield name, sampler, steps, _samples(source, own, output / "samples" / name, name, on_progress)


def _samples(
    source: ImageSource, options: SampleOptions, folder: Path, name: str, on_progress: Callable[[str, int, int], None]
) -> Images:
    """The samples, from their files where they exist."""
    about = {**source.sha256, **{k: v for k, v in asdict(options).items() if k not in _FREE}}
    note = folder / "samples.json"
    if note.is_file() and json.loads(note.read_text()) != about:
        raise UsageError(f"{folder}: holds samples of another model or of other options; choose another output folder")
    write_files(folder, {"samples.json": json.dumps(about, indent=2) + "\n"})
    parts = []
    for first in range(0, options.count, CHUNK):
        end = min(first + CHUNK, options.count)
        file = folder / f"{first // CHUNK:05d}.npy"
        known = [np.load(file)[: end - first]] if file.is_file() else []
        starts = range(first + sum(map(len, known)), end, options.batch_size)
        drawn = [source.draw(range(start, min(start + options.batch_size, end))).numpy() for start in starts]
        part = np.concatenate([*known, *drawn])
        if drawn:
            buffer = io.BytesIO()
            np.save(buffer, part)
            write_files(folder, {file.name: buffer.getvalue()})
        parts.append(part)
        on_progress(f"{name}: samples", end, options.count)
    return np.concatenate(parts)


_FREE = ("count", "batch_size", "device")
"""Options that do not change the samples."""


def _features(images: Images, extract: Extractor, on_progress: Callable[[int, int], None]) -> Features:
    parts = []
    for first in range(0, len(images), CHUNK):
        parts.append(extract(torch.from_numpy(np.array(images[first : first + CHUNK]))))
        on_progress(min(first + CHUNK, len(images)), len(images))
    joined = [torch.cat([getattr(part, name) for part in parts]) for name in ("pooled", "spatial", "logits")]
    return Features(*joined)


def _floor(real: Features, count: int) -> Scores:
    """Scores of real images against other real ones: ``count`` of them against the rest, or halves."""
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))
    count = min(count, len(real) // 2)
    return scores(real[order[:count]], real[order[count:]])


def _reference(
    reference: Path,
    models: Sequence[str],
    upsampler: str | None,
    device: torch.device,
    skip_broken: bool,
    on_progress: Callable[[str, int, int], None],
) -> tuple[Images, tuple[int, int], bool]:
    """Real images at the size of the models, or of the first sample where there are no models.

    The last value says that no side of the reference is held out of training.
    """
    sizes, held_out, prepared = set(), set(), set()
    bounds: set[Bounds] = set()
    section, preprocessing = ImageDataSection(), PreprocessingSection()
    for model in models:
        if not _is_samples(model):
            source = ImageSource(model, SampleOptions(upsampler=upsampler, device=str(device)))
            config = source.last.config
            held_out |= {source.generator.config.data.test_images, config.data.test_images}
            bounds |= {one.held_out for one in (source.generator, source.last) if one.held_out is not None}
            prepared.add(config.preprocessing.model_dump_json())
            section, preprocessing = config.data, config.preprocessing
            if not isinstance(section.size, int):
                raise UsageError(f"{model}: makes volumes, and the scores are of images")
            sizes.add((section.size, section.channels))
    if len(sizes) > 1:
        raise UsageError(f"the models make images of different sizes ({sorted(sizes)}); evaluate them separately")
    if len(prepared) > 1:
        raise UsageError("the models see scans after different preprocessing; evaluate them separately")
    entries = find_images(reference).entries
    official = all(entry.part for entry in entries)
    if (len(held_out) > 1 or len(bounds) > 1) and not official:
        raise UsageError(
            f"the models hold out different images (data.test_images: {sorted(held_out)}), so that some were trained "
            "on what others are tested with; evaluate models of the same images and data.test_images"
        )
    numbers = (section.test_images, section.validation_images if section.test_images else 0)
    known = next(iter(bounds), None)
    if known is not None and not official:  # the sides are those of the training, whatever else lies in the folder
        numbers = known.count(entry.group for entry in entries)
        numbers = numbers if numbers[0] else (0, 0)
    size = next(iter(sizes), None) or _sample_size(models)
    collection: PackedImages = packed(
        reference,
        home() / "images",
        *size,
        preprocessing=build.image_preprocessing(preprocessing, (size[0], size[0])),
        held_out=numbers,
        skip_broken=skip_broken,
        on_file=partial(on_progress, "packing real images"),
    )
    test = collection.part("test")
    positions = test if len(test) else collection.part("train")
    if not len(positions):
        raise InputError(reference, "no image", "real images", "check --reference")
    return collection.images[positions], size, not len(test)


def _sampled(model: str, size: tuple[int, int]) -> Images:
    """The images of a folder of samples, without the overview that `medseg sample` puts beside them."""
    collection = packed(Path(model), home() / "images", *size)
    own = (Path(model) / "samples.json").is_file()
    return collection.images[[i for i, name in enumerate(collection.names) if not (own and name == "grid.png")]]


def _sample_size(models: Sequence[str]) -> tuple[int, int]:
    """Side of the first image, and three channels."""
    found = find_images(Path(models[0]))
    with Image.open(io.BytesIO(found.read(found.entries[0].name))) as image:
        return min(image.size), 3


def _is_samples(model: str) -> bool:
    """Whether a folder holds images; a run without a finished model is none, but pictures of its progress."""
    folder = Path(model)
    places = (folder / "model.json", folder / "model" / "model.json", folder / "config.yaml", folder / "autoencoder")
    return folder.is_dir() and not any(place.exists() for place in places)


def _name(model: str) -> str:
    path = Path(model)
    return path.parent.name if path.name == "model" else path.name


def _picture(images: Images) -> bytes:
    return png(grid(to_unit(torch.from_numpy(np.array(images[:64]))).permute(0, 3, 1, 2)))


def _suspicious(rows: Sequence[Row]) -> list[str]:
    """Fast samplers that do much worse than the slowest one of the same model."""
    found = []
    for model in dict.fromkeys(row.model for row in rows if row.sampler):
        own = sorted((row for row in rows if row.model == model), key=lambda row: row.steps)
        full = own[-1]
        found += [
            f"{model}: FID {row.scores.fid:.1f} with {row.sampler}-{row.steps} is more than {FAST_IS_BAD:g} times the "
            f"{full.scores.fid:.1f} of {full.sampler}-{full.steps}: the fast sampler does not fit this model"
            for row in own[:-1]
            if row.scores.fid > FAST_IS_BAD * full.scores.fid
        ]
    return found


def _write(result: GeneratorEvaluation, output: Path) -> None:
    table = [
        {**row, "extractor": result.extractor, "reference images": result.reference_count} for row in result.table()
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(table[0]))
    writer.writeheader()
    writer.writerows(table)
    content = {**{k: v for k, v in vars(result).items() if k != "rows"}, "rows": [asdict(row) for row in result.rows]}
    whole = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_files(output, {"scores.json": whole, "scores.csv": text.getvalue()})


def parse_samplers(text: str) -> list[tuple[str, int]]:
    """Text such as ddim:50,ddpm:1000 to pairs.

    Raises:
        UsageError: anything else.
    """
    found = []
    for part in text.split(","):
        name, _, steps = part.strip().partition(":")
        if name not in ("ddpm", "ddim", "dpm++") or not steps.isdecimal() or int(steps) < 1:
            raise UsageError(f"--samplers {part!r}: expected NAME:STEPS with ddpm, ddim or dpm++, for instance ddim:50")
        found.append((name, int(steps)))
    return found
