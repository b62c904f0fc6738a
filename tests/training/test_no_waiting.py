"""A training step never waits for its device: it reads nothing back, and copies to the device through pinned memory."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from medseg_diffusion import build
from medseg_diffusion.config.generator import GeneratorConfig, ImageAutoencoderConfig, NoisyClassifierConfig
from medseg_diffusion.config.segmenter import SegmenterConfig
from medseg_diffusion.training.autoencoder import AutoencoderTraining, GradientSSIM, LossWeights
from medseg_diffusion.training.ema import EMA
from medseg_diffusion.training.resume import TrainingState
from medseg_diffusion.training.runtime import Runtime
from medseg_diffusion.training.trainer import TrainingOptions, TrainingRun, _initial_state, _step
from tests.helpers.generators import small_config

OPTIONS = TrainingOptions(batch_size=4, examples_at_once=2, warmup_steps=0)


def segmenter(method: str, num_classes: int = 3, **diffusion: object) -> nn.Module:
    schedule = {"name": "cosine", "num_steps": 100}
    config = SegmenterConfig.model_validate(
        {
            "method": method,
            "data": {"window": [16, 16]},
            "network": {"dims": 2, "channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1, "dropout": 0.1},
            "image_encoder": {"encoder_channels": 8, "encoder_blocks": 1, "encoder_growth": 4},
            "dynamic_encoding": {"bands": 5},
            "semantic_condition": {"depth": 1, "head_channels": 8, "dropout": 0.0},
            "mask_autoencoder": {"latent_channels": 2, "channels": [8, 8], "features": 4},
            "probabilistic_unet": {"features": 8, "latent_channels": 2},
            "diffusion": {"schedule": schedule, **diffusion},
            "inference": {"sampler": "ddpm"},
        }
    )
    return build.segmenter(config, num_classes)


def generator(method: str, latent_channels: int | None = None, **changes: object) -> nn.Module:
    config = small_config(method, **changes)
    assert isinstance(config, GeneratorConfig)
    return build.generator(config, 2, latent_channels)


def classifier() -> nn.Module:
    config = small_config("classifier")
    assert isinstance(config, NoisyClassifierConfig)
    return build.noisy_classifier(config, 2)


def autoencoder(quantiser: str, start: int = 0) -> nn.Module:
    network = {"latent_channels": 2, "channels": [32, 32], "num_res_blocks": 1, "quantiser": quantiser}
    config = small_config("autoencoder", network=network)
    assert isinstance(config, ImageAutoencoderConfig)
    return AutoencoderTraining(build.autoencoder(config), GradientSSIM(), LossWeights(adversarial_start=start), 8, 1)


BY_CLASS = {"condition": {"classes": "embedding"}}
VARIANCE = {"learned_variance": True, "objective": "hybrid"}
LOGITS = {"target": "x0", "head": "logits", "dice_ce_weight": 1.0, "cross_entropy_weight": 1.0}

MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "segmenter": (lambda: segmenter("ensemdiff", target="x0"), 1),
    "segmenter of logits": (lambda: segmenter("ensemdiff", **LOGITS), 1),
    "dice by log-SNR": (lambda: segmenter("ensemdiff", 2, **LOGITS, dice_ce_log_snr=-3.0), 1),
    "segdiff": (lambda: segmenter("segdiff", 2), 1),
    "medsegdiff": (lambda: segmenter("medsegdiff"), 1),
    "medsegdiff-v2": (lambda: segmenter("medsegdiff-v2"), 1),
    "latent-mask": (lambda: segmenter("latent-mask"), 1),
    "categorical": (lambda: segmenter("categorical", cross_entropy_weight=1.0), 1),
    "probabilistic-unet": (lambda: segmenter("probabilistic-unet"), 1),
    "baseline": (lambda: segmenter("baseline"), 1),
    "mask autoencoder": (lambda: segmenter("latent-mask").autoencoder.requires_grad_(True), 1),  # type: ignore[operator, union-attr]
    "pixel": (lambda: generator("pixel", **BY_CLASS), 3),
    "pixel with variance": (lambda: generator("pixel", diffusion={**VARIANCE, "times": "importance"}), 3),
    "latent": (lambda: generator("latent", 2), 2),
    "upsampler": (lambda: generator("upsampler"), 3),
    "patched": (lambda: generator("patched", diffusion={"target": "x0", "noise": "simplex"}), 3),
    "classifier": (classifier, 3),
    "KL autoencoder": (lambda: autoencoder("kl"), 3),
    "KL autoencoder before its adversary": (lambda: autoencoder("kl", 100), 3),
    "VQ autoencoder": (lambda: autoencoder("vq"), 3),
}
"""Models, and the channels of their images."""


def batch_of(name: str, device: str) -> Mapping[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(4, MODELS[name][1], 16, 16, generator=generator) * 2 - 1
    of_images = name in ("pixel", "pixel with variance", "latent", "upsampler", "patched", "classifier")
    label = torch.randint(2, (4,) if of_images else (4, 16, 16), generator=generator)
    return {"image": image.to(device), "label": label.to(device), "seed": torch.arange(4)}


def new_state(name: str, run: Path, runtime: Runtime) -> TrainingState:
    torch.manual_seed(0)
    return _initial_state(MODELS[name][0](), OPTIONS, TrainingRun(run), runtime)


def readings_in(action: Callable[[], Any]) -> set[str]:
    """The operations within ``action`` that read a tensor's value, for which a GPU's process would have to wait.

    AdamW and torch's one_hot read values on the CPU only, inside their operation.
    """
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        action()
    assert any(event.name == "aten::convolution" for event in profiler.events()), "nothing was recorded"
    return {
        event.name
        for event in profiler.events()
        if event.name in ("aten::item", "aten::is_nonzero", "aten::nonzero")
        and getattr(event.cpu_parent, "name", "") not in ("aten::_fused_adamw_", "aten::one_hot")
    }


@pytest.mark.parametrize("name", MODELS)
def test_a_step_reads_no_value(name, tmp_path: Path) -> None:
    runtime = Runtime("cpu", "fp32")
    state, batch = new_state(name, tmp_path, runtime), batch_of(name, "cpu")
    _step(state, batch, OPTIONS, 0, runtime)
    assert readings_in(lambda: _step(state, batch, OPTIONS, 0, runtime)) == set()


class Copies(TorchDispatchMode):
    """Notes copies to the device that would wait, those from memory that is not pinned."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        is_copy = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        if (
            is_copy
            and result.device.type == "meta"
            and any(a.device.type == "cpu" for a in args if isinstance(a, Tensor))
        ):
            stack = traceback.extract_stack()
            if not any(frame.name in ("sent", "to_device") for frame in stack):
                self.waiting.append("".join(traceback.format_list(stack[-4:-1])))
        return result


