"""Batches of images as one picture."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from medseg_diffusion.files import write_files

_TITLE_PIXELS, _MARGIN = 14, 6


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


def sheet(sections: Mapping[str, npt.NDArray[np.uint8]]) -> npt.NDArray[np.uint8]:
    """Pictures (H, W, 3) below each other, each under its title, as one picture."""
    font = ImageFont.load_default(_TITLE_PIXELS)
    widths = [picture.shape[1] for picture in sections.values()] + [math.ceil(font.getlength(t)) for t in sections]
    height = sum(picture.shape[0] + 2 * _TITLE_PIXELS for picture in sections.values())
    whole, top = Image.new("RGB", (max(widths) + 2 * _MARGIN, height), "white"), 0
    for title, picture in sections.items():
        ImageDraw.Draw(whole).text((_MARGIN, top + _TITLE_PIXELS // 4), title, "black", font)
        whole.paste(Image.fromarray(picture), (_MARGIN, top + 2 * _TITLE_PIXELS - _MARGIN))
        top += picture.shape[0] + 2 * _TITLE_PIXELS
    return np.asarray(whole)


def outlined(
    image: npt.NDArray[np.uint8], mask: npt.NDArray[np.integer], colours: Mapping[int, str]
) -> npt.NDArray[np.uint8]:
    """An image (H, W, 3) in which the border pixels of every label of a mask (H, W) have the colour of the label."""
    picture = image.copy()
    padded = np.pad(mask, 1, mode="edge")
    around = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
    border = np.logical_or.reduce([mask != other for other in around])
    for value, colour in colours.items():
        picture[border & (mask == value)] = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
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
