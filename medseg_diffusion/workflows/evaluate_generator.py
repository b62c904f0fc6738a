"""`medseg evaluate-generator`: sample from generators and score the samples against real images.

OUT/report.html                 the page: scores, samples beside real images, warnings
OUT/scores.json, scores.csv     one row per model and sampler, and the floor: real images against other real ones
OUT/samples/<row>/<i>.npy       the samples, 64 in a file; a repeated call reads them instead of sampling again
OUT/<row>.png                   the first 64 samples
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from medseg_diffusion import build
from medseg_diffusion.data.image_cache import to_unit
from medseg_diffusion.device import choose_device
from medseg_diffusion.errors import ModelError, UsageError
from medseg_diffusion.files import as_paths, require_folder, write_files
from medseg_diffusion.metrics.generation import NEIGHBOUR, Features, Scores, SliceFeatures
from medseg_diffusion.metrics.generation_summary import FLOOR, GeneratorEvaluation, GeneratorRow
from medseg_diffusion.models.image_source import ImageSource, SampleOptions
from medseg_diffusion.networks.extractors import Extractor
from medseg_diffusion.reports.generator_page import TILES, Pictures, generator_page
from medseg_diffusion.reports.pictures import grid, png
from medseg_diffusion.training.progress import OnProgress, count_of, silent
from medseg_diffusion.volumes.outputs import SAMPLES

from .evaluated_images import Images, RealImages, in_two_dimensions, is_samples, real_images, sampled
from .image_features import feature_extractor, features_of, scores_of, with_diversity

CHUNK = 64
"""Images in a file of samples."""
_NEUTRAL_OPTIONS = ("count", "batch_size", "device", "compile")
"""Options that do not change the samples."""
DEFAULT_IMAGES, DEFAULT_VOLUMES = 10_000, 100
"""Samples of a row, unless the options say how many; and never more volumes than there are real ones, since each takes
minutes."""
MAX_FID_FACTOR = 2.0
"""A warning is given if a sampler's FID is more than this many times that of the sampler with the most steps."""


@dataclass(frozen=True)
class GeneratorEvaluationOptions:
    """The options of `medseg evaluate-generator`.

    Attributes:
        samplers: Pairs of a sampler and its number of steps; each gives a row of every model.
        sampling: The other options of the sampling. Its ``sampler`` and ``steps`` are not used.
        extractor: Name or file of the feature extractor (`medseg_diffusion.networks.extractors`), or a segmenter,
            whose encoder is used.
        inception: Inception's weight file.
        download: Download Inception's weights if they are missing; nothing is downloaded otherwise.
        skip_broken: Skip files of the reference that cannot be read, instead of stopping.
        command: The command line, for the page.
    """

    samplers: Sequence[tuple[str, int]] = (("ddim", 50), ("ddim", 200), ("ddpm", 1000))
    sampling: SampleOptions = SampleOptions()
    extractor: str = "auto"
    inception: Path | None = None
    download: bool = False
    skip_broken: bool = False
    command: str = ""

    def __post_init__(self) -> None:
        as_paths(self, "inception")


