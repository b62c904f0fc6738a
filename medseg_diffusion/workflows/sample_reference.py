"""`medseg sample --reference D`: samples beside real images, and whether they are copies of training images.

DIR/reference.json   distances from the nearest training images, of samples and of real images that were not trained on
DIR/reference.png    samples, real images, and the samples that are closest to a training image beside that image
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from medseg_diffusion import build
from medseg_diffusion.data.cases import Case
from medseg_diffusion.data.image_cache import to_unit
from medseg_diffusion.data.labelled_images import read_labelled
from medseg_diffusion.data.mask_examples import CaseFormat
from medseg_diffusion.errors import InputError
from medseg_diffusion.files import write_files
from medseg_diffusion.metrics.generation import Memorisation, SliceFeatures, memorisation
from medseg_diffusion.models.image_source import ImageSource
from medseg_diffusion.reports.pictures import as_pictures, grid, png, sheet
from medseg_diffusion.training.progress import OnProgress, count_of
from medseg_diffusion.volumes.outputs import SAMPLES

from .image_features import feature_extractor, features_of
from .real_images import images_of_training
from .sample_masks import LabelledSample

FILE, PICTURE = "reference.json", SAMPLES["reference"]
SHOWN = 16
"""Samples, real images and pairs on the picture."""

Pixels = npt.NDArray[np.uint8]


class Reference:
    """The images that a generator was trained on and those that it was not, prepared before anything is drawn.

    Args:
        source: The generator.
        data: What it was trained on: a folder or zip of images, a folder of scans or, for a generator of masks, a
            labelled folder. The sides of its split are those of the training.
        features: Name or file of the feature extractor (`medseg_diffusion.networks.extractors`), or a segmenter.
        on_progress: Called with a text and the share done, 0 to 1.

    Raises:
        InputError: Unusable images, or none that were held out of the training.
        ModelError, UsageError: No usable extractor, or one of other images.
    """

    def __init__(self, source: ImageSource, data: Path, features: str, on_progress: OnProgress) -> None:
        self.data, self._on_count = data, count_of(on_progress)
        self.extract = feature_extractor(features, source.device)
        self.images = images_of_training(source, data, partial(self._on_count, "packing real images"))
        test, validation = self.images.part("test"), self.images.part("validation")
        self.training, self.unseen = self.images.part("train"), test if len(test) else validation
        if not len(self.training) or not len(self.unseen):
            raise InputError(
                data,
                f"{len(self.training)} images of the training and {len(self.unseen)} others",
                "both, to compare samples with",
                "give the data that the generator was trained on",
            )
        self._features(self.images.images[self.unseen[:1]], "the first image")  # fails before hours of sampling

    def compare(self, samples: Pixels, output: Path) -> Memorisation:
        """Compare samples (N, *S, C) uint8 on the model's grid; write `FILE` and `PICTURE` into ``output``."""
        training, unseen = (self.images.images[positions] for positions in (self.training, self.unseen))
        features = [
            self._features(images, what)
            for images, what in ((samples, "samples"), (training, "training images"), (unseen, "unseen images"))
        ]
        comparison = memorisation(*features)
        content = {
            "reference": str(self.data),
            "extractor": self.extract.name,
            "samples": len(samples),
            "training_images": len(training),
            "unseen_images": len(unseen),
            "closer": comparison.closer,
            "closest": comparison.closest,
        }
        closest = torch.argsort(comparison.distances, stable=True)[:SHOWN].numpy()
        neighbours = training[comparison.neighbours[closest].numpy()]
        spread = np.linspace(0, len(unseen) - 1, min(SHOWN, len(unseen))).round().astype(int)
        picture = sheet(
            {
                "Samples": _grid(samples[:SHOWN]),
                "Real images, not trained on": _grid(unseen[spread]),
                "Closest samples, each beside its nearest training image": _grid(
                    np.stack([samples[closest], neighbours], axis=1).reshape(-1, *samples.shape[1:])
                ),
            }
        )
        write_files(output, {FILE: json.dumps(content, indent=2) + "\n", PICTURE: png(picture)})
        return comparison

    def _features(self, images: Pixels, what: str) -> torch.Tensor:
        """Pooled features (N, D) of images, or of the three middle planes of volumes."""
        features = features_of(images, self.extract, partial(self._on_count, f"features of {what}"))
        return features.middle if isinstance(features, SliceFeatures) else features.pooled


def read_samples(samples: Sequence[LabelledSample], source: ImageSource) -> Pixels:
    """Images of masks as a training reads them, (N, *S, C) uint8 on the model's grid; of volumes, the slices in use."""
    config = source.generator.config
    size, preprocessing = config.data.shape, build.image_preprocessing(config.preprocessing, config.data.shape)
    expected = CaseFormat(config.data.channels, len(source.generator.mask_classes))
    cases = [Case(one.name, one.image, one.label, one.mask.patient) for one in samples]
    return np.concatenate([read_labelled(case, expected, size, preprocessing)[0].numpy() for case in cases])


def _grid(images: Pixels) -> Pixels:
    return grid(as_pictures(to_unit(torch.from_numpy(np.array(images)).movedim(-1, 1))), columns=8)
