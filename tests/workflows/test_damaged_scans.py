"""`medseg segment` on folders of damaged scans: exit code 3 or a whole mask, and nothing else in the output folder."""

from __future__ import annotations

import warnings
from collections import Counter
from itertools import islice
from pathlib import Path

import nibabel as nib
import pytest

from medseg_diffusion.volumes.outputs import segmentation_outputs
from medseg_diffusion.workflows import segment as workflow
from tests.helpers import untrusted_files
from tests.helpers.segmenters import run, thresholding

EVERY = 4
"""One of so many damaged files is segmented; all are read in tests/volumes/test_damaged.py."""


def write_damaged(kind: str, folder: Path) -> list[Path]:
    if kind == "DICOM":
        chosen = islice(untrusted_files.damaged_dicom(), 0, None, EVERY)
        return [untrusted_files.write_series(folder / str(i), one.content) for i, one in enumerate(chosen)]
    make = {
        "NIfTI": untrusted_files.damaged_nifti,
        "NRRD": untrusted_files.damaged_nrrd,
        "MetaImage": untrusted_files.damaged_metaimage,
    }[kind]
    folder.mkdir()
    paths = []
    for number, damaged in enumerate(islice(make(), 0, None, EVERY)):
        paths.append(folder / f"{number}-{damaged.name}")
        paths[-1].write_bytes(damaged.content)
    return paths


@pytest.mark.parametrize("kind", ["NIfTI", "NRRD", "MetaImage", "DICOM"])
def test_damaged_scans_leave_whole_masks_or_nothing(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = thresholding(tmp_path / "model", preprocessing={"spacing_mm": [1.5, 1.5, 3.0]})
    monkeypatch.setattr(workflow, "load_segmenter", lambda *arguments, **options: model)
    scans, output = write_damaged(kind, tmp_path / "in"), tmp_path / "out"
    with warnings.catch_warnings(action="error"):  # what is worth saying is in the result
        results = run(scans, tmp_path / "model", output=output, statistics=True)
    assert [result.scan for result in results] == scans
    wrong, expected = [], set()
    for result in results:
        if result.status == "failed":
            text = result.error or ""
            if result.exit_code != 3 or "\n" in text or not text.startswith(f"{result.scan}: found "):
                wrong.append(f"{result.scan.name}: exit {result.exit_code}, {text}")
            continue
        files = segmentation_outputs(result.scan, output, len(scans))
        expected |= {files["segmentation"], files["statistics"]}
        mask = nib.load(files["segmentation"])
        if len(mask.shape) != 3 or set(mask.get_fdata().ravel()) - {0.0, 1.0}:
            wrong.append(f"{result.scan.name}: a mask of {mask.shape}")
        wrong += [f"{result.scan.name}: {line}" for line in result.warnings if "\n" in line]
    assert not wrong, "; ".join(wrong[:10])
    assert {path for path in output.iterdir() if path.name not in ("failures.csv", "dseg.tsv")} == expected
    counts = Counter(result.status for result in results)
    assert min(counts["done"], counts["failed"]) > 5, counts
