"""Scans and their results, read again from their files for the viewer of a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from medseg_diffusion.volumes.io import upright
from medseg_diffusion.volumes.volume import Volume

from .run_report import described

MOST_VIEWED = 20
"""Largest number of scans in the viewer of a page."""


def how_far(done: int, count: int, error: BaseException) -> str:
    """What a page says of a call that an error has ended before all scans were processed."""
    by = {"KeyboardInterrupt": "Ctrl-C", "SystemExit": "a signal"}.get(type(error).__name__) or described(error)
    return f"the call was stopped after {done} of {count} scans: {by}"


def onto(result: Volume, scan: Volume) -> Volume:
    """A result on the grid of its scan.

    Args:
        result: (1, I', J', K') on the scan's grid or a part of it, with the axes in any order.
        scan: (C, I, J, K).

    Returns:
        (1, I, J, K) of the result's type, 0 outside the part.
    """
    turned = result.oriented(scan.axcodes)
    first = np.rint((np.linalg.inv(scan.affine) @ turned.affine)[:3, 3]).astype(int).tolist()
    data = torch.zeros(1, *scan.shape, dtype=result.data.dtype)
    # Both ends are cut: a damaged header must not end in an error of indices.
    low = [max(0, start) for start in first]
    high = [max(0, min(n, start + m)) for n, m, start in zip(scan.shape, turned.shape, first, strict=True)]
    to = tuple(slice(a, max(a, b)) for a, b in zip(low, high, strict=True))
    part = tuple(slice(a.start - start, a.stop - start) for a, start in zip(to, first, strict=True))
    data[(slice(None), *to)] = turned.data[(slice(0, 1), *part)]
    return scan.like(data)


def shown(volume: Volume, scan: Path) -> NDArray[Any]:
    """A volume on the grid of a scan, (I, J, K) in the orientation of pictures."""
    array: NDArray[Any] = upright(volume, scan).data[0].numpy()
    return array
