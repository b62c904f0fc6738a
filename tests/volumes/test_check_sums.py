"""A flipped bit in compressed voxels is found by their check sum, in every format that has one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from PIL import Image

from medseg_diffusion.errors import InputError
from medseg_diffusion.volumes.io import read_volume


def written(path: Path) -> Path:
    """Noise, which hardly compresses: its bytes lie in the file almost as they are."""
    values = np.random.default_rng(0).integers(0, 255, (16, 16, 16), dtype=np.uint8)
    if path.suffix == ".png":
        Image.fromarray(values.reshape(64, 64)).save(path)
    else:
        sitk.WriteImage(sitk.GetImageFromArray(values), str(path), useCompression=True)
    return path


@pytest.mark.parametrize("suffix", [".mha", ".mhd", ".nrrd", ".png"])
def test_a_flipped_bit_is_found(suffix: str, tmp_path: Path) -> None:
    path = written(tmp_path / f"scan{suffix}")
    expected = read_volume(path).data
    data = next(tmp_path.glob("*.zraw"), path)
    content = data.read_bytes()
    for place in range(len(content) // 3, len(content) - 20, 211):
        damaged = bytearray(content)
        damaged[place] ^= 4
        data.write_bytes(damaged)
        with pytest.raises(InputError, match="scan"):
            read_volume(path)
    data.write_bytes(content)
    assert torch.equal(read_volume(path).data, expected)


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
def test_uncompressed_voxels_have_no_sum(suffix: str, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 255, (8, 8, 8), dtype=np.uint8)
    sitk.WriteImage(sitk.GetImageFromArray(values), str(tmp_path / f"a{suffix}"), useCompression=False)
    assert read_volume(tmp_path / f"a{suffix}").shape == (8, 8, 8)
