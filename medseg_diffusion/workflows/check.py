"""`medseg check`: report counts, sizes, classes and broken files of a data set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from medseg_diffusion.data.image_check import ImageCheck, check_images
from medseg_diffusion.data.images import find_images


def check(data: Path, on_file: Callable[[int, int], None] = lambda done, total: None) -> ImageCheck:
    """Open every file of a data set. Broken files are listed in the result and raise no error.

    Args:
        data: A folder or zip of images, or a folder of scans.
        on_file: Called with (files done, all files).

    Raises:
        InputError: The path holds no images.
    """
    return check_images(find_images(data), on_file)
