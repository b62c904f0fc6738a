"""Compares the time of our U-Net with MONAI's DiffusionModelUNet of the same size: forward, and forward + backward.

    python benchmarks/unet.py [--device cuda] [--size 64] [--batch 8]

Both have the same weights (imported from MONAI's network), so that their outputs are compared, too. Timings alternate
between the two, and the printed ratio is that of the medians; below 1 ours is faster.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from monai.networks.nets import DiffusionModelUNet
from torch import Tensor, nn

from medseg_diffusion.device import keep_freed_memory, tune, with_memory_format
from medseg_diffusion.networks.foreign import convert


def both(dims: int, channels: int) -> tuple[nn.Module, nn.Module]:
    """Ours and MONAI's with the same random weights."""
    torch.manual_seed(0)
    theirs = DiffusionModelUNet(
        spatial_dims=dims,
        in_channels=1,
        out_channels=1,
        num_res_blocks=2 if dims == 2 else 1,
        channels=(channels, 2 * channels, 2 * channels),
        attention_levels=(False, False, True),
        num_head_channels=channels,
        resblock_updown=True,
    )
    for parameter in theirs.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    return convert(theirs.state_dict(), "monai", {"head_channels": channels}).build(), theirs


def seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def compare(runs: dict[str, Callable[[], object]], device: torch.device, repeats: int) -> dict[str, float]:
    """Median seconds of each run, after two warm-up rounds. The order alternates between rounds."""
    timings: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(repeats + 2):
        for name, run in list(runs.items())[:: 1 if i % 2 else -1]:
            took = seconds(run, device)
            if i >= 2:
                timings[name].append(took)
    return {name: statistics.median(values) for name, values in timings.items()}


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="also torch.compile (needs a C++ compiler on CPUs)")
    options = parser.parse_args()
    device = torch.device(options.device)
    tune(device)
    # Otherwise the difference between fresh and reused memory pages would dominate the comparison.
    keep_freed_memory()
    print(f"{torch.__version__}, {device}, {torch.get_num_threads()} threads; ratio = ours / MONAI's")
    print(
        f"{'network':22} {'precision':9} {'pass':8} {'ours':>8} {'MONAI':>8} {'ratio':>6}  variants of ours / MONAI's"
    )
    for dims, size, batch in ((2, options.size, options.batch), (3, options.size // 2, 1)):
        ours, theirs = (network.to(device) for network in both(dims, options.channels))
        variants = {"channels last": with_memory_format(both(dims, options.channels)[0].to(device), channels_last=True)}
        if options.compile:
            variants["compiled"] = both(dims, options.channels)[0].to(device)
            variants["compiled"].compile()
        x = torch.randn(batch, 1, *[size] * dims, device=device)
        t = torch.full((batch,), 500, device=device)
        with torch.no_grad():
            gap = float((ours(x, t) - theirs(x, t)).abs().max())
        for precision in (torch.float32, torch.bfloat16):

            def forward(network: nn.Module, precision: torch.dtype = precision, x: Tensor = x, t: Tensor = t) -> Tensor:
                with torch.autocast(device.type, torch.bfloat16, enabled=precision is torch.bfloat16):
                    return network(x, t)

            def inference(network: nn.Module, forward: Callable[[nn.Module], Tensor] = forward) -> None:
                with torch.no_grad():
                    forward(network)

            def training(network: nn.Module, forward: Callable[[nn.Module], Tensor] = forward) -> None:
                forward(network).float().square().mean().backward()

            for name, run in (("forward", inference), ("both", training)):
                networks = {"ours": ours, "monai": theirs, **variants}
                median_seconds = compare(
                    {key: partial(run, network) for key, network in networks.items()},
                    device,
                    options.repeats,
                )
                extra = ", ".join(f"{key} {median_seconds[key] / median_seconds['monai']:.2f}" for key in variants)
                label = f"{dims}D {batch} x {size}^{dims}, {options.channels} ch"
                print(
                    f"{label:22} {str(precision).removeprefix('torch.'):9} {name:8} {median_seconds['ours']:8.3f} "
                    f"{median_seconds['monai']:8.3f} {median_seconds['ours'] / median_seconds['monai']:6.2f}  {extra}",
                    flush=True,
                )
        print(f"largest difference of the outputs in float32: {gap:.1e}")


if __name__ == "__main__":
    main()
