"""What do anomaly maps and their scores cost, beside MONAI's sampling loop and scikit-learn?

    python benchmarks/anomaly.py [--device cuda]

Maps: slices are noised and denoised by the same network, ours and with MONAI's network class and scheduler. Scores: the
areas under the ROC and the precision-recall curve of all voxels, beside scikit-learn; ours also has the best Dice.
Simplex noise: beside Gaussian noise of the same size, to see what the published choice of noise adds. How well the
methods find anomalies is on docs/results/anomaly.md.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from common import Options, Row, installed, main, quiet
from torch import Tensor
from unet import ours_and_monai

from medseg_diffusion.device import keep_freed_memory, tune
from medseg_diffusion.diffusion.denoiser import NetworkDenoiser
from medseg_diffusion.diffusion.noise import gaussian, generators
from medseg_diffusion.diffusion.schedule import linear
from medseg_diffusion.diffusion.simplex import simplex
from medseg_diffusion.methods.partial_noise import PartialNoise
from medseg_diffusion.metrics.detection import Curve, ScoredVoxels


def maps(options: Options) -> Iterator[Row]:
    from monai.networks.schedulers import DDIMScheduler

    device = torch.device(options.device)
    slices, side, steps, channels = options.size((8, 64, 5, 32), (1, 16, 2, 32))
    own, theirs = (network.eval().requires_grad_(False).to(device) for network in ours_and_monai(2, channels))
    images = torch.rand(slices, 1, side, side, generator=torch.Generator().manual_seed(0)).to(device) * 2 - 1
    detector = PartialNoise(NetworkDenoiser(own, linear(1000), "eps"), gaussian, start=250, steps=steps)
    scheduler = DDIMScheduler(1000, schedule="linear_beta", clip_sample=True)

    @torch.no_grad()
    def ours() -> Tensor:
        return detector.detect(images, list(range(slices))).score

    @torch.no_grad()
    def monai() -> Tensor:
        x = scheduler.add_noise(images, torch.randn_like(images), torch.full((slices,), 249, device=device))
        for t in detector.times[:-1]:
            now = torch.full((slices,), t - 1, device=device)
            scheduler.num_inference_steps = 4 * steps  # steps of 250 / steps
            x = scheduler.step(theirs(x, now), t - 1, x)[0]
        return (images - x).abs()

    times = options.in_turns({"ours": ours, "monai": monai})
    text = f"map of {slices} slices of {side}^2, {steps} steps, {channels} channels"
    yield Row(text, "MONAI network and DDIMScheduler", times["ours"], times["monai"], note="the same weights")


def noise(options: Options) -> Iterator[Row]:
    count, side = options.size((16, 128), (2, 16))
    like = torch.zeros((), device=options.device)
    times = options.in_turns(
        {
            "simplex": lambda: simplex((1, side, side), generators(range(count)), like),
            "gaussian": lambda: gaussian((1, side, side), generators(range(count)), like),
        }
    )
    yield Row(f"simplex noise of {count} slices of {side}^2", "Gaussian noise", times["simplex"], times["gaussian"])


def scores(options: Options) -> Iterator[Row]:
    count = options.size(2_000_000, 2000)
    random = np.random.default_rng(0)
    lesion = random.random(count) < 0.02
    values = (random.standard_normal(count) + 1.5 * lesion).astype(np.float32)
    found: dict[str, tuple[float, float]] = {}

    def ours() -> None:
        curve = Curve.of(ScoredVoxels.of(values, lesion))
        curve.best_dice()
        found["ours"] = (curve.auroc, curve.average_precision)

    runs = {"ours": ours}
    if installed("sklearn"):
        from sklearn.metrics import average_precision_score, roc_auc_score

        def theirs() -> None:
            found["scikit-learn"] = (roc_auc_score(lesion, values), average_precision_score(lesion, values))

        runs["scikit-learn"] = theirs
    times = options.in_turns(runs)
    note = ""
    if "scikit-learn" in found:
        gap = max(abs(a - b) for a, b in zip(found["ours"], found["scikit-learn"], strict=True))
        note = f"scores differ by {gap:.0e}; ours also finds the best Dice"
    text = f"AUROC and average precision of {count:,} voxels"
    yield Row(text, "scikit-learn", times["ours"], times.get("scikit-learn"), note=note)


def rows(options: Options) -> Iterator[Row]:
    tune(torch.device(options.device))
    keep_freed_memory()
    yield from maps(options)
    yield from noise(options)
    yield from scores(options)


if __name__ == "__main__":
    with quiet():
        main("anomaly", __doc__, rows, repeats=3)
