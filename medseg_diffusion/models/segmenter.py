"""Segmenters whose masks are sampled by a diffusion model, or predicted in one pass by the feed-forward baseline."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import cast

import torch

from medseg_diffusion import build
from medseg_diffusion.build import SHAPE_PRIOR, Segmenter
from medseg_diffusion.config.segmenter import SegmenterConfig
from medseg_diffusion.errors import UsageError, remarks
from medseg_diffusion.methods.ablation import Replacement, without_x_t
from medseg_diffusion.methods.calibration import Calibration, Sampling
from medseg_diffusion.methods.shape_prior import ShapePrior
from medseg_diffusion.methods.windows import Windows
from medseg_diffusion.tasks.jitter import Jitter
from medseg_diffusion.tasks.mask import FeedForward

from .classes import classes_of, tissues_of
from .doubts import stored_seen
from .ensemble_segmenter import EnsembleSegmenter
from .finder import Finder
from .inference import placed
from .passes import Pass
from .restore import ready, typed_config, usable
from .segmentation import NOT_FASTER, Aggregation, EnsembleOptions, stored_calibration
from .store import SavedModel, is_deterministic


class MaskSegmenter(EnsembleSegmenter):
    """A trained mask-diffusion model or feed-forward baseline (`SegmentationModel`).

    Args:
        saved: The model directory.
        device: Device of the computation.
        options: Options of the ensemble; None takes the model's defaults.
        compiled: Whether the network is compiled.

    Raises:
        ModelError: Not a segmenter of this version.
        UsageError: An unknown sampler, or sampling options for a feed-forward model.
    """

    def __init__(
        self,
        saved: SavedModel,
        device: torch.device,
        options: EnsembleOptions = EnsembleOptions(),
        compiled: bool = False,
    ) -> None:
        self.saved, self.device = saved, device
        self.seen = stored_seen(saved)
        self.model, self.config = restore_segmenter(saved)
        placed(self.model.to(device).network, device, self.config.training.channels_last, compiled)
        self.finder = finder_of(saved, self.config)
        self.inference = self.config.inference
        self.dims: int = self.config.network.dims
        self.channels, self.merge_labels = self.config.data.channels, self.config.data.merge_labels
        self.preprocessing = build.preprocessing(self.config.preprocessing)
        self.labels, groups = classes_of(saved.card), None
        if options.tissues:
            self.labels, groups = tissues_of(saved.card, saved.name)
        self.notes: list[str] = []
        default = 1 if options.fast else self.inference.ensemble
        self.ensemble = options.ensemble or default
        if not self.samples_masks and self.ensemble > 1:
            cast(FeedForward, self.model).jitter = self._jitter()
        self.samplers = build.samplers(self.config)
        self._check(options)
        self.sampler_name = (options.sampler or self.inference.sampler) if self.samplers else ""
        self.times = self._times(options.steps or (1 if options.fast else self.inference.steps))
        self.num_steps = len(self.times) - 1
        self.way = Pass(
            build.sampler(self.sampler_name or self.inference.sampler),
            self.times,
            Windows(self.inference.window, self.inference.overlap),
            self.dims,
            self.config.training.precision,
            groups=groups,
        )
        self.sampling = Sampling(self.sampler_name, self.num_steps, self.ensemble, options.fusion)
        largest_part = self.inference.largest_part if options.keep_largest is None else options.keep_largest
        self.aggregation = Aggregation(
            self.labels,
            options.fusion,
            options.uncertainty,
            largest_part,
            shape_prior(saved),
            self.inference.shape_prior_mm,
            self._calibration(self.sampling, largest_part, options.tissues),
        )

    @property
    def samples_masks(self) -> bool:
        return self.config.samples_masks

    def without_x_t(self, replacement: Replacement, seed: int = 0) -> AbstractContextManager[None]:
        if not self.samplers:
            raise ValueError(f"{self.saved.path}: takes no steps, so it has no x_t")
        return without_x_t(self.model.network, replacement, self.config.method == "categorical", seed)

    def _jitter(self) -> Jitter:
        """The changes that the training has made the network used to."""
        if self.config.data.source == "scans":
            section = self.config.augmentation
            return Jitter(tuple(section.flip_axes) if section.probability > 0 else ())
        values = {name: value for value, name in classes_of(self.saved.card).items()}
        opposite = {"left": "right", "right": "left"}
        other_side = list(range(len(values)))
        for name, value in values.items():
            side, _, rest = name.partition(" ")
            other_side[value] = values.get(f"{opposite.get(side, side)} {rest}", value)
        return Jitter((0,), torch.tensor(other_side))  # the grid of heads is RAS

    def _times(self, steps: int) -> list[int]:
        with remarks() as said:
            times = build.times(self.config, steps, self.sampler_name or None)
        self.notes += said
        return times

    def _check(self, options: EnsembleOptions) -> None:
        """UsageError for options that the model does not have; notes on what the others do not do."""
        if not self.samplers and (options.steps, options.sampler) != (None, None):
            kind = "samples in one step" if self.samples_masks else "is feed-forward"
            raise UsageError(f"{self.saved.path}: this model {kind}; leave --steps and --sampler out")
        if options.sampler in build.SAMPLERS and options.sampler not in self.samplers and self.samplers:
            raise UsageError(f"{self.saved.path}: {options.sampler} is no sampler of labels; use {self.samplers[0]}")
        usual = (self.inference.steps if self.samplers else 1, self.inference.ensemble)
        if options.fast and usual == (1, 1):
            self.notes.append(NOT_FASTER)
        if self.ensemble == 1:
            return
        if self.samples_masks and is_deterministic(self.saved.card):
            self.notes.append("this model is deterministic: its members are equal, whatever the ensemble size")
        if not self.samples_masks:
            self.notes.append("the masks are mirrored and jittered passes of a feed-forward model, not samples")

    def _calibration(self, sampling: Sampling, largest_part: bool, tissues: bool) -> Calibration | None:
        """The model's calibration, if it holds for these options."""
        calibration = stored_calibration(self.saved)
        if calibration is not None and tissues:
            what = "no intervals, no quality and no calibrated probabilities"
            self.notes.append(f"{what}: the model's calibration is for its structures, not for tissues")
            return None
        same_part = largest_part == self.inference.largest_part
        if calibration is None or (calibration.sampling == sampling and same_part):
            return calibration
        parts = "" if same_part else f", {'only the largest part' if self.inference.largest_part else 'all parts'}"
        self.notes.append(
            f"no intervals, no quality and no calibrated probabilities: the model's calibration is for "
            f"{calibration.sampling}{parts}"
        )
        return None


