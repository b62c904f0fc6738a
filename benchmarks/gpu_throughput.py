"""Training steps and network evaluations of four presets, beside MONAI's and diffusers' networks of the same size.

    python benchmarks/gpu_throughput.py OUT.json [--seconds 90] [--rehearse]

Every network computes in bfloat16. When the seconds are over, what has not been measured is listed as left out: what
is compiled comes last. OUT.json is rewritten after every row.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import installed, machine, quiet, write_numbers
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from medseg_diffusion import build
from medseg_diffusion.config.generator import GeneratorConfig, ImageAutoencoderConfig
from medseg_diffusion.config.load import load_config
from medseg_diffusion.config.segmenter import SegmenterConfig
from medseg_diffusion.config.shared import UNetSection
from medseg_diffusion.device import tune
from medseg_diffusion.models.inference import placed

PRESETS = ("adm-tiny-imagenet", "ldm-tiny-imagenet", "medsegdiff-isic", "ensemdiff-hippocampus-small")
REHEARSED = {
    "channels": 8, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_factors": (), "norm_groups": 4,
    "head_channels": 8, "num_heads": None,
}  # fmt: skip
"""Changes of a preset's network in a rehearsal."""
COMPILING = 40.0
"""Seconds that a compilation may take: none begins with less time left."""


@dataclass(frozen=True)
class Contender:
    """A network with what its steps need.

    Attributes:
        name: of the network.
        network: what is evaluated at every step of sampling.
        loss: the training loss of a batch.
        inputs: arguments of an evaluation.
        batch: number of samples.
    """

    name: str
    network: nn.Module
    loss: Callable[[], Tensor]
    inputs: tuple[Any, ...]
    batch: int


