"""Batches of images as one picture."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from medseg_diffusion.files import write_files


def grid(images: Tensor, columns: int | None = None, gap: int = 2) -> npt.NDArray[np.uint8]:
    """Arrange images (N, 1 or 3, H, W) in [-1, 1] in a grid (H', W', 3) uint8, by default about square."""
    levels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).expand(-1, -1, -1, 3)
    count, height, width, _ = levels.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = -(-count // columns)
    picture = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for i, image in enumerate(levels.cpu().numpy()):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        picture[top : top + height, left : left + width] = image
    return picture


def as_pictures(images: Tensor) -> Tensor:
    """Images (N, C, H, W) unchanged, or the middle slice of RAS volumes (N, C, I, J, K): (N, C, J, I).

    Anterior is up and the patient's right is on the left.
    """
    return images if images.ndim == 4 else images[..., images.shape[-1] // 2].transpose(2, 3).flip(2, 3)


def png(picture: npt.NDArray[np.uint8]) -> bytes:
    """Encode (H, W, 3) or (H, W) uint8 as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def write_png(picture: npt.NDArray[np.uint8], path: Path) -> None:
    """Write a PNG file; an error leaves no partial file."""
    write_files(path.parent, {path.name: png(picture)})