def evaluate_generator(
    models: str | Path | Sequence[str | Path],
    reference: str | Path,
    output: str | Path,
    options: GeneratorEvaluationOptions = GeneratorEvaluationOptions(),
    *,
    on_progress: OnProgress = silent,
    on_row: Callable[[GeneratorRow], None] = lambda row: None,
) -> GeneratorEvaluation:
    """Sample images of every model with every sampler and score them against real images.

    An interrupted call can be repeated: existing samples are not made again.

    Args:
        models: Generators (folder or installed name), or folders of sampled images, which need no sampler.
        reference: Real images (`medseg_diffusion.data.images`); their test side if they have one, else all.
        output: Folder for the results.
        options: The other options.
        on_progress: Called with a text and the share done, 0 to 1.
        on_row: Called after every row.

    Raises:
        UsageError: An unknown sampler or extractor, or too few images for the scores.
        InputError: An unusable reference.
        ModelError: No usable model or extractor, or an extractor that a model was trained with.
    """
    reference, output, on_count = Path(reference), Path(output), count_of(on_progress)
    names = [str(models)] if isinstance(models, str | Path) else [str(model) for model in models]
    require_folder(output)
    device = choose_device(options.sampling.device)
    extract = feature_extractor(options.extractor, device, options.inception, options.download)
    _check_models(names, options, extract)
    sampling = SampleOptions(upsampler=options.sampling.upsampler, device=str(device))
    real = real_images(reference, names, sampling, options.skip_broken, on_count)
    if extract.dims == 3 and len(real.shape) == 3:
        raise UsageError(f"{extract.name} takes volumes, and these are images; use another --extractor")
    count = options.sampling.count or default_count(real)
    _check_counts(names, real, count)
    real_features = features_of(real.images, extract, partial(on_count, "real images"))
    n_real = len(real.images)
    result = GeneratorEvaluation(extract.name, extract.maps, str(reference), n_real, options.sampling.upsampler)
    result.warnings += _bias(real_features, min(count, n_real))
    if not real.held_out:
        result.warnings.append("the reference is what generators train on: no images of it are held out")

    def add(row: GeneratorRow) -> None:
        result.rows.append(row)
        on_row(row)

    add(GeneratorRow(FLOOR, "", 0, with_diversity(_floor(real_features, count), real.images)))
    shown: list[Pictures] = []
    for model in names:
        for sample in _samples_of(model, options, count, output, real.shape, on_count):
            features = features_of(sample.images, extract, partial(on_count, f"{sample.name}: features"))
            write_files(output, {f"{sample.name}.png": _picture(sample.images)})
            scored = with_diversity(scores_of(features, real_features), sample.images)
            add(GeneratorRow(model, sample.sampler, sample.steps, scored))
            shown.append(Pictures(sample.name, in_two_dimensions(sample.images[:TILES]), sample.classes))
            _write(result, [real.beside(shown), *shown], output, options.command)
    result.warnings += _suspicious(result.rows)
    _write(result, [real.beside(shown), *shown], output, options.command)
    return result


def default_count(real: RealImages) -> int:
    """Number of samples of a row, unless the options say it."""
    return min(DEFAULT_VOLUMES, len(real.images)) if len(real.shape) == 4 else DEFAULT_IMAGES


def _check_models(models: Sequence[str], options: GeneratorEvaluationOptions, extract: Extractor) -> None:
    """Check all models first: sampling may take hours, and a later row should not fail then."""
    names = [_name(model) for model in models]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"{repeated[0]}: the name of two models or folders; rename one")
    if options.sampling.upsampler and all(map(is_samples, models)):
        raise UsageError("--upsampler enlarges what a model samples, but only folders of samples are given")
    for model in models:
        if is_samples(model):
            continue
        for sampler, steps in options.samplers:
            source = ImageSource(model, replace(options.sampling, sampler=sampler, steps=steps))
            if extract.fingerprints & source.loss_extractors:
                raise ModelError(
                    f"{model}: was trained with {extract.name}, which cannot score it; use another --extractor"
                )


def _check_counts(models: Sequence[str], real: RealImages, count: int) -> None:
    # Half of the real images are scored against the other half, for comparison.
    if count < NEIGHBOUR + 2 or len(real.images) < 2 * (NEIGHBOUR + 2):
        raise UsageError(
            f"{count} samples against {len(real.images)} real images are too few: the scores need {NEIGHBOUR + 2} and "
            f"{2 * (NEIGHBOUR + 2)}"
        )
    for model in filter(is_samples, models):
        if (n_images := len(sampled(model, real.shape))) < NEIGHBOUR + 2:
            raise UsageError(f"{model}: {n_images} images are too few: the scores need {NEIGHBOUR + 2}")


@dataclass(frozen=True, eq=False)
class _Samples:
    """The images of a row: its name, sampler and steps, the images, and the classes of those that are shown."""

    name: str
    sampler: str
    steps: int
    images: Images
    classes: tuple[str, ...] = ()


def _samples_of(
    model: str,
    options: GeneratorEvaluationOptions,
    count: int,
    output: Path,
    shape: tuple[int, ...],
    on_progress: Callable[[str, int, int], None],
) -> Iterator[_Samples]:
    """The samples, ``count`` at most, of every row of a model or folder of samples."""
    if is_samples(model):
        yield _Samples(_name(model), "", 0, sampled(model, shape)[:count])
        return
    for sampler, steps in options.samplers:
        name, sampling = f"{_name(model)}-{sampler}-{steps}", replace(options.sampling, sampler=sampler, steps=steps)
        source = ImageSource(model, sampling)
        names = source.generator.classes
        shown = range(min(TILES, count))
        classes = tuple(names[label] for label in source.labels(shown).tolist()) if names else ()
        images = _samples(source, count, output / "samples" / name, name, on_progress)
        yield _Samples(name, sampler, steps, images, classes)


