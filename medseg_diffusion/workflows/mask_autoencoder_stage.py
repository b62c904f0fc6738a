"""The first stage of latent mask diffusion: an autoencoder of the training masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from medseg_diffusion.config.segmenter import SegmenterConfig
from medseg_diffusion.data.draws import Draws
from medseg_diffusion.metrics.overlap import label_overlap
from medseg_diffusion.models.card import versions
from medseg_diffusion.models.store import load_model_files, save_model
from medseg_diffusion.tasks.latent_mask import MaskAutoencoder
from medseg_diffusion.training.autoencoder import standardise
from medseg_diffusion.training.job import FIRST_STAGE_WARMUP, Job
from medseg_diffusion.training.runtime import Runtime
from medseg_diffusion.training.trainer import Callbacks

from .segmenter_data import SegmenterData

FOLDER = "autoencoder"
"""Folder of this stage in the run folder."""
STANDARDISE_CASES = 64
"""Number of training masks from which the mean and the standard deviation of mask latents are estimated."""


def train_mask_autoencoder(
    autoencoder: MaskAutoencoder, config: SegmenterConfig, data: SegmenterData, job: Job, runtime: Runtime
) -> dict[str, float]:
    """Train the autoencoder in the run folder of ``job`` and return its ceiling.

    The ceiling is the Dice of the validation masks against their reconstructions, per class. A segmenter that uses this
    autoencoder cannot be expected to do better.
    """
    autoencoder.requires_grad_(True)
    dims = config.network.dims

    def validate(averaged: nn.Module) -> dict[str, float]:
        return _ceiling(cast(MaskAutoencoder, averaged), data, dims, runtime, job.on_prepare)

    def save(averaged: nn.Module, step: int, numbers: Mapping[str, float]) -> None:
        averaged_autoencoder = cast(MaskAutoencoder, averaged)
        _standardise(averaged_autoencoder, data, job, runtime)
        card = {
            "task": "mask autoencoder",
            "config": config.model_dump(mode="json"),
            "training": {"seed": job.seed, "step": step},
            "metrics": {"validation": dict(numbers)},
            "versions": versions(),
        }
        save_model(job.model, card, averaged_autoencoder.state_dict(), "# Mask autoencoder\n")

    section = config.mask_autoencoder
    changed = config.training.model_copy(
        update={
            "max_steps": section.max_steps,
            "learning_rate": section.learning_rate,
            "warmup_steps": FIRST_STAGE_WARMUP,
        }
    )
    job.fit(autoencoder, data.examples, changed, Callbacks(validate, save, job.step_done), runtime)
    saved = load_model_files(job.model)
    autoencoder.load_state_dict(saved.weights)
    autoencoder.requires_grad_(False)
    return {name: float(value) for name, value in saved.card["metrics"]["validation"].items() if name != "score"}


def _ceiling(
    autoencoder: MaskAutoencoder,
    data: SegmenterData,
    dims: int,
    runtime: Runtime,
    on_prepare: Callable[[str, int, int], None],
) -> dict[str, float]:
    """Dice of the validation masks against their reconstructions, by class name, and their mean as "score"."""
    dice: dict[int, list[float]] = {label: [] for label in data.labels if label}
    for done, case in enumerate(data.validation):
        on_prepare("validation: mask", done, len(data.validation))
        masks = _as_batches(case.label, dims)
        reconstructions = [_reconstructed(autoencoder, mask, runtime) for mask in masks]
        overlap = label_overlap(torch.cat(reconstructions).numpy(), torch.cat(list(masks)).numpy(), dice)
        for label, values in dice.items():
            values.append(overlap[label].dice)
    means = {label: float(torch.tensor(values).nanmean()) for label, values in dice.items()}
    defined = {data.labels[label]: mean for label, mean in means.items() if mean == mean}
    return {"score": sum(defined.values()) / max(1, len(defined)), **defined}


@torch.no_grad()
def _reconstructed(autoencoder: MaskAutoencoder, masks: Tensor, runtime: Runtime) -> Tensor:
    """Reconstructed masks (B, *S)."""
    labels = masks.long().to(runtime.device)
    return autoencoder.decode(autoencoder.encode(labels), labels.shape[1:]).argmax(1).cpu()


def _standardise(autoencoder: MaskAutoencoder, data: SegmenterData, job: Job, runtime: Runtime) -> None:
    draws = Draws(data.examples, job.seed)
    size = min(len(data.examples), STANDARDISE_CASES)

    def channels() -> Iterator[Tensor]:
        for i in range(size):
            job.on_prepare("statistics of latents: mask", i, size)
            batch = runtime.to_device({name: value[None] for name, value in draws[i].items()})
            yield autoencoder.channels_of(draws.finish(batch, runtime.device)["label"])

    standardise(autoencoder.codec, channels())


def _as_batches(label: Tensor, dims: int) -> Sequence[Tensor]:
    """Split a case's labels (I, J, K) into batches: the volume, or all slices across the third axis."""
    return [label[None]] if dims == 3 else [label.movedim(-1, 0)]