@pytest.mark.parametrize("name", MODELS)
def test_a_step_runs_on_a_device_without_values(name, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On "meta", whose tensors cannot be read or copied back. AdamW's step is left out, which does not exist there."""
    monkeypatch.setattr(torch, "autocast", lambda *arguments, **options: nullcontext())  # nor does autocast
    skips: list[Tensor] = []
    monkeypatch.setattr(Runtime, "step", lambda self, optimizer, skip: skips.append(skip))
    runtime = Runtime("cpu", "fp32")
    model = MODELS[name][0]().to("meta")
    parts = model.optimised_parts() if hasattr(model, "optimised_parts") else [list(model.parameters())]  # type: ignore[operator]
    state = TrainingState(model, [torch.optim.SGD(part) for part in parts], EMA(model))
    batch = batch_of(name, "meta")
    with Copies() as copies:
        loss, norms = _step(state, batch, OPTIONS, 0, runtime)
    assert {value.device.type for value in (loss, *norms, *skips)} == {"meta"} and len(skips) == len(norms) == len(
        parts
    )
    assert not copies.waiting


class Impatient(nn.Module):
    """A model that looks at its loss."""

    def __init__(self, look: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.layer, self.look = nn.Conv2d(1, 1, 1), look

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        loss = self.layer(batch["image"]).square().mean()
        self.look(loss.detach())
        return loss


LOOKS: dict[str, Callable[[Tensor], object]] = {
    "float": float,
    "item": lambda loss: loss.item(),
    "if": lambda loss: bool(loss > 0),
    "mask": lambda loss: loss[loss > 0],
}


@pytest.mark.parametrize("look", LOOKS)
def test_a_reading_is_noticed(look, tmp_path: Path) -> None:
    """Protects the tests above: they would notice a line that waits."""
    runtime, batch = Runtime("cpu", "fp32"), batch_of("segmenter", "cpu")
    state = _initial_state(Impatient(LOOKS[look]), OPTIONS, TrainingRun(tmp_path), runtime)
    assert readings_in(lambda: _step(state, batch, OPTIONS, 0, runtime))
    model = Impatient(LOOKS[look]).to("meta")
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        model(batch_of("segmenter", "meta"))


def test_a_copy_that_waits_is_noticed() -> None:
    with Copies() as copies:
        torch.zeros(3).to("meta")
        torch.zeros(3, device="meta").copy_(torch.ones(3))
    assert len(copies.waiting) == 2
