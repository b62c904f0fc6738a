"""Is our U-Net as fast as those of MONAI and diffusers, forward and in a training step?

    python benchmarks/unet.py [--device cuda] [--compile]

MONAI's network has the same weights as ours (imported from it), so that the outputs are compared, too. The network of
diffusers has the same channels, levels and attention.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from common import Options, Row, installed, main, quiet
from torch import Tensor, nn

from medseg_diffusion.device import keep_freed_memory, tune, with_memory_format
from medseg_diffusion.models.inference import placed
from medseg_diffusion.networks.foreign import convert


def ours_and_monai(dims: int, channels: int) -> tuple[nn.Module, nn.Module]:
    """Ours and MONAI's with the same random weights."""
    from monai.networks.nets import DiffusionModelUNet

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


def of_diffusers(channels: int) -> nn.Module:
    """The 2D network of diffusers with the same layout, (x, t) -> tensor."""
    from diffusers import UNet2DModel

    network: Any = UNet2DModel(
        in_channels=1,
        out_channels=1,
        block_out_channels=(channels, 2 * channels, 2 * channels),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        attention_head_dim=channels,
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
    )

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.network(x, t, return_dict=False)[0]

    return Plain()


def rows(options: Options) -> Iterator[Row]:
    device = torch.device(options.device)
    tune(device)
    keep_freed_memory()  # otherwise fresh pages of memory would dominate the comparison
    channels = options.size(64, 32)
    for dims, size, batch in ((2, options.size(64, 16), options.size(4, 1)), (3, options.size(32, 8), 1)):
        ours, theirs = (network.to(device) for network in ours_and_monai(dims, channels))
        networks = {"ours": ours, "MONAI": theirs}
        networks["ours, channels last"] = with_memory_format(ours_and_monai(dims, channels)[0].to(device), True)
        if dims == 2 and installed("diffusers"):
            networks["diffusers"] = of_diffusers(channels).to(device)
        if options.rest.compile:
            networks["ours, compiled"] = placed(ours_and_monai(dims, channels)[0].eval(), device, compiled=True)
        x, t = torch.randn(batch, 1, *[size] * dims, device=device), torch.full((batch,), 500, device=device)
        with torch.no_grad():
            gap = float((ours(x, t) - theirs(x, t)).abs().max())
        label = f"{dims}D, {batch} x {size}^{dims}, {channels} channels"
        precisions = (torch.float32, torch.bfloat16) if options.rest.bf16 else (torch.float32,)
        for precision in precisions:

            def forward(network: nn.Module, precision: torch.dtype = precision, x: Tensor = x, t: Tensor = t) -> Tensor:
                with torch.autocast(device.type, torch.bfloat16, enabled=precision is torch.bfloat16):
                    return network(x, t)

            def inference(network: nn.Module, forward: Callable[[nn.Module], Tensor] = forward) -> None:
                with torch.no_grad():
                    forward(network)

            def training(network: nn.Module, forward: Callable[[nn.Module], Tensor] = forward) -> None:
                forward(network).float().square().mean().backward()

            for kind, run in (("forward", inference), ("forward and backward", training)):
                runs = {
                    name: lambda run=run, network=network: run(network)
                    for name, network in networks.items()
                    if kind == "forward" or name != "ours, compiled"
                }
                times = options.in_turns(runs)
                text = f"{kind}, {label}, {str(precision).removeprefix('torch.')}"
                yield Row(text, "MONAI", times["ours"], times["MONAI"], note=f"outputs differ by {gap:.0e} in float32")
                if dims == 2:
                    yield Row(text, "diffusers", times["ours"], times.get("diffusers"))
                for name in ("ours, channels last", "ours, compiled"):
                    if name in times:
                        yield Row(f"{text}: {name}", "ours", times[name], times["ours"])


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--compile", action="store_true", help="also compiled, as --compile of the commands")
    parser.add_argument("--bf16", action="store_true", help="also in bfloat16")


if __name__ == "__main__":
    with quiet():
        main("unet", __doc__, rows, add=add)
