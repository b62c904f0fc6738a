"""A folder in the official layout of Tiny ImageNet."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

WNIDS = ("n02", "n01")  # unsorted on purpose, as a file may be


def jpeg(value: int, size: int = 64, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    ramp = np.broadcast_to(2 * np.arange(size, dtype=np.uint8), (size, size))
    pixels = ramp if mode == "L" else np.stack([ramp, np.full_like(ramp, value), ramp.T], axis=2)
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def tiny_imagenet(root: Path, per_class: int = 3) -> Path:
    """Tiny ImageNet in its official layout, with two classes."""
    folder = root / "tiny-imagenet-200"
    (folder / "val" / "images").mkdir(parents=True)
    (folder / "test" / "images").mkdir(parents=True)
    (folder / "wnids.txt").write_text("".join(f"{wnid}\n" for wnid in WNIDS))
    (folder / "words.txt").write_text("n01\tgoldfish, Carassius auratus\nn02\tbullfrog\nn03\tunused\n")
    for c, wnid in enumerate(sorted(WNIDS)):
        images = folder / "train" / wnid / "images"
        images.mkdir(parents=True)
        boxes = []
        for i in range(per_class):
            images.joinpath(f"{wnid}_{i}.JPEG").write_bytes(jpeg(100 * c + i, mode="L" if i == 0 else "RGB"))
            boxes.append(f"{wnid}_{i}.JPEG\t{i}\t1\t60\t61\n")
        (images.parent / f"{wnid}_boxes.txt").write_text("".join(boxes))
    notes = []
    for i in range(4):
        (folder / "val" / "images" / f"val_{i}.JPEG").write_bytes(jpeg(30 + i))
        notes.append(f"val_{i}.JPEG\t{WNIDS[i % 2]}\t0\t0\t10\t10\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(notes))
    for i in range(5):
        (folder / "test" / "images" / f"test_{i}.JPEG").write_bytes(jpeg(200 + i))
    return folder
