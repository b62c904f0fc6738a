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
from PIL import Image

from medseg_diffusion import build
from medseg_diffusion.config.generator import ImageDataSection
from medseg_diffusion.config.shared import PreprocessingSection
from medseg_diffusion.data.cases import Bounds
from medseg_diffusion.data.image_cache import PackedImages, packed, to_unit
from medseg_diffusion.data.images import find_images
from medseg_diffusion.device import choose_device
from medseg_diffusion.errors import InputError, ModelError, UsageError
from medseg_diffusion.files import as_paths, require_folder, write_files
from medseg_diffusion.metrics.generation import NEIGHBOUR, Features, Scores, scores
from medseg_diffusion.metrics.generation_summary import FLOOR, GeneratorEvaluation, GeneratorRow
from medseg_diffusion.models.generator import Generator
from medseg_diffusion.models.image_source import ImageSource, SampleOptions
from medseg_diffusion.models.store import home
from medseg_diffusion.networks.extractors import Extractor, extractor
from medseg_diffusion.reports.generator_page import TILES, Pictures, generator_page
from medseg_diffusion.reports.pictures import grid, png
from medseg_diffusion.training.progress import OnProgress, count_of, silent

from .real_images import labelled_images_of_training

Images = np.ndarray | np.memmap
"""(N, H, W, C) uint8."""
CHUNK = 64
"""Images in a file of samples, and images whose features are computed at a time."""
_NEUTRAL_OPTIONS = ("count", "batch_size", "device", "compile")
"""Options that do not change the samples."""
_DEFAULT_SAMPLING = SampleOptions(count=10_000)
MAX_FID_FACTOR = 2.0
"""A warning is given if a sampler's FID is more than this many times that of the sampler with the most steps."""


@dataclass(frozen=True)
class GeneratorEvaluationOptions:
    """The options of `medseg evaluate-generator`.

    Attributes:
        samplers: Pairs of a sampler and its number of steps; each gives a row of every model.
        sampling: The other options of the sampling. Its ``sampler`` and ``steps`` are not used.
        extractor: Name or file of the feature extractor, see `medseg_diffusion.networks.extractors`.
        inception: Inception's weight file.
        download: Download Inception's weights if they are missing; nothing is downloaded otherwise.
        skip_broken: Skip files of the reference that cannot be read, instead of stopping.
        command: The command line, for the page.
    """

    samplers: Sequence[tuple[str, int]] = (("ddim", 50), ("ddim", 200), ("ddpm", 1000))
    sampling: SampleOptions = _DEFAULT_SAMPLING
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
    extract = extractor(options.extractor, device, options.inception, download=options.download)
    _check_models(names, options, extract)
    real = _real_images(reference, names, options, device, on_count)
    _check_counts(names, real, options.sampling.count)
    real_features = features_of(real.images, extract, partial(on_count, "real images"))
    count = len(real.images)
    result = GeneratorEvaluation(extract.name, extract.maps, str(reference), count, options.sampling.upsampler)
    fewest, n_features = min(options.sampling.count, count), real_features.pooled.shape[1]
    if fewest <= n_features:
        result.warnings.append(
            f"FID is biased upwards ({fewest} images for {n_features} features): compare rows of this table only"
        )
    if not real.held_out:
        result.warnings.append("the reference is what generators train on: no images of it are held out")

    def add(row: GeneratorRow) -> None:
        result.rows.append(row)
        on_row(row)

    add(GeneratorRow(FLOOR, "", 0, _floor(real_features, options.sampling.count)))
    sampled: list[Pictures] = []
    for model in names:
        for sample in _samples_of(model, options, output, real.size, on_count):
            features = features_of(sample.images, extract, partial(on_count, f"{sample.name}: features"))
            write_files(output, {f"{sample.name}.png": _picture(sample.images)})
            add(GeneratorRow(model, sample.sampler, sample.steps, scores(features, real_features)))
            sampled.append(Pictures(sample.name, np.array(sample.images[:TILES]), sample.classes))
            _write(result, [real.beside(sampled), *sampled], output, options.command)
    result.warnings += _suspicious(result.rows)
    _write(result, [real.beside(sampled), *sampled], output, options.command)
    return result


def _check_models(models: Sequence[str], options: GeneratorEvaluationOptions, extract: Extractor) -> None:
    """Check all models first: sampling may take hours, and a later row should not fail then."""
    names = [_name(model) for model in models]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"{repeated[0]}: the name of two models or folders; rename one")
    if options.sampling.upsampler and all(map(_is_samples, models)):
        raise UsageError("--upsampler enlarges what a model samples, but only folders of samples are given")
    for model in models:
        if _is_samples(model):
            continue
        for sampler, steps in options.samplers:
            source = ImageSource(model, replace(options.sampling, sampler=sampler, steps=steps))
            if extract.fingerprints & source.loss_extractors:
                raise ModelError(
                    f"{model}: was trained with {extract.name}, which cannot score it; use another --extractor"
                )


