"""Damaged files of every format: one line and exit code 3, or a right reading; quickly, and with little memory."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medseg_diffusion.errors import InputError
from medseg_diffusion.volumes.io import read_labels, read_volume
from medseg_diffusion.volumes.volume import Volume
from tests.helpers import untrusted_files
from tests.helpers.untrusted_files import Damaged

KINDS: dict[str, tuple[Callable[[], Iterator[Damaged]], int]] = {
    "NIfTI": (untrusted_files.damaged_nifti, 400),
    "NRRD": (untrusted_files.damaged_nrrd, 500),
    "MetaImage": (untrusted_files.damaged_metaimage, 600),
    "DICOM": (untrusted_files.damaged_dicom, 200),
}
"""Damaged files of a format, and the least number of them."""
SECONDS, MEGABYTES = 2.0, 1000.0


@contextmanager
def bounded() -> Iterator[list[str]]:
    """What was exceeded in the block: `SECONDS` of this process, or `MEGABYTES` more than before at its peak."""
    exceeded: list[str] = []
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    before, started = _peak(), time.process_time()
    yield exceeded
    seconds, megabytes = time.process_time() - started, _peak() - before
    if seconds > SECONDS or megabytes > MEGABYTES:
        exceeded.append(f"took {seconds:.1f} s and {megabytes:.0f} MB")


def _peak() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def outcome(path: Path, read: Callable[[Path], Volume]) -> tuple[Volume | None, list[str]]:
    """The volume, or None if it was refused; and everything that must not be."""
    wrong: list[str] = []
    volume = None
    with bounded() as exceeded, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            volume = read(path)
        except InputError as error:
            message = str(error)
            if "\n" in message or not message.startswith(f"{path}: found ") or error.exit_code != 3:
                wrong.append(f"says {message!r}")
        except Exception as error:
            wrong.append(f"raised {type(error).__name__}: {error}")
    wrong += [
        f"warned {str(one.message)!r}"
        for one in caught
        if one.category is not UserWarning or not str(one.message).startswith(f"{path.name}: ")
    ]
    return volume, wrong + exceeded


def differs(volume: Volume, damaged: Damaged, path: Path) -> str:
    """What is wrong with a reading that was not refused; empty if nothing is."""
    values, sound = volume.data[0].numpy(), untrusted_files.voxels().astype(np.float32)
    if not np.isfinite(values).all() or not np.isfinite(volume.affine).all():
        return "numbers that are not finite"
    if "dicom" in str(path.parent):
        sound = 2 * sound - 5
    same = values.shape == sound.shape and np.array_equal(values, sound)
    if damaged.checked and not same:
        return "other voxels than the sound file, although they have a check sum"
    if same or damaged.voxels == "any":
        return ""
    if values.shape != sound.shape and damaged.voxels != "header":
        return f"{values.shape} voxels"
    if damaged.voxels == "one" and np.count_nonzero(values != sound) <= 1:
        return ""
    if damaged.voxels == "header" and np.array_equal(values, nib.load(path).get_fdata(dtype=np.float32)):
        return ""
    return "voxels that are not those of the file"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory by Linux's /proc")
@pytest.mark.filterwarnings("ignore:.*qform:UserWarning")
@pytest.mark.parametrize(
    ("kind", "read"),
    [*((kind, read_volume) for kind in KINDS), *((kind, read_labels) for kind in KINDS if kind != "DICOM")],
)
def test_every_damaged_file_is_refused_in_one_line_or_read_rightly(kind: str, read, tmp_path: Path) -> None:
    make, fewest = KINDS[kind]
    wrong, counts = [], Counter[str]()
    for number, damaged in enumerate(make()):
        if kind == "DICOM":
            path = untrusted_files.write_series(tmp_path / "dicom" / f"{number}", damaged.content)
        else:
            path = tmp_path / damaged.name
            path.write_bytes(damaged.content)
        volume, problems = outcome(path, read)
        counts["refused" if volume is None else "read"] += 1
        if volume is not None and (problem := differs(volume, damaged, path)):
            problems.append(problem)
        wrong += [f"{damaged.name}: {problem}" for problem in problems]
    assert not wrong, f"{len(wrong)} problems: " + "; ".join(wrong[:12])
    assert sum(counts.values()) >= fewest and min(counts["refused"], counts["read"]) > 20
