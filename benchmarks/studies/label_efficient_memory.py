"""Measures memory and time of pixel classifiers at the published sizes, and compares them with the published way.

There are 40 labelled images of 256 x 256 with the published 8,448 features, which are the activations of five blocks of
the 256 x 256 ADM network at three times. Here they are seeded random numbers of the same shapes. The network itself is
measured in a separate part, with random weights. Each part runs in a fresh process, whose anonymous memory is watched
from start to end, including imports. The published way keeps all features of all pixels in float32. It is computed for
a small image, to compare the predictions; for the others its memory is only counted.

    python benchmarks/studies/label_efficient_memory.py
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory

SHAPES = ((1024, 32), (512, 32), (512, 32), (512, 64), (256, 128))  # channels and side for images of 256 x 256
TIMES = 3
FEATURES = TIMES * sum(channels for channels, _ in SHAPES)
CLASSES = 3


def watch(peak: list[int], stop: threading.Event) -> None:
    """Record the largest anonymous memory of this process in bytes, until ``stop`` is set."""
    while not stop.is_set():
        lines = Path("/proc/self/status").read_text().splitlines()
        anonymous = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
        peak[0] = max(peak[0], 1024 * anonymous)
        time.sleep(0.01)


def activations(side: int):  # noqa: ANN201 - torch is imported where it is needed
    """A replacement for `Activations` that returns random numbers seeded by the values of the image."""
    import torch

    class Seeded:
        noise = torch.zeros(1)

        def __call__(self, images: torch.Tensor) -> list[torch.Tensor]:
            generator = torch.Generator().manual_seed(int(1e6 * float(images.flatten()[0])))
            shapes = [(1, channels, size * side // 256, size * side // 256) for channels, size in SHAPES]
            return [torch.randn(shape, generator=generator) for _ in range(TIMES) for shape in shapes]

    return Seeded()


def labelled(count: int, side: int):  # noqa: ANN201
    """Images filled with their index, and labels in stripes."""
    import torch

    stripes = (torch.arange(side) * CLASSES // side).expand(side, side)
    return [torch.full((1, 1, side, side), i / 1e3) for i in range(count)], [stripes[None] for _ in range(count)]


def training(folder: Path, images: int, side: int) -> dict[str, float]:
    import torch

    from medseg_diffusion import build
    from medseg_diffusion.config.load import load_config
    from medseg_diffusion.config.pixel_classifier import PixelClassifierConfig
    from medseg_diffusion.data.augmentation import Augmenter
    from medseg_diffusion.methods.label_efficient import ClassifierOptions, fit_classifiers
    from medseg_diffusion.methods.labelled_pixels import PixelSampling, labelled_pixels

    started = time.monotonic()
    pictures, labels = labelled(images, side)
    classes = [f"class {i}" for i in range(CLASSES)]
    config = load_config("label-efficient")
    assert isinstance(config, PixelClassifierConfig)
    change = Augmenter(build.augmentation(config.augmentation), 2)
    sampling = PixelSampling(config.data.pixels_per_class, 0, config.data.copies, change)
    pixels = labelled_pixels(activations(side), pictures, labels, classes, sampling, folder / "features.npy")
    gathered = time.monotonic() - started
    model = fit_classifiers(pixels, ClassifierOptions(**config.classifier.model_dump()))
    torch.save(model.state_dict(), folder / "classifiers.pt")
    return {
        "pixels": len(pixels.labels),
        "gathering_s": gathered,
        "training_s": time.monotonic() - started - gathered,
        "features_on_disk_gb": (folder / "features.npy").stat().st_size / 1e9,
    }


def inference(folder: Path, images: int, side: int) -> dict[str, float]:
    import torch

    from medseg_diffusion.networks.pixel_classifier import PixelClassifiers

    model = PixelClassifiers(10, FEATURES, CLASSES)
    model.load_state_dict(torch.load(folder / "classifiers.pt", weights_only=True))
    model.eval()
    net, pictures = activations(side), labelled(images, side)[0]
    started = time.monotonic()
    with torch.no_grad():
        for picture in pictures[:3]:
            model.maps(net(picture), (side, side)).softmax(2).mean(1).argmax(1)
    return {"seconds_per_image": (time.monotonic() - started) / 3}


def network(folder: Path, images: int, side: int) -> dict[str, float]:
    """Compute the published blocks of the 256 x 256 ADM network for one image at three times, in float32."""
    import torch

    from medseg_diffusion.methods.activations import PUBLISHED_BLOCKS, PUBLISHED_TIMES
    from medseg_diffusion.networks.unet import UNet

    net = UNet(2, 3, 6, 256, (1, 1, 2, 2, 4, 4), 2, attention_factors=(8, 16, 32), head_channels=64).eval()
    image, features = torch.zeros(1, 3, side, side), 0
    started = time.monotonic()
    with torch.no_grad():
        for t in PUBLISHED_TIMES:
            blocks = net.activations(image, torch.tensor([t]), names=PUBLISHED_BLOCKS)
            features += sum(block.shape[1] for block in blocks.values())
    assert features == FEATURES
    return {"seconds": time.monotonic() - started, "weights_gb": 4e-9 * sum(p.numel() for p in net.parameters())}


def comparison(folder: Path, images: int, side: int) -> dict[str, float]:
    """Compare both ways on a small image: the largest difference, and where the argmax differs."""
    import torch

    from medseg_diffusion.networks.pixel_classifier import PixelClassifiers, upsampled

    model = PixelClassifiers(10, FEATURES, CLASSES)
    model.load_state_dict(torch.load(folder / "classifiers.pt", weights_only=True))
    model.eval()
    side //= 4
    blocks = activations(side)(torch.full((1, 1, side, side), 0.5))
    with torch.no_grad():
        started = time.monotonic()
        late = model.maps(blocks, (side, side))
        quick = time.monotonic() - started
        started = time.monotonic()
        features = torch.cat([upsampled(block, (side, side)) for block in blocks], 1).movedim(1, -1).flatten(0, -2)
        early = model(features).unflatten(1, (1, side, side)).movedim(-1, 2).movedim(0, 1)
        slow = time.monotonic() - started
    top = early.topk(2, dim=2).values
    sure = top[:, :, 0] - top[:, :, 1] > 1e-3
    differ = (late.argmax(2) != early.argmax(2)) & sure
    return {
        "largest_difference_of_logits": float((late - early).abs().max()),
        "argmax_differs_where_sure": int(differ.sum()),
        "times_faster": slow / quick,
    }


PARTS = {"training": training, "inference": inference, "network": network, "comparison": comparison}


def in_fresh_process(what: str, folder: Path, images: int, side: int) -> dict[str, float]:
    """Run one part in a fresh process."""
    command = [sys.executable, __file__, "--part", what, "--folder", str(folder)]
    command += ["--images", str(images), "--side", str(side)]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if options.part:
        peak, stop = [0], threading.Event()
        watcher = threading.Thread(target=watch, args=(peak, stop))
        watcher.start()
        try:
            from medseg_diffusion.device import keep_freed_memory

            keep_freed_memory()  # as the commands do
            numbers = PARTS[options.part](options.folder, options.images, options.side)
        finally:
            stop.set()
            watcher.join()
        print(json.dumps({**numbers, "peak_anonymous_gb": peak[0] / 1e9}))
        return
    with TemporaryDirectory() as folder:
        naive = options.side**2 * FEATURES * 4 / 1e9
        print(
            f"published way: {naive:.2f} GB of features an image, {options.images * naive:.1f} GB for all in training"
        )
        for what in PARTS:
            numbers = in_fresh_process(what, Path(folder), options.images, options.side)
            print(f"{what}: " + ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in numbers.items()))


if __name__ == "__main__":
    main()
