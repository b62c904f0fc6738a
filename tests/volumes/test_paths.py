"""Which files are scans, and what they are called."""

from __future__ import annotations

import pytest

from medseg_diffusion.errors import InputError
from medseg_diffusion.volumes.inputs import find_scans
from medseg_diffusion.volumes.paths import scan_name


def test_scan_names() -> None:
    assert [scan_name(p) for p in ("x/a.nii.gz", "a.b.nii", "A.NII.GZ", "a.nrrd")] == ["a", "a.b", "A", "a"]
    with pytest.raises(InputError, match="suffix"):
        scan_name("a.docx")


def test_find_scans(tmp_path) -> None:
    for name in ("b.nii.gz", "a.nrrd", "c_seg.nii", "c_prob.mha", "d_uncertainty.nii.gz", "e_anomaly.nii.gz"):
        (tmp_path / name).touch()
    for name in ("e_anomaly_mask.nii.gz", ".hidden.nii", "notes.txt", "segment.mhd"):
        (tmp_path / name).touch()
    assert [p.name for p in find_scans(tmp_path)] == ["a.nrrd", "b.nii.gz", "segment.mhd"]
    assert find_scans(tmp_path / "c_seg.nii") == [tmp_path / "c_seg.nii"]
    (tmp_path / "results").mkdir()
    with pytest.raises(InputError, match="a folder without scans"):
        find_scans(tmp_path / "results")
    (tmp_path / "results" / "a_seg.nii").touch()
    with pytest.raises(InputError, match="only results"):
        find_scans(tmp_path / "results")
    with pytest.raises(InputError, match="no such file"):
        find_scans(tmp_path / "missing")
