"""How fast are training examples read, beside torchvision's ImageFolder and MONAI's CacheDataset?

    python benchmarks/data.py [--images tiny-imagenet-200.zip]

Images: arrays of the same pictures in the same random order, from our packed collection and from ImageFolder. Volumes:
random training windows of prepared scans, which we map from disk and CacheDataset keeps in memory; the time to prepare
them; and the memory that they take in every process.
"""

from __future__ import annotations

import argparse
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from common import Number, Options, Row, installed, main, quiet
from PIL import Image

from medseg_diffusion.data.cases import find_cases
from medseg_diffusion.data.image_cache import packed
from medseg_diffusion.data.mask_examples import CaseFormat, MaskExamples, prepare
from medseg_diffusion.volumes.preprocessing import Preprocessing


def write_images(folder: Path, count: int) -> None:
    """Smooth JPEGs of 64 x 64 pixels in two classes."""
    random = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        path = folder / ("a" if i % 2 else "b") / f"{i:05d}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse.resize((64, 64), Image.Resampling.BICUBIC).save(path, quality=90)


def images(options: Options, folder: Path) -> Iterator[Row]:
    source = options.rest.images
    if source is None:
        source = folder / "images"
        write_images(source, options.size(2000, 20))
        root = source
    else:
        with zipfile.ZipFile(source) as archive:
            archive.extractall(folder)
        root = next(folder.glob("*/train"))
    packing: list[float] = [options.seconds(lambda: packed(source, folder / "store", 64))]
    own = packed(source, folder / "store", 64)
    order = np.random.default_rng(0).permutation(len(own.images) if options.rest.images is None else own.part("train"))
    order = order[: options.size(2000, 10)]
    text = f"{len(order)} images of 64 x 64 in random order"
    runs: dict[str, Callable[[], object]] = {"ours": lambda: [np.array(own.images[i]) for i in order]}
    if installed("torchvision"):
        from torchvision.datasets import ImageFolder

        theirs = ImageFolder(str(root))
        places = {Path(path).name: i for i, (path, _) in enumerate(theirs.samples)}
        same = [places[Path(own.names[i]).name] for i in order]
        for i, k in zip(order[:20], same[:20], strict=True):
            assert np.array_equal(own.images[i], np.asarray(theirs[k][0]))
        runs["ImageFolder"] = lambda: [np.array(theirs[k][0]) for k in same]
    times = options.in_turns(runs)
    note = f"packed once in {packing[0]:.1f} s; the arrays are equal"
    yield Row(text, "torchvision ImageFolder", times["ours"], times.get("ImageFolder"), note=note)


def write_scans(folder: Path, count: int, side: int) -> None:
    random = np.random.default_rng(0)
    for i in range(count):
        for name, data in (
            ("images", random.normal(100, 20, (side,) * 3).astype(np.float32)),
            ("labels", (random.random((side,) * 3) > 0.9).astype(np.uint8)),
        ):
            (folder / name).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(data, np.diag([1.0, 1, 1, 1])), folder / name / f"s{i}.nii.gz")


def volumes(options: Options, folder: Path) -> Iterator[Row]:
    count, side, window = options.size(8, 2), options.size(128, 16), options.size(64, 8)
    write_scans(folder, count, side)
    cases = find_cases(folder).cases
    preprocessing = Preprocessing("RAS", intensity="zscore")
    cache = iter(folder / f"cache-{i}" for i in range(100))
    prepared: list[Any] = []
    datasets: list[Any] = []

    def ours() -> None:
        prepared[:] = prepare(cases, preprocessing, CaseFormat(1, 2), next(cache))

    # Before the first turn, which would otherwise count the import.
    from monai import transforms as mt
    from monai.data import CacheDataset

    def monai() -> None:
        keys = ["image", "label"]
        steps = [
            mt.LoadImaged(keys), mt.EnsureChannelFirstd(keys), mt.Orientationd(keys, "RAS"),
            mt.NormalizeIntensityd(["image"]), mt.RandSpatialCropd(keys, [window] * 3, random_size=False),
        ]  # fmt: skip
        files = [{"image": str(case.image), "label": str(case.label)} for case in cases]
        datasets[:] = [CacheDataset(files, mt.Compose(steps), num_workers=1, progress=False)]

    times = options.in_turns({"ours": ours, "monai": monai}, warm=0)
    scans = f"{count} scans of {side}^3"
    yield Row(
        f"prepare {scans}", "MONAI CacheDataset", times["ours"], times["monai"], note="ours once for all trainings"
    )
    examples, theirs = MaskExamples(prepared, [window] * 3), datasets[0]
    draws = options.size(200, 4)
    generator = torch.Generator().manual_seed(0)
    times = options.in_turns(
        {
            "ours": lambda: [examples.example(i % count, generator) for i in range(draws)],
            "monai": lambda: [theirs[i % count] for i in range(draws)],
        }
    )
    text = f"{draws} windows of {window}^3 from {scans}"
    yield Row(text, "MONAI CacheDataset", times["ours"], times["monai"])
    cached = sum(value.nbytes for i in range(count) for value in (theirs._cache[i]["image"], theirs._cache[i]["label"]))
    resident = sum(case.image.nbytes + case.label.nbytes for case in prepared if case.store is None)
    yield Row(
        f"memory of {scans} in each process, beside what all processes share", "MONAI CacheDataset",
        Number.of([resident / 1e6]), Number.of([cached / 1e6]), "MB",
        "ours is mapped from one file, and shared by workers and ranks",
    )  # fmt: skip


def rows(options: Options) -> Iterator[Row]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        yield from images(options, Path(folder) / "pictures")
        yield from volumes(options, Path(folder) / "scans")


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=Path, help="zip of images in ImageNet's layout; default: generated ones")


if __name__ == "__main__":
    with quiet():
        main("data", __doc__, rows, repeats=3, add=add)
