"""Every name and preset of a configuration is built, takes a training step and can learn."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from medseg_cli._options import Sampler
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from medseg_diffusion import build
from medseg_diffusion.config.generator import GeneratorConfig, GeneratorSamplingSection, ImageAutoencoderConfig
from medseg_diffusion.config.load import load_config, load_segmenter_config, parse_config
from medseg_diffusion.config.segmenter import SegmenterConfig
from medseg_diffusion.config.shared import InferenceSection, ScheduleSection
from medseg_diffusion.diffusion.noise import LogitNormalTimes
from medseg_diffusion.errors import UsageError
from medseg_diffusion.methods.ablation import without_x_t
from medseg_diffusion.metrics.overlap import label_overlap
from medseg_diffusion.networks.unet import UNet
from medseg_diffusion.tasks.categorical_mask import CategoricalMaskDiffusion
from medseg_diffusion.tasks.latent_mask import LatentMaskDiffusion
from medseg_diffusion.tasks.mask import MaskDiffusion
from medseg_diffusion.training.autoencoder import standardise
from medseg_diffusion.training.job import training_options
from tests.helpers.configs import MINIMAL, SEGMENTERS
from tests.helpers.samplers import predict_once

FULL = {
    # Millions of parameters. Ho et al. (2020) state 114 for their 256 x 256 network, which is EnsemDiff's; the authors
    # of SegDiff, MedSegDiff and MedSegDiff-V2 state none.
    "baseline-brats": 113.672,
    "ensemdiff-brats": 113.674,
    "segdiff-monuseg": 164.155,
    "medsegdiff-isic": 141.282,
    "medsegdiff-v2-isic": 257.031,
}


def test_every_full_preset_is_counted() -> None:
    assert {name for name in SEGMENTERS if not name.endswith("-small")} == set(FULL)


@pytest.mark.parametrize("name", FULL)
def test_a_full_preset_has_its_size(name) -> None:
    """Built without memory, so a change of any width or depth shows."""
    config = load_segmenter_config(name)
    assert config.network.checkpointing
    with torch.device("meta"):
        model = build.segmenter(config, 1 + len(config.data.labels))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(FULL[name], abs=2e-3)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in FULL else []) for name in SEGMENTERS]
)
def test_a_preset_loads_builds_and_takes_a_step(name) -> None:
    config = load_segmenter_config(name)
    assert config.description
    model = build.segmenter(config, 1 + (len(config.data.labels) or 3))
    assert sum(p.numel() for p in model.parameters()) > 1000
    build.preprocessing(config.preprocessing)
    build.augmentation(config.augmentation)
    training_options(config.training)
    build.sampler(config.inference.sampler)
    build.noise_schedule(config.diffusion.schedule)
    window = [64 if name in FULL else 8] * config.network.dims
    batch = {
        "image": torch.randn(1, config.data.channels, *window),
        "label": torch.zeros(1, *window, dtype=torch.int64),
        "seed": torch.tensor([0]),
    }
    loss = model(batch)
    loss.backward()
    assert bool(loss.isfinite())


@pytest.mark.slow
@pytest.mark.parametrize(("channels", "window"), [(3, [256, 256]), (4, [32, 32, 32])], ids=["photograph", "MRI"])
@pytest.mark.parametrize("name", [name for name in SEGMENTERS if name not in FULL])
def test_a_small_preset_takes_a_step_on_data_of_another_kind(name, channels, window) -> None:
    """RGB photographs of 256 x 256 and volumes of four contrasts, also where the preset is for something else."""
    content = load_segmenter_config(name).model_dump(mode="json")
    content["network"]["dims"] = len(window)
    content["augmentation"]["flip_axes"] = []
    content["data"] |= {"source": "scans", "labels": ["lesion"], "channels": channels, "window": window}
    content["inference"]["window"] = content["preprocessing"]["crop_centre"] = None
    config = parse_config(content, name)
    assert isinstance(config, SegmenterConfig)
    model = build.segmenter(config, 2)
    batch = {
        "image": torch.rand(1, channels, *window, generator=torch.Generator().manual_seed(0)),
        "label": torch.zeros(1, *window, dtype=torch.int64),
        "seed": torch.tensor([0]),
    }
    batch["label"][0, 5:20, 5:20] = 1
    loss = model(batch)
    loss.backward()
    assert bool(loss.isfinite())
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(bool(g.isfinite().all()) for g in gradients) and any(bool(g.any()) for g in gradients)


def test_every_name_that_a_configuration_may_use_is_built() -> None:
    base = parse_config(MINIMAL, "here").model_dump()
    assert set(build.SCHEDULES) == set(get_args(ScheduleSection.model_fields["name"].annotation))
    for name in build.SCHEDULES:
        changed = {**base, "diffusion": {"schedule": {"name": name, "num_steps": 50}}}
        assert build.noise_schedule(parse_config(changed, name).diffusion.schedule).num_steps == 50
    assert set(build.SAMPLERS) == set(get_args(InferenceSection.model_fields["sampler"].annotation))
    assert set(build.SAMPLERS) == set(get_args(GeneratorSamplingSection.model_fields["sampler"].annotation))
    assert set(build.SAMPLERS) == {str(name) for name in Sampler}
    for name in build.SAMPLERS:
        assert build.sampler(name).begin(predict_once) is not None


def test_what_cannot_be_built_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r"sampler 'pndm' is unknown; use ddpm, ddim, dpm\+\+, euler, heun"):
        build.sampler("pndm")
    flow = {"schedule": {"name": "rectified-flow"}, "times": "logit-normal", "times_mean": 10, "times_std": 0.1}
    within = parse_config({**MINIMAL, "diffusion": {**flow, "log_snr": (-2, 2)}}, "here")
    with pytest.raises(UsageError, match=r"diffusion\.times: logit-normal times of mean 10 and .* miss the times"):
        build.segmenter(within, 2)
    few = parse_config({**MINIMAL, "diffusion": {"schedule": {"num_steps": 10}}}, "here")
    with pytest.raises(UsageError, match=r"schedule: every beta must lie in"):
        build.segmenter(few, 2)
    heads = {"attention_factors": [1], "channels": 8, "head_channels": 3}
    with pytest.raises(UsageError, match=r"network: head_channels \(3\) must divide"):
        build.segmenter(parse_config({**MINIMAL, "network": heads}, "here"), 2)


STEPS, RATE = 400, 1e-3
CONDITIONS: dict[str, dict[str, Any]] = {
    "image_encoder": {"encoder_channels": 16, "encoder_blocks": 1, "encoder_growth": 8},
    "dynamic_encoding": {"bands": 5},
    "semantic_condition": {"depth": 1, "head_channels": 16, "dropout": 0.0},
}
LOGITS: dict[str, Any] = {"head": "logits", "cross_entropy_weight": 1.0, "log_snr": (-7.0, 2.5)}
LATENT: dict[str, Any] = {"target": "x0", "scale": 0.05}


def cases(dims: int) -> tuple[Tensor, Tensor]:
    """Two noisy images (2, 1, *S), and two classes in each, apart by place and not by brightness."""
    shape = (16,) * dims if dims == 2 else (8,) * dims
    generator = torch.Generator().manual_seed(0)
    labels = torch.zeros(2, *shape, dtype=torch.int64)
    half = shape[0] // 2
    labels[0, 1 : half - 1, 1:half], labels[0, half : half + 2, half:] = 1, 2
    labels[1, half:-1, 1 : half + 1], labels[1, 1 : half - 1, half:-1] = 1, 2
    return (labels > 0).float()[:, None] + 0.3 * torch.randn((2, 1, *shape), generator=generator), labels


def learn(model: nn.Module, image: Tensor, labels: Tensor) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    model.train()
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (STEPS - step) / 50)
        loss = model({"image": image, "label": labels, "seed": torch.tensor([2 * step, 2 * step + 1])})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(
    "method", ["baseline", "ensemdiff", "segdiff", "medsegdiff", "medsegdiff-v2", "categorical", "latent-mask"]
)
def test_two_cases_are_learnt_by_heart(method, dims) -> None:
    """From two images; where x_t is a mask, from one image with two answers: a network without x_t cannot give both."""
    image, labels = cases(dims)
    one_image = method not in ("baseline", "latent-mask")
    if one_image:
        image = image[:1].expand_as(image).contiguous()
    diffusion = {"latent-mask": LATENT, "categorical": {}, "baseline": {}}.get(method, LOGITS)
    content = {
        "method": method,
        "data": {"window": list(image.shape[2:]), "labels": ["one", "two"]},
        "network": {"dims": dims, "channels": 16, "channel_mult": [1, 2, 2], "num_res_blocks": 1},
        "diffusion": {"schedule": {"name": "cosine"}, **diffusion},
        "inference": {"sampler": "ddpm"},
        **CONDITIONS,
    }
    config = parse_config(content, "test")
    torch.manual_seed(0)
    model = build.segmenter(config, 3)
    if isinstance(model, LatentMaskDiffusion):
        learn(model.autoencoder.requires_grad_(True), image, labels)
        model.autoencoder.requires_grad_(False)
        with torch.no_grad():
            standardise(model.autoencoder.codec, [model.autoencoder.channels_of(labels)])
    learn(model, image, labels)

    def answers() -> list[int | None]:
        """Which of the two masks each of eight samples is; None for one that is neither."""
        times = build.times(config, 20 if one_image else 5)
        samples = model.probabilities(image, [[1, 2, 3, 4], [5, 6, 7, 8]], build.sampler("ddpm"), times).argmax(2)

        def answer(sample: Tensor, case: int) -> int | None:
            for known in (0, 1) if one_image else (case,):
                overlap = label_overlap(sample.numpy(), labels[known].numpy(), [1, 2])
                if min(value.dice for value in overlap.values()) > 0.95:
                    return known
            return None

        return [answer(sample, case) for case in range(2) for sample in samples[case]]

    def both(found: list[int | None]) -> bool:
        return {0, 1} <= set(found) and found.count(None) <= (2 if one_image else 0)

    assert both(answers())
    if one_image:
        with without_x_t(model.network, "zeros", method == "categorical"):
            assert not both(answers())


def test_steps_on_labels_lie_between_the_bounds_of_their_log_snr() -> None:
    content = {
        "method": "categorical",
        "data": {"window": [8, 8], "labels": ["one"]},
        "network": {"dims": 2, "channels": 16, "channel_mult": [1, 2]},
        "diffusion": {"schedule": {"name": "cosine"}, "log_snr": (-11.0, 1.5)},
        "inference": {"sampler": "ddpm", "steps": 20},
    }
    config = parse_config(content, "test")
    assert isinstance(config, SegmenterConfig)
    times = build.times(config, 20)
    assert len(times) == 21 and 950 < times[0] < 970 and 190 < times[-2] < 210 and times[-1] == 0
    model = build.segmenter(config, 2)
    assert isinstance(model, CategoricalMaskDiffusion) and model.times == (times[-2], times[0])
    every = parse_config({**content, "diffusion": {"schedule": {"name": "cosine"}}}, "test")
    assert isinstance(every, SegmenterConfig) and build.times(every, 20)[:2] == [1000, 950]


FLOW: dict[str, Any] = {"schedule": {"name": "rectified-flow", "num_steps": 100}, "target": "flow"}


@pytest.mark.parametrize("method", ["ensemdiff", "latent-mask"])
def test_logit_normal_times_reach_the_training_of_masks_and_their_latents(method) -> None:
    content = {
        "method": method,
        "data": {"window": [8, 8], "labels": ["one"]},
        "network": {"dims": 2, "channels": 16, "channel_mult": [1, 2]},
        "diffusion": {**FLOW, "times": "logit-normal", "times_mean": -2.0, "times_std": 0.1},
    }
    config = parse_config(content, "test")
    model = build.segmenter(config, 2)
    assert isinstance(model, MaskDiffusion | LatentMaskDiffusion) and isinstance(model.times, LogitNormalTimes)
    seen: list[int] = []
    model.network.register_forward_hook(lambda network, given, out: seen.extend(given[1].tolist()))
    for seed in range(20):
        batch = {"image": torch.zeros(2, 1, 8, 8), "label": torch.zeros(2, 8, 8, dtype=torch.int64)}
        assert bool(model({**batch, "seed": torch.tensor([2 * seed, 2 * seed + 1])}).isfinite())
    assert len(seen) == 40 and min(seen) >= 5 and max(seen) <= 20, "sigmoid(-2) of 100 steps is 12"


@pytest.mark.parametrize("channels", [None, 3], ids=["pixels", "latents"])
def test_logit_normal_times_reach_the_training_of_a_generator_and_not_its_validation(channels) -> None:
    content = {
        "method": "pixel" if channels is None else "latent",
        "autoencoder": None if channels is None else "autoencoder-tiny-imagenet-small",
        "data": {"size": 8, "channels": 1},
        "network": {"dims": 2, "channels": 16, "channel_mult": [1, 2], "norm_groups": 8},
        "diffusion": {**FLOW, "times": "logit-normal", "times_mean": 2.0, "times_std": 0.1},
    }
    config = parse_config(content, "test")
    assert isinstance(config, GeneratorConfig)
    model = build.generator(config, 0, channels)
    seen: list[int] = []
    model.network.register_forward_hook(lambda network, given, out: seen.extend(given[1].tolist()))
    batch = {"image": torch.zeros(40, channels or 1, 8, 8), "seed": torch.arange(40)}
    assert bool(model(batch).isfinite()) and min(seen) >= 80 and max(seen) <= 94, "sigmoid(2) of 100 steps is 88"
    seen.clear()
    assert bool(model.eval()(batch).isfinite()) and min(seen) < 20 and max(seen) > 80


def test_the_presets_of_rectified_flow_differ_from_their_models_in_the_diffusion_alone() -> None:
    """They are to be compared after equal time."""
    for flow, other in (("rf", "adm"), ("rf-latent", "ldm")):
        for size in ("", "-small"):
            ours, theirs = (load_config(f"{name}-tiny-imagenet{size}") for name in (flow, other))
            assert isinstance(ours, GeneratorConfig) and isinstance(theirs, GeneratorConfig)
            for part in ("method", "autoencoder", "data", "network", "condition", "training"):
                assert getattr(ours, part) == getattr(theirs, part), (flow, size, part)
            section = ours.diffusion
            assert (section.schedule.name, section.target, section.times) == ("rectified-flow", "flow", "logit-normal")
            assert (ours.sampling.sampler, ours.sampling.steps) == ("euler", theirs.sampling.steps)


def test_a_segmenters_sampler_has_its_own_times() -> None:
    config = parse_config(
        {**MINIMAL, "diffusion": {**FLOW, "log_snr": (-4.0, 2.0)}, "inference": {"sampler": "heun"}}, "t"
    )
    assert isinstance(config, SegmenterConfig)
    even, other = build.times(config, 5), build.times(config, 5, "dpm++")
    assert even == build.times(config, 5, "euler") == [88, 76, 63, 51, 38, 0]
    assert other != even and other[0] == even[0] and other[-2:] == [27, 0]


def test_the_published_networks_of_whole_heads_take_a_step_without_memory() -> None:
    """Forward and backward on fake tensors: shapes fit, and every parameter gets a gradient."""
    first, second = load_config("autoencoder-heads"), load_config("ldm-heads")
    assert isinstance(first, ImageAutoencoderConfig) and isinstance(second, GeneratorConfig)
    with FakeTensorMode():
        codec = build.autoencoder(first)
        image = torch.zeros(1, 1, *first.data.shape)
        latent = codec.encoder(image)
        assert latent.shape == (1, 3, 20, 28, 20)  # Pinaya et al. 2022, sec. 2.1
        mean, log_variance = codec.quant_conv_mu(latent), codec.quant_conv_log_sigma(latent)
        restored = codec.decoder(codec.post_quant_conv(mean + log_variance))
        assert restored.shape == image.shape
        (restored - image).abs().mean().backward()
        assert all(parameter.grad is not None for parameter in codec.parameters())
        network = UNet(in_channels=3, out_channels=3, **second.network.model_dump())
        eps = network(latent.detach(), torch.zeros(1, dtype=torch.int64), {})
        assert eps.shape == latent.shape
        eps.square().mean().backward()
        assert all(parameter.grad is not None for parameter in network.parameters())
        assert 4e8 < sum(parameter.numel() for parameter in network.parameters()) < 7e8