def _check_counts(models: Sequence[str], real: _RealImages, count: int) -> None:
    # Half of the real images are scored against the other half, for comparison.
    if count < NEIGHBOUR + 2 or len(real.images) < 2 * (NEIGHBOUR + 2):
        raise UsageError(
            f"{count} samples against {len(real.images)} real images are too few: the scores need {NEIGHBOUR + 2} and "
            f"{2 * (NEIGHBOUR + 2)}"
        )
    for model in filter(_is_samples, models):
        if (n_images := len(_sampled(model, real.size))) < NEIGHBOUR + 2:
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
    output: Path,
    size: tuple[int, int],
    on_progress: Callable[[str, int, int], None],
) -> Iterator[_Samples]:
    """The samples of every row of a model or folder of samples."""
    if _is_samples(model):
        yield _Samples(_name(model), "", 0, _sampled(model, size)[: options.sampling.count])
        return
    for sampler, steps in options.samplers:
        name, sampling = f"{_name(model)}-{sampler}-{steps}", replace(options.sampling, sampler=sampler, steps=steps)
        source = ImageSource(model, sampling)
        names = source.generator.classes
        shown = range(min(TILES, options.sampling.count))
        classes = tuple(names[label] for label in source.labels(shown).tolist()) if names else ()
        images = _samples(source, sampling, output / "samples" / name, name, on_progress)
        yield _Samples(name, sampler, steps, images, classes)


def _samples(
    source: ImageSource, options: SampleOptions, folder: Path, name: str, on_progress: Callable[[str, int, int], None]
) -> Images:
    """The samples, read from their files as far as they exist."""
    identity = {**source.sha256, **{k: v for k, v in asdict(options).items() if k not in _NEUTRAL_OPTIONS}}
    record = folder / "samples.json"
    if record.is_file() and json.loads(record.read_text()) != identity:
        raise UsageError(f"{folder}: holds samples of another model or of other options; choose another output folder")
    write_files(folder, {"samples.json": json.dumps(identity, indent=2) + "\n"})
    parts = []
    for first in range(0, options.count, CHUNK):
        end = min(first + CHUNK, options.count)
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
        on_progress(f"{name}: samples", end, options.count)
    return np.concatenate(parts)


def features_of(images: Images, extract: Extractor, on_progress: Callable[[int, int], None]) -> Features:
    """The features of images (N, H, W, C) uint8; ``on_progress`` is called with the images done and all."""
    parts = []
    for first in range(0, len(images), CHUNK):
        parts.append(extract(torch.from_numpy(np.array(images[first : first + CHUNK]))))
        on_progress(min(first + CHUNK, len(images)), len(images))
    joined = [torch.cat([getattr(part, name) for part in parts]) for name in ("pooled", "spatial", "logits")]
    return Features(*joined)