def of_preset(preset: str, device: torch.device, rehearse: bool) -> tuple[Contender, UNetSection, tuple[int, ...], int]:
    """Ours; its network's section, the size of x_t, and the channels of the network's input."""
    config = load_config(preset)
    assert isinstance(config, GeneratorConfig | SegmenterConfig)
    batch = 2 if rehearse else config.training.batch_size
    if rehearse:
        section = config.network.model_copy(update=REHEARSED)
        config = config.model_copy(update={"network": section})
    torch.manual_seed(0)
    seeds = torch.arange(batch)
    task: Any
    if isinstance(config, GeneratorConfig):
        shape = (config.data.channels, *(config.data.shape if not rehearse else (16, 16)))
        latent = None
        if config.autoencoder is not None:
            stage = load_config(config.autoencoder)
            assert isinstance(stage, ImageAutoencoderConfig)
            latent = stage.network.latent_channels
            factor = 2 ** (len(stage.network.channels) - 1)
            shape = (latent, *(side // factor for side in shape[1:]))
        task = build.generator(config, 0, latent).to(device)
        image = torch.randn(batch, *shape, device=device)
        data = {"image": image, "label": torch.zeros(batch, dtype=torch.int64, device=device), "seed": seeds}
        cond, channels = {}, shape[0]
    else:
        size = config.data.window if not rehearse else (16,) * config.network.dims
        classes = len(config.data.labels) + 1
        task = build.segmenter(config, classes).to(device)
        image = torch.randn(batch, config.data.channels, *size, device=device)
        label = torch.randint(classes, (batch, *size), device=device)
        data = {"image": image, "label": label, "seed": seeds}
        with torch.no_grad():
            cond = dict(task.network.encode_condition(image))
        shape = (task.encoding.channels, *size)
        channels = shape[0] + config.data.channels
    x, t = torch.randn(batch, *shape, device=device), torch.full((batch,), 500, device=device)
    ours = Contender("ours", task.network, lambda: task(data), (x, t, cond), batch)
    return ours, config.network, shape, channels


def _plain(network: Any, name: str, x: Tensor, t: Tensor, unpack: bool = False) -> Contender:
    """Another library's network, trained to predict noise."""

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.network(x, t, return_dict=False)[0] if unpack else self.network(x, t)

    plain = Plain().to(x.device)
    target = torch.randn_like(x[:, :1])
    return Contender(name, plain, lambda: (plain(x, t)[:, :1].float() - target).square().mean(), (x, t), len(x))


def of_monai(section: UNetSection, x: Tensor, t: Tensor) -> Contender:
    """MONAI's network with the channels, levels and attention of a section; it folds no patches."""
    from monai.networks.nets import DiffusionModelUNet

    widths = [section.channels * mult for mult in section.channel_mult]
    attention = [2**i in section.attention_factors for i in range(len(widths))]
    heads = [width // section.num_heads if section.num_heads else section.head_channels for width in widths]
    network = DiffusionModelUNet(
        spatial_dims=section.dims,
        in_channels=x.shape[1],
        out_channels=x.shape[1],
        num_res_blocks=section.num_res_blocks,
        channels=widths,
        attention_levels=attention,
        norm_num_groups=section.norm_groups,
        resblock_updown=section.resampling == "resblock",
        num_head_channels=heads,
        use_flash_attention=x.is_cuda,
    )
    return _plain(network, "MONAI", x, t)


def of_diffusers(section: UNetSection, x: Tensor, t: Tensor) -> Contender:
    """The 2D network of diffusers with the channels, levels and attention of a section."""
    from diffusers import UNet2DModel

    widths = tuple(section.channels * mult for mult in section.channel_mult)
    attention = [2**i in section.attention_factors for i in range(len(widths))]
    kind = "resnet" if section.resampling == "resblock" else "conv"
    network = UNet2DModel(
        in_channels=x.shape[1],
        out_channels=x.shape[1],
        block_out_channels=widths,
        down_block_types=tuple("AttnDownBlock2D" if one else "DownBlock2D" for one in attention),
        up_block_types=tuple("AttnUpBlock2D" if one else "UpBlock2D" for one in reversed(attention)),
        layers_per_block=section.num_res_blocks,
        attention_head_dim=section.head_channels,
        downsample_type=kind,
        upsample_type=kind,
        norm_num_groups=section.norm_groups,
        resnet_time_scale_shift="scale_shift" if section.scale_shift else "default",
    )
    return _plain(network, "diffusers", x, t, unpack=True)


def seconds(run: Callable[[], object], device: torch.device, least: float) -> tuple[float, float]:
    """Median seconds of a run after two that do not count, and the most GPU memory in GB."""
    times: list[float] = []
    began = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    while len(times) < 5 or (len(times) < 50 and time.perf_counter() - began < least):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
        if len(times) == 2:
            began = time.perf_counter()
    return median(times[2:]), torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0


def flops(contender: Contender) -> float:
    """Floating-point operations of an evaluation of one sample."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        contender.network(*contender.inputs)
    return counter.get_total_flops() / contender.batch


def rows_of(preset: str, contender: Contender, device: torch.device, compiled: bool, least: float) -> Iterator[dict]:
    """The training step and the evaluation of a network."""
    network = contender.network
    cost = flops(contender)
    optimiser = torch.optim.AdamW(network.parameters(), 1e-4, fused=True)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = contender.loss()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    @torch.no_grad()
    def evaluation() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            network(*contender.inputs)

    for what, run, passes in (("evaluation", evaluation, 1), ("training step", step, 3)):
        network.train(what == "training step")
        forward = network.forward
        if compiled and what == "evaluation":
            placed(network, device, compiled=True)
        elif compiled:
            network.compile()
        try:
            took, memory = seconds(run, device, least)
        except RuntimeError as error:  # out of memory, or what a compiler cannot do: the others are measured
            reason = str(error).splitlines()[0]
            yield {"preset": preset, "network": contender.name, "what": what, "compiled": compiled, "error": reason}
            continue
        finally:
            network.forward = forward
        yield {
            "preset": preset,
            "network": contender.name,
            "what": what,
            "compiled": compiled,
            "batch": contender.batch,
            "seconds": took,
            "samples_per_second": contender.batch / took,
            "tflops": passes * cost * contender.batch / took / 1e12,
            "memory_gb": memory,
            "gflop_per_sample": cost / 1e9,
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
        }


def _itself(contender: Contender) -> Contender:
    return contender


def measured(options: argparse.Namespace, left: Callable[[], float]) -> Iterator[dict[str, Any]]:
    device = torch.device("cpu" if options.rehearse else "cuda")
    tune(device)
    least = 0.0 if options.rehearse else 1.5
    for compiled in (False, True):
        for preset in PRESETS:
            if options.rehearse and compiled:
                yield {"preset": preset, "compiled": True, "left_out": "a rehearsal compiles nothing"}
                continue
            if left() < (COMPILING if compiled else 5.0):
                yield {"preset": preset, "compiled": compiled, "left_out": "no time left"}
                continue
            ours, section, shape, channels = of_preset(preset, device, options.rehearse)
            makers: list[Callable[[], Contender]] = [partial(_itself, ours)]
            x = torch.randn(ours.batch, channels, *shape[1:], device=device)
            t = torch.full((ours.batch,), 500, device=device)
            if not compiled:
                makers.append(partial(of_monai, section, x, t))
                if section.dims == 2 and installed("diffusers"):
                    makers.append(partial(of_diffusers, section, x, t))
            for make in makers:
                yield from rows_of(preset, make(), device, compiled, least)
                if device.type == "cuda":
                    torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=90.0)
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with the smallest networks")
    options = parser.parse_args()
    began = time.monotonic()
    content: dict[str, Any] = {"machine": machine("cpu" if options.rehearse else "cuda"), "rows": []}
    for row in measured(options, lambda: options.seconds - (time.monotonic() - began)):
        content["rows"].append(copy.deepcopy(row))
        write_numbers(options.out, content)
        print(row, flush=True)


if __name__ == "__main__":
    with quiet():
        main()
