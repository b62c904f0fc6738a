"""The images that `medseg evaluate-generator` compares: real ones as the models see them, and folders of samples."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from medseg_diffusion import build
from medseg_diffusion.config.generator import ImageDataSection
from medseg_diffusion.config.shared import PreprocessingSection
from medseg_diffusion.data.cases import Bounds
from medseg_diffusion.data.image_cache import PackedImages, packed
from medseg_diffusion.data.images import find_images
from medseg_diffusion.errors import InputError, UsageError
from medseg_diffusion.models.generator import Generator
from medseg_diffusion.models.image_source import ImageSource, SampleOptions
from medseg_diffusion.models.store import home
from medseg_diffusion.reports.generator_page import TILES, Pictures
from medseg_diffusion.reports.pictures import as_pictures
from medseg_diffusion.volumes.io import read_map
from medseg_diffusion.volumes.outputs import SAMPLES

from .real_images import labelled_images_of_training

Images = npt.NDArray[np.uint8]
"""Images (N, H, W, C), or RAS volumes (N, I, J, K, C)."""


@dataclass(frozen=True, eq=False)
class RealImages:
    """Real images at the size of the models.

    Attributes:
        images: The images.
        held_out: Whether they were held out of the training.
        classes: The class of each; empty for one without.
    """

    images: Images
    held_out: bool
    classes: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Sides and channels of an image."""
        return self.images.shape[1:]

    def beside(self, samples: Sequence[Pictures]) -> Pictures:
        """Images to show beside samples: of the classes of the first samples that have some, else evenly spread."""
        wanted = next((one.classes for one in samples if one.classes), ())
        count = min(max((len(one.images) for one in samples), default=TILES), len(self.images))
        spread = np.linspace(0, len(self.images) - 1, count).round().astype(int).tolist()
        chosen = []
        for i, place in enumerate(spread):
            alike = [k for k, name in enumerate(self.classes) if name == wanted[i]] if i < len(wanted) else []
            chosen.append(next((k for k in alike if k not in chosen), alike[0]) if alike else place)
        names = tuple(self.classes[k] for k in chosen) if wanted else ()
        return Pictures("Real images", in_two_dimensions(self.images[chosen]), names)


@dataclass(frozen=True)
class _ModelImages:
    """How the models' images were prepared, the same for all models: shape, preprocessing and sides of the split.

    Attributes:
        preprocessing: Configuration of the preprocessing of scans.
        shape: Sides and channels; None without a model.
        test_images: The numbers of test images of the models.
        validation_images: The number of validation images of the last model.
        bounds: The held-out sides of the models.
        masks: The first generator of masks, for which real images are read with their masks; None without one.
    """

    preprocessing: PreprocessingSection
    shape: tuple[int, ...] | None
    test_images: set[int]
    validation_images: int
    bounds: set[Bounds]
    masks: Generator | None = None


def _model_images(models: Sequence[str], options: SampleOptions) -> _ModelImages:
    """Read the configurations of all models.

    Raises:
        UsageError: Models whose images differ in shape or preprocessing.
    """
    shapes, preprocessings, test_images = set(), set(), set()
    bounds: set[Bounds] = set()
    masks: Generator | None = None
    section, preprocessing = ImageDataSection(), PreprocessingSection()
    for model in models:
        if is_samples(model):
            continue
        source = ImageSource(model, options)
        config = source.last.config
        test_images |= {source.generator.config.data.test_images, config.data.test_images}
        bounds |= {one.held_out for one in (source.generator, source.last) if one.held_out is not None}
        masks = masks or (source.generator if source.generator.mask_classes else None)
        preprocessings.add(config.preprocessing.model_dump_json())
        section, preprocessing = config.data, config.preprocessing
        shapes.add((*section.shape, section.channels))
    if len(shapes) > 1:
        raise UsageError(f"the models make images of different shapes ({sorted(shapes)}); evaluate them separately")
    if len(preprocessings) > 1:
        raise UsageError("the models see scans after different preprocessing; evaluate them separately")
    shape = next(iter(shapes), None)
    return _ModelImages(preprocessing, shape, test_images, section.validation_images, bounds, masks)


