"""Trained models in memory: segmenters, generators, anomaly detectors and networks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, cast, get_args

import numpy.typing as npt
import torch
from torch import Tensor, nn

from medseg_diffusion.data.healthy import require_volume
from medseg_diffusion.device import choose_device, tune
from medseg_diffusion.diffusion.denoiser import NetworkDenoiser
from medseg_diffusion.diffusion.noise import derive_seed
from medseg_diffusion.errors import InputError, ModelError, UsageError, remarks
from medseg_diffusion.methods.ensemble import Fusion, Uncertainty
from medseg_diffusion.models.anomaly import AnomalyModel, DetectionOptions
from medseg_diffusion.models.anomaly_map import mask_of
from medseg_diffusion.models.classes import chosen_classes
from medseg_diffusion.models.image_source import ImageSource, SampleOptions
from medseg_diffusion.models.imported import restore_network
from medseg_diffusion.models.load import load_segmenter
from medseg_diffusion.models.placed_mask import place_mask
from medseg_diffusion.models.segmentation import Map, SegmentationModel
from medseg_diffusion.models.store import SavedModel, load_model_files
from medseg_diffusion.networks.noisy_classifier import NoisyClassifier
from medseg_diffusion.training.progress import OnProgress, silent
from medseg_diffusion.volumes.modality import ModelInput
from medseg_diffusion.workflows.anomaly import chosen_threshold
from medseg_diffusion.workflows.finished import doubts_about
from medseg_diffusion.workflows.segment import require_fitting

from .results import Samples, ScoredMap, ScoredScan, SegmentedMap, SegmentedScan
from .scans import Image, Scan, has_geometry, read_mask, read_scan

_USES = {
    "segment": "a segmenter",
    "sample": "a generator",
    "anomaly": "an anomaly model",
    "network": "a denoiser, noisy classifier or autoencoder",
}
"""What models can do, and the kind that does it."""


class WrongModelKind(UsageError, AttributeError):
    """A model was asked for what models of another kind do."""


class Model:
    """A trained model in memory, as `load_model` returns it.

    Attributes:
        name: Name of the model's folder, or of the run that it was trained in.
        path: The model directory.
        card: The content of model.json.
    """

    _kind: str
    _use: str

    def __init__(self, saved: SavedModel) -> None:
        self.name: str = saved.name
        self.path: Path = saved.path
        self.card: dict[str, Any] = saved.card
        self._reason = ""

    def __getattr__(self, name: str) -> Any:
        if name in _USES:
            own = vars(self)  # not getattr: a copy that is being made has nothing yet
            reason = own.get("_reason") or f".{name} is for {_USES[name]}"
            raise WrongModelKind(f"{own.get('name')} is {self._kind}, which has .{self._use}; {reason}")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}: {self.card.get('method')}>"


class Segmenter(Model):
    """A segmenter: a mask-diffusion model, its feed-forward baseline, or pixel classifiers on a generator.

    Attributes:
        classes: Label -> name of the class, background 0 included; of the tissues, if these were asked for.
        channels: Names of the channels of its scans, in their order.
    """

    _kind, _use = "a segmenter", "segment(scan)"

    def __init__(self, model: SegmentationModel) -> None:
        super().__init__(model.saved)
        self.classes: dict[int, str] = dict(model.labels)
        self.channels: tuple[str, ...] = ModelInput.of(self.name, self.card).channels
        self._model = model

    def segment(
        self,
        scan: Scan,
        *,
        spacing_mm: Sequence[float] | None = None,
        affine: npt.ArrayLike | None = None,
        labels: str | Sequence[str | int] | None = None,
        maps: Collection[SegmentedMap] = (),
        seed: int = 0,
        on_progress: OnProgress = silent,
    ) -> SegmentedScan:
        """Segment a scan. The same voxels and seed give the same mask, in whatever form the scan is given.

        Args:
            scan: A file, the folder of a DICOM series, a `Volume`, an image of nibabel, or an array with its voxel
                size: (I, J, K), or (I, J, K, C) of C channels. A model of several channels also takes a list of images,
                one for each channel in the order of `channels`, or a mapping from their names.
            spacing_mm: Voxel size of an array along its axes, in mm. They point to the patient's right, front and top.
            affine: Voxel indices of an array -> RAS millimetres, (4, 4), instead of ``spacing_mm``.
            labels: Names or values of the classes that the result tells of, such as "hippocampus,thalamus"; a name
                without its side selects both. None takes all. Values stay those of the model, and every voxel has the
                class that it has without a choice. Uncertainty, mutual information, disagreement and quality are those
                of the whole segmentation.
            maps: What is made beside the labels: "probabilities", "uncertainty", "members", "mutual-information".
                Large scans of many classes have large maps.
            seed: Seed of all randomness. `segment` derives one from its own seed and the scan's name instead.
            on_progress: Called with a text and the share done, 0 to 1.

        Raises:
            InputError: An unusable scan, or one that the model does not take: other channels, a single slice for a
                model of volumes, an array without a voxel size.
            UsageError: A folder of several scans, a voxel size for a scan that has its own, an unknown map, or a class
                that the model does not have.
        """
        model = self._model
        chosen = None if labels is None else chosen_classes(self.classes, labels, self.name)
        if unknown := [name for name in maps if name not in get_args(SegmentedMap)]:
            raise UsageError(f"maps: {unknown[0]!r} is unknown; there are {', '.join(get_args(SegmentedMap))}")
        on_grid: list[Map] = [name for name in maps if name != "members"]
        with remarks() as said:
            volume = read_scan(scan, ModelInput.of(self.name, self.card), spacing_mm, affine)
            require_fitting(volume, model)
            volume = volume.described(model.saved.signature)
            segmentation = model.segment(
                volume, seed, lambda share: on_progress(f"segmenting with {self.name}", share), on_grid, chosen
            )
        made: dict[SegmentedMap, Tensor | None] = {
            "probabilities": segmentation.probabilities,
            "uncertainty": segmentation.uncertainty,
            "mutual-information": segmentation.mutual_information,
            "members": model.aggregation.members_on_scan(segmentation) if "members" in maps else None,
        }
        return SegmentedScan(
            scan=volume,
            labels=segmentation.labels.numpy(),
            classes={0: self.classes.get(0, "background"), **segmentation.classes},
            volumes_ml=segmentation.volumes_ml,
            maps={name: data.numpy() for name, data in made.items() if data is not None},
            members_ml=segmentation.members_ml,
            intervals_ml=segmentation.intervals_ml,
            level=segmentation.level,
            agreement=segmentation.agreement,
            disagreement=segmentation.disagreement,
            quality=segmentation.quality,
            unlike_training=segmentation.unlike_training,
            warnings=(
                *said,
                *model.notes,
                *doubts_about(
                    segmentation.volumes_ml, segmentation.members_ml, segmentation.quality, segmentation.unlike_training
                ).values(),
            ),
        )


class AnomalyDetector(Model):
    """An anomaly model: it scores how unlike healthy scans every voxel of a scan is."""

    _kind, _use = "an anomaly model", "anomaly(scan)"

    def __init__(self, model: AnomalyModel) -> None:
        super().__init__(model.saved)
        self._model = model

    def anomaly(
        self,
        scan: Scan,
        *,
        spacing_mm: Sequence[float] | None = None,
        affine: npt.ArrayLike | None = None,
        threshold: str | float = "auto",
        counterpart: bool = False,
        seed: int = 0,
        on_progress: OnProgress = silent,
    ) -> ScoredScan:
        """Score a scan, and find what is above a threshold. The same voxels and seed give the same map.

        Args:
            scan: A scan of one channel: a file, the folder of a DICOM series, a `Volume`, an image of nibabel, or an
                array (I, J, K) with its voxel size.
            spacing_mm: Voxel size of an array along its axes, in mm. They point to the patient's right, front and top.
            affine: Voxel indices of an array -> RAS millimetres, (4, 4), instead of ``spacing_mm``.
            threshold: "auto" (the calibrated one), "q0.99" (another quantile of healthy scans) or a number.
            counterpart: Keep the healthy counterpart that the method produces.
            seed: Seed of all randomness. `anomaly` derives one from its own seed and the scan's name instead.
            on_progress: Called with a text and the share done, 0 to 1.

        Raises:
            InputError: An unusable scan: a picture, several channels, no foreground, an array without a voxel size.
            UsageError: A folder of several scans, or a bad threshold.
            ModelError: "auto" or a quantile for a model without calibration.
        """
        model = self._model
        limit = chosen_threshold(str(threshold), model)  # a missing calibration is an error before the computation
        with remarks() as said:
            volume = read_scan(scan, ModelInput.of(self.name, self.card), spacing_mm, affine)
            if volume.source is not None:
                require_volume(volume.source)
            if len(volume.data) != 1:
                raise InputError(volume.source, f"{len(volume.data)} channels", "one", "extract the one to be scored")
            volume = volume.described(model.saved.signature)
            scored = model.score(
                volume, seed, lambda share: on_progress(f"scoring with {self.name}", share), counterpart
            )
        made: dict[ScoredMap, npt.NDArray[Any]] = {
            "score": scored.score.numpy(),
            "foreground": scored.foreground.numpy(),
        }
        if scored.counterpart is not None:
            made["counterpart"] = scored.counterpart.numpy()
        mask = mask_of(scored, limit, volume.voxel_mm3, model.config.postprocessing.min_volume_mm3)
        return ScoredScan(
            scan=volume,
            maps={**made, "mask": mask.numpy()},
            threshold=limit,
            volume_ml=float(mask.sum()) * volume.voxel_mm3 / 1000,
            scan_score=scored.scan_score,
            healthy_percentile=model.percentile(scored),
            unlike_training=scored.unlike_training,
            warnings=(*said, *model.notes, *([scored.unlike_training] if scored.unlike_training else [])),
        )


class Network(Model):
    """The network of a denoiser, noisy classifier or autoencoder, such as one imported with `import_model`.

    Attributes:
        module: The network with what belongs to it, in evaluation mode: of a denoiser its schedule and target.
    """

    _kind, _use = "a network", "network(x, timesteps)"

    def __init__(self, saved: SavedModel, module: nn.Module, reason: str = "") -> None:
        super().__init__(saved)
        self.module: nn.Module = module
        self._reason = reason

    def network(
        self, x: Tensor, timesteps: Tensor, class_labels: Tensor | None = None, context: Tensor | None = None
    ) -> Tensor:
        """The raw output of the network, with the arguments of the original code.

        Args:
            x: Noisy images (B, in_channels, *S), a concatenated condition included.
            timesteps: (B,), counted from 0.
            class_labels: (B,), for a network that is conditioned by classes.
            context: (B, L, D), for a network with cross-attention.

        Returns:
            (B, out_channels, *S), the channels of a learned variance included; (B, classes) of a noisy classifier.

        Raises:
            UsageError: An autoencoder, which has no timesteps.
        """
        if isinstance(self.module, NoisyClassifier):
            return cast(Tensor, self.module(x, timesteps))
        if not isinstance(self.module, NetworkDenoiser):
            raise UsageError(f"{self.path}: an autoencoder has no timesteps; use module.encode and module.decode")
        conditions = {"label": class_labels, "context": context}
        cond = {name: value for name, value in conditions.items() if value is not None}
        return cast(Tensor, self.module.network(x, timesteps, cond))


class Generator(Network):
    """A generator of images: trained here, or an imported one whose size of images is known.

    Attributes:
        module: The denoiser, in evaluation mode.
        classes: Names of the classes of its images; empty without classes.
        mask_classes: Label value -> class name of the masks that it is conditioned by; empty for other generators.
        shape: Size of its images, (H, W) or (I, J, K), after an upsampler.
    """

    _kind, _use = "a generator", "sample(n)"

    def __init__(self, source: ImageSource) -> None:
        super().__init__(source.saved, source.generator.task.denoiser)
        self.classes: tuple[str, ...] = source.generator.classes
        self.mask_classes: dict[int, str] = dict(source.generator.mask_classes)
        self.shape: tuple[int, ...] = tuple(source.last.config.data.shape)
        self._source = source

    # many: one keyword for each option of the sampling
    def sample(
        self,
        n: int = 16,
        *,
        masks: Sequence[Image] | None = None,
        spacing_mm: Sequence[float] | None = None,
        label: int | str | None = None,
        steps: int | None = None,
        sampler: str | None = None,
        guidance: float = 1.0,
        classifier_scale: float = 1.0,
        clip_first: bool = False,
        batch_size: int = 16,
        seed: int = 0,
        on_progress: OnProgress = silent,
    ) -> Samples:
        """Draw images. Image i is the same for any ``n`` and ``batch_size``, up to rounding.

        Args:
            n: Number of images; with ``masks``, of each mask.
            masks: Label maps that the images obey, for a generator that is conditioned by masks: files, volumes, images
                of nibabel, or arrays. A model of slices draws each slice of a volume. All first images come before all
                second ones, on the grid of the model; `sample` writes them on that of the label map.
            spacing_mm: Voxel size of label maps that are arrays.
            label: Class of all images, by number or name; None cycles through the classes.
            steps: Steps of the sampler; None takes the model's default.
            sampler: "ddpm", "ddim", "dpm++", "euler" or "heun"; None takes the model's default.
            guidance: Strength of classifier-free guidance; 1 for none.
            classifier_scale: Strength of the guidance by the classifier that was given to `load_model`.
            clip_first: Clip predicted pixels before the classifier's gradient, as guided diffusion does.
            batch_size: Images that are drawn together.
            seed: Seed of all randomness; the same images as `sample` writes with this seed.
            on_progress: Called with a text and the share done, 0 to 1.

        Raises:
            UsageError: Options that do not fit the model, or a class that it does not have.
            InputError: Label maps that do not fit the model.
        """
        source = self._source.with_options(
            SampleOptions(
                n, sampler, steps, self._label(label), guidance,
                classifier_scale=classifier_scale, clip_first=clip_first, batch_size=batch_size, seed=seed,
            ),
            masked=masks is not None,
        )  # fmt: skip
        placed = None if masks is None else self._placed(masks, n, spacing_mm)
        drawn, numbers = [], range(n if placed is None else len(placed))
        for first in range(0, len(numbers), batch_size):
            part = numbers[first : first + batch_size]
            if placed is None:
                drawn.append(source.draw(part))
            else:
                seeds = [derive_seed(seed, "mask", number) for number in part]
                drawn.append(source.draw_masks(placed[first : first + batch_size], seeds))
            done = first + len(part)
            on_progress(f"drawing with {self.name}: {done} of {len(numbers)}", done / len(numbers))
        spacing = source.last.config.preprocessing.spacing_mm or (1.0, 1.0, 1.0)
        return Samples(
            torch.cat(drawn).numpy(),
            tuple(self.classes[label] for label in source.labels(numbers).tolist()) if self.classes else (),
            spacing if len(self.shape) == 3 else None,
            None if placed is None else placed.to(torch.uint8).numpy(),
        )

    def _placed(self, masks: Sequence[Image], count: int, spacing_mm: Sequence[float] | None) -> Tensor:
        """The label maps on the model's grid, (N, *S), all of them ``count`` times."""
        if isinstance(masks, str | Path) or not isinstance(masks, Sequence) or not masks:
            raise UsageError('masks: expected a list of label maps, such as ["mask.nii.gz"]')
        volumes = [read_mask(mask, None if has_geometry(mask) else spacing_mm) for mask in masks]
        labels = [place_mask(volume, self._source.generator).labels for volume in volumes]
        return torch.cat(labels * count)

    def _label(self, label: int | str | None) -> int | None:
        if not isinstance(label, str):
            return label
        if label not in self.classes:
            raise UsageError(f"{self.path}: no class {label!r}; it has {', '.join(self.classes) or 'no classes'}")
        return self.classes.index(label)


