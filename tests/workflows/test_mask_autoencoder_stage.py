"""Latent mask diffusion trains its autoencoder of masks first."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch

from medseg_diffusion import build
from medseg_diffusion.config.segmenter import SegmenterConfig
from medseg_diffusion.data.brain_classes import TISSUES
from medseg_diffusion.data.label_maps import LABELS, LabelMap
from medseg_diffusion.data.synthetic_brains import SyntheticBrains
from medseg_diffusion.models.segmenter import restore_segmenter
from medseg_diffusion.models.store import load_model_files
from medseg_diffusion.training.runtime import Runtime
from medseg_diffusion.workflows.mask_autoencoder_stage import _standardise
from medseg_diffusion.workflows.segmenter_data import SegmenterData, segmenter_data
from medseg_diffusion.workflows.train_segmenter import train_segmenter
from tests.helpers.training import assert_same, latent_config, resume_file


def test_latent_mask_diffusion_trains_its_autoencoder_first_and_states_its_ceiling(
    block_scans: Path, tmp_path: Path
) -> None:
    settings = latent_config()
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_segmenter(settings, block_scans, whole, device="cpu")
    saved = load_model_files(whole)
    ceiling = saved.card["metrics"]["autoencoder's ceiling"]
    assert set(ceiling) == {"block"} and 0 <= ceiling["block"] <= 1
    first = load_model_files(whole / "autoencoder")
    for name, value in first.weights.items():
        torch.testing.assert_close(saved.weights[f"autoencoder.{name}"], value, rtol=0, atol=0)
    assert not torch.equal(first.weights["codec.scale"], torch.ones(2)), "latents are standardised"
    train_segmenter(settings, block_scans, parts, device="cpu", max_steps=2)
    assert resume_file(parts / "autoencoder")["state"]["step"] == 6 and resume_file(parts)["state"]["step"] == 2
    train_segmenter(settings, block_scans, parts, device="cpu", resume=True)
    assert_same(resume_file(parts / "autoencoder"), resume_file(whole / "autoencoder"))
    assert_same(resume_file(parts), resume_file(whole))
    late = tmp_path / "late"
    assert (
        train_segmenter(settings, block_scans, late, device="cpu", time_limit_min=0) == late / "autoencoder" / "model"
    )
    assert not (late / "model").exists(), "nothing is built on an autoencoder that is not trained"
    train_segmenter(settings, block_scans, late, device="cpu", resume=True)
    again = load_model_files(late).weights
    for name, value in load_model_files(late / "autoencoder").weights.items():
        torch.testing.assert_close(again[f"autoencoder.{name}"], value, rtol=0, atol=0)
    model, _ = restore_segmenter(saved)
    image = torch.rand(1, 1, 9, 8, 7)
    sampled = model.probabilities(image, [[1, 2]], build.sampler("ddim"), [1000, 500, 0])
    assert sampled.shape == (1, 2, 2, 9, 8, 7)
    torch.testing.assert_close(sampled.sum(2), torch.ones(1, 2, 9, 8, 7))


def test_examples_that_are_finished_on_the_device_give_the_same_statistics(block_scans: Path, tmp_path: Path) -> None:
    content = latent_config().model_dump(mode="json")
    config = SegmenterConfig.model_validate({**content, "augmentation": {"probability": 0.9, "flip_axes": [0]}})
    job = SimpleNamespace(seed=0, on_prepare=lambda text, done, total: None)
    scales = []
    for on_gpu in (False, True):
        data = segmenter_data(config, block_scans, tmp_path / "cache", lambda done, total: None, on_gpu)
        torch.manual_seed(0)
        autoencoder = build.segmenter(config, 2).autoencoder.eval()
        _standardise(autoencoder, data, job, Runtime("cpu", "fp32"))  # type: ignore[arg-type]
        scales.append(autoencoder.codec.scale)
    assert torch.equal(*scales) and not torch.equal(scales[0], torch.ones(2))
    index = torch.full((16, 16, 16), LABELS.index(2), dtype=torch.uint8)
    anatomy = LabelMap("white", index, torch.tensor([[8, 8, 8]], dtype=torch.int32))
    brains = SyntheticBrains([anatomy], (8, 8, 8), in_batches=True)
    data = SegmenterData(brains, [], dict(enumerate(TISSUES.names)), ("T1",), {}, data.split, data.measure)
    autoencoder = build.segmenter(config, 4).autoencoder.eval()
    _standardise(autoencoder, data, job, Runtime("cpu", "fp32"))  # type: ignore[arg-type]
    assert autoencoder.codec.scale.isfinite().all()
