"""The files that the commands write are told from scans by their names, and none overwrites another."""

from __future__ import annotations

from pathlib import Path

import pytest

from medseg_diffusion.data.pairs import find_masks
from medseg_diffusion.errors import UsageError
from medseg_diffusion.volumes.inputs import find_scans
from medseg_diffusion.volumes.outputs import anomaly_outputs, refuse_collisions, require_report, segmentation_outputs


@pytest.mark.parametrize("scan", ["case.nii.gz", "case.1.nrrd", "case.png", "case.TIFF"])
def test_no_output_is_taken_for_a_scan(tmp_path: Path, scan: str) -> None:
    path = tmp_path / scan
    outputs = [segmentation_outputs(path, None, 1), anomaly_outputs(path, None, 1)]
    for file in (path, *outputs[0].values(), *outputs[1].values()):
        file.touch()
    assert find_scans(tmp_path) == [path]


def test_of_the_outputs_only_masks_are_evaluated(tmp_path: Path) -> None:
    segmented, scored = tmp_path / "segmented.nii.gz", tmp_path / "scored.nii.gz"
    files = segmentation_outputs(segmented, None, 1)
    for file in (*files.values(), *anomaly_outputs(scored, None, 1).values()):
        file.touch()
    masks = {name: path.name for name, path in find_masks(tmp_path).items()}
    assert masks == {"segmented": "segmented_seg.nii.gz", "scored": "scored_anomaly_mask.nii.gz"}


def test_outputs_of_a_named_file_share_its_name() -> None:
    named = segmentation_outputs(Path("a/scan.nii"), Path("b/liver_seg.nii.gz"), 1)
    assert named["segmentation"] == Path("b/liver_seg.nii.gz")
    assert named["probabilities"] == Path("b/liver_prob.nii.gz") and named["label-table"] == Path("b/liver_dseg.tsv")
    scores = anomaly_outputs(Path("a/scan.nii"), Path("b/head_anomaly.nii.gz"), 1)
    assert scores["map"] == Path("b/head_anomaly.nii.gz") and scores["mask"] == Path("b/head_anomaly_mask.nii.gz")


def test_outputs_that_cannot_be_written_are_refused() -> None:
    scan = Path("scan.nii.gz")
    with pytest.raises(UsageError, match="but there are 2 scans; give a folder"):
        segmentation_outputs(scan, Path("out.nii.gz"), 2)
    with pytest.raises(UsageError, match=r"is not written as \.png; use \.nii\.gz"):
        segmentation_outputs(scan, Path("out.png"), 1)
    with pytest.raises(UsageError, match="would overwrite the scan"):
        refuse_collisions({scan: segmentation_outputs(scan, scan, 1)})
    with pytest.raises(UsageError, match="would both be written to"):
        refuse_collisions({path: segmentation_outputs(path, Path("out"), 2) for path in (scan, Path("b/scan.nii"))})


@pytest.mark.parametrize("suffix", [".dcm", ".mgz", ".hdr", ".npy", ".nii.bz2", ".zip", ".png", ".jpg"])
def test_the_format_that_is_recommended_is_written(suffix: str) -> None:
    """A score map, and the masks of a volume and of a picture."""
    for outputs, scan in (
        (anomaly_outputs, "scan.nii.gz"),
        (segmentation_outputs, "scan.nii.gz"),
        (segmentation_outputs, "scan.png"),
    ):
        if (outputs, scan, suffix) == (segmentation_outputs, "scan.png", ".png"):
            continue
        with pytest.raises(UsageError, match=r"of scan\.(nii\.gz|png) is not written as \.\S+; use ") as caught:
            outputs(Path(scan), Path(f"out{suffix}"), 1)
        for recommended in str(caught.value).rpartition("; use ")[2].split(" or "):
            assert Path(f"out{recommended}") in outputs(Path(scan), Path(f"out{recommended}"), 1).values()


def test_no_scan_and_no_channel_is_overwritten(tmp_path: Path) -> None:
    first, second = tmp_path / "a.nii.gz", tmp_path / "a_seg.nii.gz"
    outputs = {path: segmentation_outputs(path, None, 2) for path in (first, second)}
    with pytest.raises(UsageError, match=r"a.nii.gz: the result would overwrite the scan .*a_seg.nii.gz; give -o"):
        refuse_collisions(outputs)
    channel = tmp_path / "b.nii.gz"
    with pytest.raises(UsageError, match=r"would overwrite the scan .*b.nii.gz"):
        refuse_collisions({first: segmentation_outputs(first, channel, 1)}, [first, channel])


def test_a_scan_that_is_named_in_another_way_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a path with "..", through a link to its folder, and where the scan itself is a link."""
    folder = tmp_path / "in"
    folder.mkdir()
    scan = folder / "a.nii.gz"
    scan.touch()
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder)
    (folder / "b.nii.gz").symlink_to(scan)
    for named, output in (
        (Path("../in/a.nii.gz"), Path("a.nii.gz")),
        (tmp_path / "link" / "a.nii.gz", scan),
        (folder / "b.nii.gz", scan),
        (folder / "b.nii.gz", folder / "b.nii.gz"),
    ):
        with pytest.raises(UsageError, match="would overwrite the scan"):
            refuse_collisions({named: segmentation_outputs(named, output, 1)})
        with pytest.raises(UsageError, match="the report would overwrite the scan"):
            require_report(output, [named])
