"""The pixels of one file of a collection of images: an image file, or the slices of a scan."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from medseg_diffusion.errors import InputError
from medseg_diffusion.volumes import raster
from medseg_diffusion.volumes.fitting import to_generator_grid
from medseg_diffusion.volumes.io import read_volume
from medseg_diffusion.volumes.preprocessing import Preprocessing

Pixels = npt.NDArray[np.uint8]

FOREGROUND_SHARE = 0.1
"""Smallest share of a slice that must be brighter than the scan's darkest level. Emptier slices are left out."""
PLAIN = Preprocessing()
"""Default preprocessing of scans: RAS, the original voxel size, intensities scaled by percentiles."""
_SKIP = "leave it out with --skip-broken of train-generator or evaluate-generator"


def open_image(source: Path, name: str, content: bytes) -> Image.Image:
    """The decoded image, upright (`raster.upright`).

    Args:
        source: the collection, for messages.
        name: the entry, for messages.
        content: content of the file.

    Raises:
        InputError: a broken image, several in one file, transparency, or levels that are not integers of 8 or 16 bits.
    """
    try:
        stored = Image.open(io.BytesIO(content), formats=(*raster.FORMATS, "WEBP"))
        count = raster.image_count(stored)
        image = raster.upright(stored)
    except raster.BROKEN as error:
        wrong = (f"a broken image ({raster.reason(error)})", "a whole image", f"replace it, or {_SKIP}")
        raise InputError(f"{source}/{name}", *wrong) from error
    levels = np.asarray(image) if image.mode == "I" else np.zeros(1)
    if count > 1:
        wrong = (f"{count} images in one file", "a single image", f"save each as a file of its own, or {_SKIP}")
    elif raster.is_transparent(image):
        wrong = ("transparent pixels", "an opaque image", f"flatten it onto a background, or {_SKIP}")
    elif image.mode == "F" or levels.min() < 0 or levels.max() > 65535:
        found = f"levels that no 16 bits hold (mode {image.mode})"
        wrong = (found, "whole levels of 8 or 16 bits", f"convert it, or {_SKIP}")
    else:
        return image
    raise InputError(f"{source}/{name}", *wrong)


def pixels_of_image(image: Image.Image, size: int, channels: int) -> Pixels:
    """The central square of an image, resized: (1, size, size, channels), greyscale for 1 channel and RGB for 3."""
    image = (_eight_bits(image) if image.mode.startswith("I") else image).convert("L" if channels == 1 else "RGB")
    side = min(image.size)
    if image.size != (size, size):
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.resize((size, size), Image.Resampling.BOX if side >= 2 * size else Image.Resampling.BICUBIC,
                             box=(left, top, left + side, top + side))  # fmt: skip
    return np.asarray(image).reshape(1, size, size, channels)


def pixels_of_scan(file: Path, size: Sequence[int], channels: int, preprocessing: Preprocessing) -> Pixels:
    """The slices of a scan that are not empty, (n, *size, channels), or for three sides the whole scan, with n = 1.

    The scan is preprocessed and brought to the generator's grid as a whole. Intensities -1..1 become 0..255.
    """
    volume, _ = preprocessing.apply(read_volume(file))
    volume = volume.clamp(-1, 1)
    images = volume[None] if len(size) == 3 else volume.movedim(-1, 0)
    if len(size) == 2:
        visible = (images > -0.9).flatten(1).float().mean(1) >= FOREGROUND_SHARE
        images = images[visible]
    levels = ((to_generator_grid(images, size) + 1) * 127.5).round().to(torch.uint8)
    return levels.movedim(1, -1).expand(*levels.shape[:1], *size, channels).numpy()


def _eight_bits(image: Image.Image) -> Image.Image:
    """Greyscale of mode I or I;16 as mode L, with 65535 as 255. Pillow's own conversion clips at 255.

    Mode I does not tell the depth. It counts as 8 bits if no level is above 255.
    """
    levels = np.asarray(image).astype(np.int64)
    deep = image.mode != "I" or levels.max() > 255
    return Image.fromarray(((levels + 128) // 257 if deep else levels).astype(np.uint8))
