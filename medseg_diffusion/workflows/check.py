"""`medseg check`: a data set in, counts, sizes, classes and broken files out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from medseg_diffusion.data.image_check import ImageCheck, check_images
from medseg_diffusion.data.images import find_images


def check(data: Path, on_file: Callable[[int, int], None] = lambda done, total: None) -> ImageCheck:
    """Opens every file of a data set; broken files are listed, not raised.

    Args:
        data: a folder or zip of images, or a folder of scans.
        on_file: called with (files done, all files).

    Raises:
        InputError: nothing that could be images.
    """
    return check_images(find_images(data), on_file)