def restore_segmenter(saved: SavedModel) -> tuple[Segmenter, SegmenterConfig]:
    """Restore the mask-diffusion model or baseline of a model directory, on the CPU, and its configuration.

    Raises:
        ModelError: A card or weights that do not describe such a segmenter of this version.
    """
    config = typed_config(saved, SegmenterConfig)
    with usable(saved, SegmenterConfig):
        model = build.segmenter(config, len(saved.card["labels"]))
        return cast(Segmenter, ready(model, build.segmenter_weights(saved.weights))), config


def finder_of(saved: SavedModel, config: SegmenterConfig) -> Finder | None:
    """The finder of a model directory; None if it has none.

    Raises:
        ModelError: Weights that do not fit.
    """
    if config.finder is None:
        return None
    with usable(saved, SegmenterConfig):
        network = ready(cast(FeedForward, build.finder(config)), build.finder_weights(saved.weights))
    section = config.finder
    return Finder(cast(FeedForward, network), config.preprocessing.orientation, section.spacing_mm, section.margin_mm)


def shape_prior(saved: SavedModel) -> ShapePrior | None:
    """The shape prior of a model directory; None if it has none."""
    if SHAPE_PRIOR not in saved.weights:
        return None
    return ShapePrior(saved.weights[SHAPE_PRIOR].float() / 255, float(saved.card[SHAPE_PRIOR]["spacing_mm"]))