def _samples(
    source: ImageSource, count: int, folder: Path, name: str, on_progress: Callable[[str, int, int], None]
) -> Images:
    """The samples, read from their files as far as they exist."""
    options = source.options
    identity = {**source.sha256, **{k: v for k, v in asdict(options).items() if k not in _NEUTRAL_OPTIONS}}
    record = folder / SAMPLES["options"]
    if record.is_file() and json.loads(record.read_text()) != identity:
        raise UsageError(f"{folder}: holds samples of another model or of other options; choose another output folder")
    write_files(folder, {SAMPLES["options"]: json.dumps(identity, indent=2) + "\n"})
    parts = []
    for first in range(0, count, CHUNK):
        end = min(first + CHUNK, count)
        file = folder / f"{first // CHUNK:05d}.npy"
        existing = [np.load(file)[: end - first]] if file.is_file() else []
        starts = range(first + sum(map(len, existing)), end, options.batch_size)
        drawn = [source.draw(range(start, min(start + options.batch_size, end))).numpy() for start in starts]
        part = np.concatenate([*existing, *drawn])
        if drawn:
            buffer = io.BytesIO()
            np.save(buffer, part)
            write_files(folder, {file.name: buffer.getvalue()})
        parts.append(part)
        on_progress(f"{name}: samples", end, count)
    return np.concatenate(parts)


def _floor(real: Features | SliceFeatures, count: int) -> Scores:
    """Scores of real images against other real images: ``count``, at most half of them, against the rest."""
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))
    count = min(count, len(real) // 2)
    return scores_of(real[order[:count]], real[order[count:]])


def _bias(real: Features | SliceFeatures, count: int) -> list[str]:
    """A warning if ``count`` images are fewer than the features whose covariance FID estimates."""
    if isinstance(real, SliceFeatures):
        number, kind, pooled = count * real.slices, "slices", next(iter(real.planes.values())).pooled
    else:
        number, kind, pooled = count, "images", real.pooled
    if number > (n_features := pooled.shape[1]):
        return []
    return [f"FID is biased upwards ({number} {kind} for {n_features} features): compare rows of this table only"]


def _name(model: str) -> str:
    path = Path(model)
    return path.parent.name if path.name == "model" else path.name


def _picture(images: Images) -> bytes:
    return png(grid(to_unit(torch.from_numpy(in_two_dimensions(images[:64]))).permute(0, 3, 1, 2)))


def _suspicious(rows: Sequence[GeneratorRow]) -> list[str]:
    """Warnings about samplers that do much worse than the one with the most steps of the same model, and about N."""
    counts = {row.scores.count for row in rows if row.model != FLOOR}
    warnings = []
    if len(counts) > 1:
        warnings.append(f"rows have {min(counts)} to {max(counts)} images: the FID of fewer images is larger")
    for model in dict.fromkeys(row.model for row in rows if row.sampler):
        *fast, slowest = sorted((row for row in rows if row.model == model), key=lambda row: row.steps)
        warnings += [
            f"{model}: FID {row.scores.fid:.1f} with {row.sampler}-{row.steps} is more than {MAX_FID_FACTOR:g} times "
            f"the {slowest.scores.fid:.1f} of {slowest.sampler}-{slowest.steps}: the fast sampler does not fit this "
            "model"
            for row in fast
            if row.scores.fid > MAX_FID_FACTOR * slowest.scores.fid
        ]
    return warnings


def _write(result: GeneratorEvaluation, pictures: Sequence[Pictures], output: Path, command: str) -> None:
    table = [
        {**row, "extractor": result.extractor, "reference images": result.reference_count} for row in result.table()
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(table[0]))
    writer.writeheader()
    writer.writerows(table)
    content = {**{k: v for k, v in vars(result).items() if k != "rows"}, "rows": [asdict(row) for row in result.rows]}
    scores_json = json.dumps(content, indent=2, allow_nan=False) + "\n"
    page = generator_page(result, pictures, command=command)
    write_files(output, {"scores.json": scores_json, "scores.csv": text.getvalue(), "report.html": page})


def parse_samplers(text: str) -> list[tuple[str, int]]:
    """Parse text such as ddim:50,ddpm:1000 into pairs of a sampler and its number of steps.

    Raises:
        UsageError: The text has another form, or names an unknown sampler.
    """
    samplers = []
    for part in text.split(","):
        name, _, steps = part.strip().partition(":")
        if name not in build.SAMPLERS or not steps.isdecimal() or int(steps) < 1:
            names = ", ".join(build.SAMPLERS)
            raise UsageError(f"--samplers {part!r}: expected NAME:STEPS with one of {names}, for instance ddim:50")
        samplers.append((name, int(steps)))
    return samplers
