"""What do pixel classifiers cost, beside upsampled features as published and beside scikit-learn?

    python benchmarks/label_efficient.py

The generator's activations are random numbers. Prediction: ours upsamples the output of each classifier's first layer,
the published way all features of all pixels; the labels must be the same. Training: as many passes over the same pixels
with the same layers as scikit-learn's MLPClassifier, for all members of the ensemble. Memory at the published sizes is
measured by studies/label_efficient_memory.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from common import Options, Row, installed, main, quiet
from torch import Tensor

from medseg_diffusion.methods.label_efficient import ClassifierOptions, fit_classifiers
from medseg_diffusion.methods.labelled_pixels import LabelledPixels
from medseg_diffusion.networks.pixel_classifier import PixelClassifiers, upsampled

CLASSES = 3


def prediction(options: Options) -> Iterator[Row]:
    side, members = options.size(128, 16), options.size(10, 2)
    # Channels and sides of the published five blocks at three times, an eighth of the channels.
    blocks = [(128, side // 8), (64, side // 8), (64, side // 8), (64, side // 4), (32, side // 2)] * 3
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(1, channels, n, n, generator=generator) for channels, n in blocks]
    torch.manual_seed(0)
    model = PixelClassifiers(members, sum(channels for channels, _ in blocks), CLASSES).eval()

    @torch.no_grad()
    def ours() -> Tensor:
        return model.maps(features, (side, side))

    @torch.no_grad()
    def published() -> Tensor:
        pixels = torch.cat([upsampled(block, (side, side)) for block in features], 1).movedim(1, -1).flatten(0, -2)
        return model(pixels).unflatten(1, (1, side, side)).movedim(-1, 2).movedim(0, 1)

    gap = float((ours() - published()).abs().max())
    times = options.in_turns({"ours": ours, "published": published})
    text = f"predict {side} x {side} pixels of {model.mean.numel()} features, {members} members"
    note = f"logits differ by {gap:.0e}"
    yield Row(text, "features upsampled first (published)", times["ours"], times["published"], note=note)


def training(options: Options) -> Iterator[Row]:
    count, width, members, epochs = options.size((6000, 256, 5, 4), (200, 8, 2, 1))
    random = np.random.default_rng(0)
    labels = random.integers(0, CLASSES, count)
    values = (random.standard_normal((count, width)) + 0.3 * labels[:, None]).astype(np.float16)
    share = torch.full((CLASSES,), 1 / CLASSES, dtype=torch.float64)
    pixels = LabelledPixels(
        values, torch.from_numpy(labels), torch.zeros(count, dtype=torch.int64), share, channels=(width,)
    )
    fit = ClassifierOptions(members, max_epochs=epochs, min_epochs=epochs)
    right: dict[str, float] = {}

    def ours() -> None:
        model = fit_classifiers(pixels, fit).eval()
        with torch.no_grad():
            predicted = model(torch.from_numpy(values).float()).softmax(-1).mean(0).argmax(-1)
        right["ours"] = float((predicted.numpy() == labels).mean())

    runs = {"ours": ours}
    if installed("sklearn"):
        from sklearn.neural_network import MLPClassifier

        def theirs() -> None:
            scaled = (values.astype(np.float32) - values.mean(0, np.float32)) / values.std(0, dtype=np.float32)
            models = [
                MLPClassifier((128, 32), batch_size=64, max_iter=epochs, random_state=i, n_iter_no_change=epochs + 1)
                for i in range(members)
            ]
            chances = sum(model.fit(scaled, labels).predict_proba(scaled) for model in models)
            right["scikit-learn"] = float((chances.argmax(1) == labels).mean())

        runs["scikit-learn"] = theirs
    times = options.in_turns(runs)
    text = f"train {members} classifiers, {epochs} passes over {count} pixels of {width} features"
    note = "accuracy on the pixels: " + ", ".join(f"{name} {value:.2f}" for name, value in right.items())
    yield Row(text, "scikit-learn MLPClassifier", times["ours"], times.get("scikit-learn"), note=note)


def rows(options: Options) -> Iterator[Row]:
    yield from prediction(options)
    yield from training(options)


if __name__ == "__main__":
    with quiet():
        main("label_efficient", __doc__, rows, repeats=3)
