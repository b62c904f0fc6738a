"""Compares the time of an ensemble in one call with one encoding of the image and the network evaluations one by one.

    python benchmarks/studies/ensemble_cost.py MODEL... [--members 5] [--steps 5] [--size 32 48 32] [--device cpu]

Timings alternate between the two ways, and the printed ratio is that of the medians. The goal is at most 1.1; below 1
the batched call is faster.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from medseg_diffusion import build
from medseg_diffusion.device import choose_device, keep_freed_memory, tune
from medseg_diffusion.diffusion.noise import gaussian, generators
from medseg_diffusion.models.segmenter import restore_segmenter
from medseg_diffusion.models.store import load_model_files
from medseg_diffusion.sampling.loop import spaced
from medseg_diffusion.tasks.latent_mask import LatentMaskDiffusion
from medseg_diffusion.tasks.mask import MaskDiffusion


def seconds(run: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


@torch.no_grad()
def one_by_one(model: MaskDiffusion | LatentMaskDiffusion, image: Tensor, times: list[int], members: int) -> None:
    """Encode the image once, then evaluate the network in batches of one."""
    cond = model.network.encode_condition(image)  # type: ignore[operator]
    shape: tuple[int, ...]
    if isinstance(model, LatentMaskDiffusion):
        shape = (len(model.autoencoder.codec.scale), *cond["concat"].shape[2:])
    else:
        shape = (model.encoding.channels, *image.shape[2:])
    x = gaussian(shape, generators([0]), like=image)
    for _ in range(members):
        for t in times[:-1]:
            model.denoiser(x, torch.full((1,), t, device=image.device), cond)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--members", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--size", type=int, nargs="+", help="size of the image; default: the training window")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    device = choose_device(options.device)
    tune(device)
    keep_freed_memory()
    for name in options.models:
        model, config = restore_segmenter(load_model_files(name))
        if not isinstance(model, MaskDiffusion | LatentMaskDiffusion):
            parser.error(f"{name}: takes no Gaussian steps")
        model.to(device)
        image = torch.rand(1, config.data.channels, *(options.size or config.data.window), device=device)
        times = spaced(build.noise_schedule(config.diffusion.schedule), options.steps)
        sampler, seeds = build.sampler("dpm++"), [list(range(options.members))]
        runs: list[Callable[[], object]] = [
            lambda: model.probabilities(image, seeds, sampler, times),  # noqa: B023
            lambda: one_by_one(model, image, times, options.members),  # noqa: B023
        ]
        timings: list[list[float]] = [[], []]
        for i in range(options.repeats + 2):
            for which in (0, 1) if i % 2 else (1, 0):
                took = seconds(runs[which], device)
                if i >= 2:
                    timings[which].append(took)
        batched, single = (statistics.median(values) for values in timings)
        print(
            f"{name}: {options.members} samples of {len(times) - 1} steps {batched:.3f} s, "
            f"one encoding and {options.members * (len(times) - 1)} evaluations {single:.3f} s: {batched / single:.2f}"
        )


if __name__ == "__main__":
    main()