def _floor(real: Features, count: int) -> Scores:
    """Scores of real images against other real images: ``count``, at most half of them, against the rest."""
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))
    count = min(count, len(real) // 2)
    return scores(real[order[:count]], real[order[count:]])


@dataclass(frozen=True, eq=False)
class _RealImages:
    """Real images at the size of the models.

    Attributes:
        images: The images.
        size: Side length and channels.
        held_out: Whether they were held out of the training.
        classes: The class of each; empty for one without.
    """

    images: Images
    size: tuple[int, int]
    held_out: bool
    classes: tuple[str, ...]

    def beside(self, samples: Sequence[Pictures]) -> Pictures:
        """Images to show beside samples: of the classes of the first samples that have some, else evenly spread."""
        wanted = next((one.classes for one in samples if one.classes), ())
        count = min(max((len(one.images) for one in samples), default=TILES), len(self.images))
        spread = np.linspace(0, len(self.images) - 1, count).round().astype(int).tolist()
        chosen = []
        for i, place in enumerate(spread):
            alike = [k for k, name in enumerate(self.classes) if name == wanted[i]] if i < len(wanted) else []
            chosen.append(next((k for k in alike if k not in chosen), alike[0]) if alike else place)
        return Pictures(
            "Real images",
            np.array(self.images[chosen]),
            tuple(self.classes[k] for k in chosen) if wanted else (),
        )


@dataclass(frozen=True)
class _ModelImages:
    """How the models' images were prepared, the same for all models: size, preprocessing and sides of the split.

    Attributes:
        section: Configuration of the images.
        preprocessing: Configuration of the preprocessing of scans.
        size: Side length and channels; None without a model.
        test_images: The numbers of test images of the models.
        bounds: The held-out sides of the models.
        masks: The first generator of masks, for which real images are read with their masks; None without one.
    """

    section: ImageDataSection
    preprocessing: PreprocessingSection
    size: tuple[int, int] | None
    test_images: set[int]
    bounds: set[Bounds]
    masks: Generator | None = None


def _model_images(models: Sequence[str], options: SampleOptions) -> _ModelImages:
    """Read the configurations of all models.

    Raises:
        UsageError: A model of volumes, or models whose images differ in size or preprocessing.
    """
    sizes, preprocessings, test_images = set(), set(), set()
    bounds: set[Bounds] = set()
    masks: Generator | None = None
    section, preprocessing = ImageDataSection(), PreprocessingSection()
    for model in models:
        if _is_samples(model):
            continue
        source = ImageSource(model, options)
        config = source.last.config
        test_images |= {source.generator.config.data.test_images, config.data.test_images}
        bounds |= {one.held_out for one in (source.generator, source.last) if one.held_out is not None}
        masks = masks or (source.generator if source.generator.mask_classes else None)
        preprocessings.add(config.preprocessing.model_dump_json())
        section, preprocessing = config.data, config.preprocessing
        if not isinstance(section.size, int):
            raise UsageError(f"{model}: makes volumes, and the scores are of images")
        sizes.add((section.size, section.channels))
    if len(sizes) > 1:
        raise UsageError(f"the models make images of different sizes ({sorted(sizes)}); evaluate them separately")
    if len(preprocessings) > 1:
        raise UsageError("the models see scans after different preprocessing; evaluate them separately")
    return _ModelImages(section, preprocessing, next(iter(sizes), None), test_images, bounds, masks)


def _real_images(
    reference: Path,
    models: Sequence[str],
    options: GeneratorEvaluationOptions,
    device: torch.device,
    on_progress: Callable[[str, int, int], None],
) -> _RealImages:
    """The held-out real images, or all of them, at the size of the models or else of the first sample."""
    expected = _model_images(models, SampleOptions(upsampler=options.sampling.upsampler, device=str(device)))
    entries = find_images(reference).entries
    official = all(entry.part for entry in entries)
    if (len(expected.test_images) > 1 or len(expected.bounds) > 1) and not official:
        raise UsageError(
            f"the models hold out different images (data.test_images: {sorted(expected.test_images)}), so that some "
            "were trained on what others are tested with; evaluate models of the same images and data.test_images"
        )
    section = expected.section
    n_held_out = (section.test_images, section.validation_images if section.test_images else 0)
    bounds = next(iter(expected.bounds), None)
    if bounds is not None and not official:  # the sides of the training hold for any folder
        n_held_out = bounds.count(entry.group for entry in entries)
        n_held_out = n_held_out if n_held_out[0] else (0, 0)
    size = expected.size or _sample_size(models)
    on_file = partial(on_progress, "packing real images")
    collection: PackedImages
    without_test = []
    if expected.masks is not None:
        collection = labelled_images_of_training(expected.masks, reference, on_file, options.skip_broken)
        without_test = [collection.part("validation")]
    else:
        collection = packed(
            reference,
            home() / "images",
            *size,
            preprocessing=build.image_preprocessing(expected.preprocessing, (size[0], size[0])),
            held_out=n_held_out,
            skip_broken=options.skip_broken,
            on_file=on_file,
        )
    test = collection.part("test")
    # Labelled images keep a validation side, which others give up where there is no test side.
    positions = test if len(test) else np.concatenate([collection.part("train"), *without_test])
    if not len(positions):
        raise InputError(reference, "no image", "real images", "check --reference")
    classes = tuple(collection.classes[label] if label >= 0 else "" for label in collection.labels[positions])
    return _RealImages(collection.images[positions], size, bool(len(test)), classes)


def _sampled(model: str, size: tuple[int, int]) -> Images:
    """The images of a folder of samples, without the overview grid that `medseg sample` writes beside them."""
    collection = packed(Path(model), home() / "images", *size)
    by_medseg = (Path(model) / "samples.json").is_file()
    return collection.images[[i for i, name in enumerate(collection.names) if not (by_medseg and name == "grid.png")]]


def _sample_size(models: Sequence[str]) -> tuple[int, int]:
    """Side length of the first image, and three channels."""
    source = find_images(Path(models[0]))
    with Image.open(io.BytesIO(source.read(source.entries[0].name))) as image:
        return min(image.size), 3


def _is_samples(model: str) -> bool:
    """Whether this is a folder of sampled images. A run folder holds images of its progress, and is not."""
    folder = Path(model)
    places = (folder / "model.json", folder / "model" / "model.json", folder / "config.yaml", folder / "autoencoder")
    return folder.is_dir() and not any(place.exists() for place in places)


def _name(model: str) -> str:
    path = Path(model)
    return path.parent.name if path.name == "model" else path.name


def _picture(images: Images) -> bytes:
    return png(grid(to_unit(torch.from_numpy(np.array(images[:64]))).permute(0, 3, 1, 2)))


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
