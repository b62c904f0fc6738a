"""Compares random access to packed images with torchvision's ImageFolder, on one core in one run.

    python benchmarks/image_cache.py tiny-imagenet-200.zip

Both give uint8 arrays of the same training images in the same random order. Packing is done once and timed separately.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from torchvision.datasets import ImageFolder

from medseg_diffusion.data.image_cache import packed


def main() -> None:
    """Print images per second of both, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path)
    parser.add_argument("--count", type=int, default=5000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        images = packed(options.archive, Path(folder) / "store", 64)
        print(f"packing {len(images.images)} images: {time.perf_counter() - began:.1f} s")
        with zipfile.ZipFile(options.archive) as archive:
            archive.extractall(folder)
        root = next(Path(folder).glob("*/train"))
        theirs = ImageFolder(str(root))
        places = {Path(path).name: i for i, (path, _) in enumerate(theirs.samples)}
        order = np.random.default_rng(0).permutation(images.part("train"))[: options.count]
        same = [places[Path(images.names[i]).name] for i in order]
        assert all(
            np.array_equal(images.images[i], np.asarray(theirs[k][0]))
            for i, k in zip(order[:50], same[:50], strict=True)
        )
        rates: dict[str, list[float]] = {"packed": [], "ImageFolder": []}
        for _ in range(3):
            began = time.perf_counter()
            for i in order:
                np.array(images.images[i])
            rates["packed"].append(len(order) / (time.perf_counter() - began))
            began = time.perf_counter()
            for k in same:
                np.array(theirs[k][0])
            rates["ImageFolder"].append(len(order) / (time.perf_counter() - began))
        ours, peer = (max(values) for values in rates.values())
        print(f"packed {ours:,.0f} images/s, ImageFolder {peer:,.0f} images/s, ratio {ours / peer:.1f}")


if __name__ == "__main__":
    main()
