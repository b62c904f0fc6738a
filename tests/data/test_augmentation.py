"""Where the changes of training examples are computed does not change them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from medseg_diffusion.config.segmenter import SegmenterConfig
from medseg_diffusion.data.augmentation import Augmentation, Augmenter
from medseg_diffusion.data.draws import Draws
from medseg_diffusion.data.mask_examples import MaskExamples
from medseg_diffusion.training.batches import Batches
from medseg_diffusion.training.runtime import Runtime
from medseg_diffusion.workflows.segmenter_data import segmenter_data
from tests.helpers import training


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scans")
    training.write_scans(folder)
    return folder


def changing(config: SegmenterConfig, **more: object) -> SegmenterConfig:
    return SegmenterConfig.model_validate({**config.model_dump(), "augmentation": {"probability": 0.9, **more}})


def examples_of(data: Path, cache: Path, config: SegmenterConfig, on_gpu: bool) -> MaskExamples:
    examples = segmenter_data(config, data, cache, lambda done, total: None, on_gpu).examples
    assert isinstance(examples, MaskExamples)
    return examples


def test_batches_of_volumes_are_changed_as_their_examples_would_be(data: Path, tmp_path: Path) -> None:
    config = changing(training.config(), flip_axes=[0])
    now = examples_of(data, tmp_path / "cache", config, on_gpu=False)
    later = examples_of(data, tmp_path / "cache", config, on_gpu=True)
    untouched = MaskExamples(now.cases, now.window, now.foreground_share)
    runtime = Runtime("cpu", "fp32")
    steps = [Batches(Draws(part, seed=3), 2, 0, 4, 0, runtime) for part in (now, later, untouched)]
    changed = 0
    for _ in range(4):
        first, second, plain = (next(batches) for batches in steps)
        assert list(first) == list(second)
        assert all(torch.equal(first[name], second[name]) for name in first)
        changed += not torch.equal(first["image"], plain["image"])
    assert changed == 4
    for batches in steps:
        batches.close()


def test_slices_are_changed_by_the_workers(data: Path, tmp_path: Path) -> None:
    config = changing(training.config())
    flat = config.model_dump(mode="json")
    flat["network"]["dims"], flat["data"]["window"] = 2, flat["data"]["window"][:2]
    assert examples_of(data, tmp_path / "3d", config, on_gpu=True).augment_batches
    assert not examples_of(data, tmp_path / "2d", SegmenterConfig.model_validate(flat), on_gpu=True).augment_batches


@pytest.mark.cuda
def test_a_gpu_makes_the_same_changes() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    grid = np.indices((24, 24, 24)).sum(0) / 36 - 1
    image, label = torch.tensor(grid, dtype=torch.float32)[None], torch.tensor(grid > 0).long()
    augmenter = Augmenter(Augmentation(probability=0.9, flip_axes=(0,)), dims=3)
    for seed in range(8):
        here, there = augmenter.changed(image, label, seed), augmenter.changed(image.cuda(), label.cuda(), seed)
        assert there[0].is_cuda and torch.allclose(here[0], there[0].cpu(), atol=1e-4)
        assert (here[1] != there[1].cpu()).float().mean() < 1e-3  # ties of the nearest voxel
