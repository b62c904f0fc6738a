"""What does a segmentation cost outside of its network evaluations, beside MONAI's sliding windows and single samples?

    python benchmarks/segment.py [--device cuda]

Windows: the same volume, windows, overlap, Gaussian weights and network as MONAI's SlidingWindowInferer. Ensemble: an
ensemble in one call, which encodes the image once and batches its members, beside one call for each member. Whole
scans, from file to file, are measured by studies/scan_cost.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from common import Options, Row, main, quiet
from torch import Tensor

from medseg_diffusion import build
from medseg_diffusion.config.load import load_config
from medseg_diffusion.config.segmenter import SegmenterConfig
from medseg_diffusion.device import keep_freed_memory, tune
from medseg_diffusion.methods.segment import segment
from medseg_diffusion.methods.windows import Windows
from medseg_diffusion.sampling.ddim import DDIM


class FeedForward:
    """A network as a segmenter without noise (`methods.segment.Segmenter`)."""

    def __init__(self, network: Any) -> None:
        self.network = network

    @torch.no_grad()
    def probabilities(self, image: Tensor, seeds: Sequence[Sequence[int]], sampler: Any, times: Any) -> Tensor:
        return self.network(image)[:, None]


def windows(options: Options, device: torch.device) -> Iterator[Row]:
    from monai.inferers import SlidingWindowInferer

    side, window = options.size(160, 24), options.size(64, 16)
    image = torch.randn(1, side, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    torch.manual_seed(0)
    networks = {
        "one convolution": torch.nn.Conv3d(1, 4, 3, padding=1),
        "small network": torch.nn.Sequential(
            torch.nn.Conv3d(1, 16, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv3d(16, 4, 3, padding=1)
        ),
    }
    for name, network in networks.items():
        model = FeedForward(network.to(device))
        inferer = SlidingWindowInferer([window] * 3, sw_batch_size=1, overlap=0.5, mode="gaussian")
        cut = Windows((window,) * 3, 0.5, 1)

        def ours(model: FeedForward = model, cut: Windows = cut) -> Tensor:
            return segment(model, image, [0], DDIM(), [1, 0], cut)[0]

        def theirs(network: Any = network, inferer: Any = inferer) -> Tensor:
            with torch.no_grad():
                return inferer(image[None], network)[0]

        gap = float((ours() - theirs()).abs().max())
        times = options.in_turns({"ours": ours, "theirs": theirs}, warm=0)
        text = f"{side}^3 in windows of {window}^3, overlap 0.5, {name}"
        note = f"results differ by {gap:.0e}"
        yield Row(text, "MONAI SlidingWindowInferer", times["ours"], times["theirs"], note=note)


def ensembles(options: Options, device: torch.device) -> Iterator[Row]:
    members = options.size(5, 2)
    for preset in ("ensemdiff-hippocampus-small", "segdiff-hippocampus-small")[: options.size(2, 1)]:
        config = load_config(preset)
        assert isinstance(config, SegmenterConfig)
        torch.manual_seed(0)
        model = build.segmenter(config, len(config.data.labels) + 1).eval().requires_grad_(False).to(device)
        size = options.size(config.data.window, (8, 8, 8))
        image = torch.rand(1, config.data.channels, *size, device=device)
        times = build.times(config, options.size(5, 1))
        sampled = partial(model.probabilities, image, sampler=build.sampler("dpm++"), times=times)

        def together(sampled: Callable[..., Tensor] = sampled) -> Tensor:
            return sampled(seeds=[list(range(members))])

        def in_turn(sampled: Callable[..., Tensor] = sampled) -> Tensor:
            return torch.cat([sampled(seeds=[[member]]) for member in range(members)], 1)

        gap = float((together() - in_turn()).abs().max())
        taken = options.in_turns({"ours": together, "theirs": in_turn})
        text = f"{preset}: {members} members of {len(times) - 1} steps, {' x '.join(map(str, size))}"
        note = f"probabilities differ by {gap:.0e}"
        yield Row(text, "one call for each member", taken["ours"], taken["theirs"], note=note)


def rows(options: Options) -> Iterator[Row]:
    device = torch.device(options.device)
    tune(device)
    keep_freed_memory()
    yield from windows(options, device)
    yield from ensembles(options, device)


if __name__ == "__main__":
    with quiet():
        main("segment", __doc__, rows, repeats=3)