_OPTIONS = {
    Segmenter: (
        "ensemble", "steps", "sampler", "fusion", "uncertainty", "keep_largest", "fast", "max_memory", "compile",
        "tissues",
    ),
    AnomalyDetector: ("method", "latent_quantile", "median", "erosion", "min_volume_mm3", "compile"),
    Generator: ("upsampler", "classifier", "compile"),
    Network: (),
}  # fmt: skip
"""The options of `load_model` that each kind of model has."""


# many: one keyword for each option of any kind of model
def load_model(
    name_or_path: str | Path,
    device: str = "auto",
    *,
    ensemble: int | None = None,
    steps: int | None = None,
    sampler: str | None = None,
    fusion: Fusion | None = None,
    uncertainty: Uncertainty | None = None,
    keep_largest: bool | None = None,
    fast: bool = False,
    max_memory: float | None = None,
    tissues: bool = False,
    method: str | None = None,
    latent_quantile: float | None = None,
    median: int | None = None,
    erosion: int | None = None,
    min_volume_mm3: float | None = None,
    upsampler: str | Path | None = None,
    classifier: str | Path | None = None,
    compile: bool = False,
) -> Segmenter | AnomalyDetector | Generator | Network:
    """Load any model, once for many scans or images. What it is decides what it can do.

    A segmenter has ``.segment(scan)``, an anomaly model ``.anomaly(scan)``, a generator ``.sample(n)``, and another
    network, such as an autoencoder, ``.network(x, timesteps)``. Every model has ``name``, ``path`` and ``card``.

    Args:
        name_or_path: Name of an installed model (`list_models`), model folder, or run folder of a training.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        ensemble: Segmenter: masks per scan, which are samples, or of a feed-forward model mirrored and jittered passes;
            None takes the model's default, as in all that follows.
        steps: Segmenter: steps of the sampler. A generator takes them in ``.sample``.
        sampler: Segmenter: "ddpm", "ddim", "dpm++", "euler" or "heun". A generator takes it in ``.sample``.
        fusion: Segmenter: how masks become one, "mean", "majority" or "staple".
        uncertainty: Segmenter: kind of the uncertainty map, "entropy", "mutual-information" or "variance".
        keep_largest: Segmenter: keep only the largest connected part of the foreground.
        fast: Segmenter: one step and one mask, as far as the model has both.
        max_memory: Segmenter: most memory of the process in GB, by an estimate; None for no limit.
        tissues: Segmenter: tissues instead of its classes, if its card groups them; their probabilities are sums.
        method: Anomaly model: one of its detectors.
        latent_quantile: Anomaly model: share of healthy latent positions that "latent-healing" leaves as they are.
        median: Anomaly model: side of the median filter, in voxels of the model's grid.
        erosion: Anomaly model: erosion of the foreground, in voxels of the model's grid.
        min_volume_mm3: Anomaly model: smallest volume of a connected part of the mask.
        upsampler: Generator: model that enlarges its images.
        classifier: Generator: noisy classifier that guides the sampling.
        compile: Compile the network; results differ by rounding.

    Raises:
        ModelError: A model that is missing, damaged or of another version.
        UsageError: An unknown device or sampler, or an option that this kind of model does not have.
    """
    options: dict[str, Any] = {
        "ensemble": ensemble, "steps": steps, "sampler": sampler, "fusion": fusion, "uncertainty": uncertainty,
        "keep_largest": keep_largest, "fast": fast or None, "max_memory": max_memory, "method": method,
        "latent_quantile": latent_quantile, "median": median, "erosion": erosion, "min_volume_mm3": min_volume_mm3,
        "upsampler": upsampler, "classifier": classifier, "compile": compile or None, "tissues": tissues or None,
    }  # fmt: skip
    given = {name: value for name, value in options.items() if value is not None}
    saved = load_model_files(name_or_path)
    kind = _kind_of(saved)
    if wrong := [name for name in given if name not in _OPTIONS[kind]]:
        known = ", ".join(_OPTIONS[kind]) or "no options"
        raise UsageError(f"{saved.path}: {kind._kind}, which load_model gives {known}; leave {', '.join(wrong)} out")
    if kind is Segmenter:
        return Segmenter(load_segmenter(saved, device, **given))
    if kind is AnomalyDetector:
        detection = {name: value for name, value in given.items() if name != "compile"}
        return AnomalyDetector(AnomalyModel(saved, DetectionOptions(**detection), device, compile))
    if kind is Generator:
        others = [None if model is None else str(model) for model in (upsampler, classifier)]
        sampling = SampleOptions(upsampler=others[0], classifier=others[1], device=device, compile=compile)
        try:
            return Generator(ImageSource(saved, sampling, masked=None))
        except (UsageError, ModelError) as error:  # it cannot be sampled, but its network can be used
            if given:
                raise
            reason = str(error).removeprefix(f"{saved.path}: ")
    else:
        reason = ""
    chosen = choose_device(device)
    tune(chosen)
    return Network(saved, restore_network(saved).to(chosen), reason)


def _kind_of(saved: SavedModel) -> type[Segmenter | AnomalyDetector | Generator | Network]:
    task = saved.card.get("task", "mask")
    if task in ("mask", "anomaly"):
        return Segmenter if task == "mask" else AnomalyDetector
    return Generator if task in ("image", "denoiser") else Network