def real_images(
    reference: Path,
    models: Sequence[str],
    options: SampleOptions,
    skip_broken: bool,
    on_progress: Callable[[str, int, int], None],
) -> RealImages:
    """The held-out real images, or all of them, in the shape of the models' images or else of the first sample.

    Args:
        reference: Real images.
        models: The models and folders of samples.
        options: Options of the sampling, of which the upsampler decides the shape.
        skip_broken: Skip files that cannot be read.
        on_progress: Called with a text, the files read, and all.

    Raises:
        InputError: An unusable reference.
        UsageError: Models that cannot be compared.
    """
    expected = _model_images(models, options)
    entries = find_images(reference).entries
    official = all(entry.part for entry in entries)
    if (len(expected.test_images) > 1 or len(expected.bounds) > 1) and not official:
        raise UsageError(
            f"the models hold out different images (data.test_images: {sorted(expected.test_images)}), so that some "
            "were trained on what others are tested with; evaluate models of the same images and data.test_images"
        )
    test_images = next(iter(expected.test_images), 0)
    n_held_out = (test_images, expected.validation_images if test_images else 0)
    bounds = next(iter(expected.bounds), None)
    if bounds is not None and not official:  # the sides of the training hold for any folder
        n_held_out = bounds.count(entry.group for entry in entries)
        n_held_out = n_held_out if n_held_out[0] else (0, 0)
    *sides, channels = expected.shape or _shape_of_samples(models[0])
    on_file = partial(on_progress, "packing real images")
    collection: PackedImages
    without_test = []
    if expected.masks is not None:
        collection = labelled_images_of_training(expected.masks, reference, on_file, skip_broken)
        without_test = [collection.part("validation")]
    else:
        collection = packed(
            reference,
            home() / "images",
            sides,
            channels,
            preprocessing=build.image_preprocessing(expected.preprocessing, tuple(sides)),
            held_out=n_held_out,
            skip_broken=skip_broken,
            on_file=on_file,
        )
    test = collection.part("test")
    # Labelled images keep a validation side, which others give up where there is no test side.
    positions = test if len(test) else np.concatenate([collection.part("train"), *without_test])
    if not len(positions):
        raise InputError(reference, "no image", "real images", "check --reference")
    classes = tuple(collection.classes[label] if label >= 0 else "" for label in collection.labels[positions])
    return RealImages(collection.images[positions], bool(len(test)), classes)


def sampled(folder: str, shape: tuple[int, ...]) -> Images:
    """The images of a folder of samples.

    Raises:
        InputError: Volumes of another shape, or a file that cannot be read.
    """
    *sides, channels = shape
    volumes = _sampled_volumes(folder)
    if len(sides) == 3 and volumes:
        levels = []
        for path in volumes:
            level = read_map(path).data.movedim(0, -1).round().clamp(0, 255).to(torch.uint8)
            if tuple(level.shape) != shape:
                found, expected = (" x ".join(map(str, one)) for one in (level.shape, shape))
                raise InputError(path, f"a volume of {found}", expected, "use samples of the models to compare")
            levels.append(level)
        return torch.stack(levels).numpy()
    return np.array(packed(Path(folder), home() / "images", sides, channels).images)


def _sampled_volumes(folder: str) -> list[Path]:
    """The volumes that `medseg sample` wrote into a folder, whose levels are those of its model."""
    return sorted(Path(folder).glob("*.nii.gz")) if (Path(folder) / SAMPLES["options"]).is_file() else []


def _shape_of_samples(folder: str) -> tuple[int, ...]:
    """The shorter side of the first image, twice, and three channels."""
    source = find_images(Path(folder))
    if source.kind == "scans" or _sampled_volumes(folder):
        raise UsageError(
            f"{folder}: volumes, for which real scans are prepared as their model says; name the generator, too"
        )
    with Image.open(io.BytesIO(source.read(source.entries[0].name))) as image:
        return min(image.size), min(image.size), 3


def is_samples(model: str) -> bool:
    """Whether this is a folder of sampled images. A run folder holds images of its progress, and is not."""
    folder = Path(model)
    places = (folder / "model.json", folder / "model" / "model.json", folder / "config.yaml", folder / "autoencoder")
    return folder.is_dir() and not any(place.exists() for place in places)


def in_two_dimensions(images: Images) -> Images:
    """Images as they are; of volumes the middle axial slice, anterior up and the patient's right on the left."""
    channels_first = torch.from_numpy(np.array(images)).movedim(-1, 1)
    return as_pictures(channels_first).movedim(1, -1).numpy()
