"""`medseg segment --labels` and `--tissues`: all outputs tell of the chosen classes, and names travel with the mask."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch

from medseg_diffusion.api.models import Segmenter, load_model
from medseg_diffusion.data.brain_classes import STRUCTURES as BRAIN
from medseg_diffusion.data.brain_classes import tissues_of
from medseg_diffusion.data.class_names import class_names, names_in_table
from medseg_diffusion.errors import UsageError
from medseg_diffusion.models.store import load_model_files, save_model
from medseg_diffusion.reports.theme import class_colours
from medseg_diffusion.volumes.io import stored_labels, write_labels, write_map
from medseg_diffusion.volumes.label_table import Label, to_tsv
from medseg_diffusion.volumes.volume import Volume
from medseg_diffusion.workflows.evaluate import EvaluateOptions, evaluate
from medseg_diffusion.workflows.label_files import LabelFiles
from medseg_diffusion.workflows.scans import ScanResult
from medseg_diffusion.workflows.train_segmenter import train_segmenter
from tests.helpers.cli import error_lines, medseg
from tests.helpers.dicom_series import series
from tests.helpers.segmenters import STRUCTURES, calibrated, run, save, structures_model, with_seen

CHOICE = "Hippocampus,other-csf"
CHOSEN = {1: "left hippocampus", 2: "right hippocampus", 5: "other CSF"}
EVERYTHING = {
    "ensemble": 3, "save_probabilities": True, "save_uncertainty": True, "save_members": True,
    "save_pseudo_labels": True, "statistics": True, "preview": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five structures, untrained, with a calibration."""
    plain = structures_model(tmp_path_factory.mktemp("models") / "plain")
    return calibrated(plain, plain.with_name("brain"), volume_errors=[0.1] * 5, agreement=0.5)


def array(result: ScanResult, kind: str) -> np.ndarray:
    return np.asarray(nib.load(result.outputs[kind]).dataobj)


def statistics(result: ScanResult) -> dict[str, dict[str, object]]:
    return json.loads(result.outputs["statistics"].read_text())  # type: ignore[no-any-return]


def only(labels: np.ndarray) -> np.ndarray:
    return np.where(np.isin(labels, list(CHOSEN)), labels, 0)


def test_a_choice_changes_no_voxel_and_no_number_of_what_is_chosen(tmp_path: Path, model: Path) -> None:
    scan = save(tmp_path / "scan.nii.gz")
    page = tmp_path / "page.html"
    (whole,) = run([scan], model, output=tmp_path / "all", **EVERYTHING)
    (some,) = run([scan], model, output=tmp_path / "some", labels=CHOICE, report=page, **EVERYTHING)
    mask = array(whole, "segmentation")
    assert set(np.unique(mask)) > set(CHOSEN), "the untrained model shows every class"
    np.testing.assert_array_equal(array(some, "segmentation"), only(mask))
    np.testing.assert_array_equal(array(some, "members"), only(array(whole, "members")))
    np.testing.assert_array_equal(array(some, "uncertainty"), array(whole, "uncertainty"))
    doubtful = array(whole, "pseudo-labels") == 255
    np.testing.assert_array_equal(array(some, "pseudo-labels"), np.where(doubtful, 255, only(mask)))
    p, chosen = array(whole, "probabilities"), array(some, "probabilities")
    np.testing.assert_array_equal(chosen[..., 1:], p[..., list(CHOSEN)])
    np.testing.assert_allclose(chosen.sum(-1), 1, atol=1e-5)
    assert some.quality == whole.quality is not None and some.level == whole.level is not None
    for numbers in ("volumes_ml", "members_ml", "intervals_ml"):
        expected = {name: getattr(whole, numbers)[name] for name in CHOSEN.values()}
        assert getattr(some, numbers) == expected, numbers
    classes = statistics(some)["classes"]
    assert classes == {name: statistics(whole)["classes"][name] for name in CHOSEN.values()}
    assert [entry["label"] for entry in classes.values()] == list(CHOSEN)
    # Without the code of the viewer, which knows names of structures, too.
    text = re.sub(r"<script.*?</script>", "", page.read_text(), flags=re.DOTALL)
    assert "other CSF" in text and "white matter" not in text and "cerebral cortex" not in text
    assert some.outputs["preview"].stat().st_size != whole.outputs["preview"].stat().st_size


def test_a_choice_hides_no_doubt_about_the_whole_segmentation(tmp_path: Path) -> None:
    """White matter of a microlitre says that the scan is not for the model, whatever is written of it."""
    plain = structures_model(tmp_path / "plain")
    model = calibrated(plain, tmp_path / "model", volume_errors=[0.1] * 5)
    with_seen(model, classes={"white matter": {"volume_ml": [400, 500], "image_share": [0.3, 0.4]}})
    scan = save(tmp_path / "scan.nii.gz")
    (whole,) = run([scan], model, output=tmp_path / "a.nii.gz", ensemble=3)
    (some,) = run([scan], model, output=tmp_path / "b.nii.gz", ensemble=3, labels=CHOICE)
    assert "unlike training" in whole.flags and any("white matter of " in warning for warning in whole.warnings)
    assert (some.flags, some.warnings, some.quality) == (whole.flags, whole.warnings, whole.quality)
    assert not some.intervals_ml and not whole.intervals_ml


def test_names_and_colours_travel_with_every_mask(tmp_path: Path, model: Path) -> None:
    scan = save(tmp_path / "scan.nii.gz")
    (result,) = run([scan], model, output=tmp_path / "out", labels=CHOICE, **EVERYTHING)
    for kind in ("segmentation", "members"):
        assert stored_labels(result.outputs[kind]) == CHOSEN
    assert stored_labels(result.outputs["pseudo-labels"]) == {**CHOSEN, 255: "ignored"}
    with result.outputs["label-table"].open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    colours = class_colours(CHOSEN)
    assert rows == [{"index": str(v), "name": name, "color": colours[v]} for v, name in CHOSEN.items()]
    mask = result.outputs["segmentation"]
    assert class_names([mask]) == (CHOSEN, [])
    for file in ("label-table", "statistics"):  # the next in the order of trust says the same
        result.outputs[file].unlink()
        assert class_names([mask]) == (CHOSEN, [])
    evaluation = evaluate(mask, mask, tmp_path / "evaluation")
    assert evaluation.labels == CHOSEN and evaluation.means["dice"][5].mean == 1


def test_masks_of_one_folder_share_a_table_and_another_table_is_refused(tmp_path: Path, model: Path) -> None:
    scans, out = [save(tmp_path / f"{name}.nii.gz") for name in "ab"], tmp_path / "out"
    results = run(scans, model, output=out, labels=CHOICE, volumes=True)
    assert sorted(path.name for path in out.iterdir()) == ["a_seg.nii.gz", "b_seg.nii.gz", "dseg.tsv", "volumes.csv"]
    assert class_names([out / "a_seg.nii.gz"]) == (CHOSEN, [])
    header = (out / "volumes.csv").read_text().splitlines()[0]
    assert "other CSF_volume_ml" in header and "white matter" not in header
    again = run(scans, model, output=out, labels=CHOICE, volumes=True, skip_existing=True)
    assert [result.status for result in again] == ["skipped"] * 2
    assert [result.volumes_ml for result in again] == [pytest.approx(result.volumes_ml) for result in results]
    table = (out / "dseg.tsv").read_text().replace("\t#", "\t#00")
    (out / "dseg.tsv").write_text(table)  # other colours do no harm
    assert run(scans, model, output=out, labels=CHOICE)[0].status == "done"
    assert (out / "dseg.tsv").read_text() == table
    for content in (None, "my own work", "name\tindex\nCSF\n"):
        (out / "dseg.tsv").write_text(content or table)
        with pytest.raises(UsageError, match=r"dseg\.tsv: names other classes than .*; move it, or give -o another"):
            run(scans, model, output=out, labels=CHOICE if content else None)


def test_masks_of_several_folders_name_themselves_and_a_table_beside_one_is_not_passed_over(
    tmp_path: Path, model: Path
) -> None:
    scans = [save(tmp_path / name / "scan.nii.gz") for name in "cd"]
    run(scans, model, statistics=True)
    assert not list(tmp_path.glob("[cd]/*.tsv"))
    mask = tmp_path / "d" / "scan_seg.nii.gz"
    assert class_names([mask])[0] == {value: name for value, name in STRUCTURES.items() if value}
    run(scans, model, tissues=True)  # without statistics: those beside the masks are of the structures
    assert class_names([mask]) == ({1: "CSF", 2: "grey matter", 3: "white matter"}, [])
    (mask.parent / "dseg.tsv").write_text("index\tname\n1\tliver\n")
    with pytest.raises(UsageError, match=r"d/dseg\.tsv: names other classes than those of this call \(CSF, grey"):
        run(scans, model, tissues=True)


def test_the_table_of_one_scan_follows_its_mask(tmp_path: Path, model: Path) -> None:
    """It counts before the table of the folder, whichever call has written it."""
    scans, out = [save(tmp_path / f"{name}.nii.gz") for name in "ab"], tmp_path / "out"
    run(scans[:1], model, output=out, tissues=True)
    assert class_names([out / "a_seg.nii.gz"])[0] == {1: "CSF", 2: "grey matter", 3: "white matter"}
    run(scans, model, output=out, labels=CHOICE)
    assert [class_names([out / f"{name}_seg.nii.gz"]) for name in "ab"] == [(CHOSEN, [])] * 2
    assert not (out / "b_dseg.tsv").exists()
    (named,) = run(scans[:1], model, output=tmp_path / "sub-1_dseg.nii.gz", labels=CHOICE)
    assert named.outputs["label-table"] == tmp_path / "sub-1_dseg.tsv"
    assert class_names([tmp_path / "sub-1_dseg.nii.gz"]) == (CHOSEN, [])


def test_a_table_that_another_call_wrote_meanwhile_is_kept(tmp_path: Path) -> None:
    masks = [tmp_path / f"{name}_seg.nii.gz" for name in "ab"]
    files = [LabelFiles(names, masks, None) for names in ({1: "CSF"}, {1: "CSF"}, {1: "liver"})]
    own = tmp_path / "a_dseg.tsv"
    assert [one.write(own) for one in files[:2]] == [{}, {}]
    with pytest.raises(UsageError, match=r"dseg\.tsv: names other classes than those of this call \(liver\)"):
        files[2].write(own)
    assert names_in_table(tmp_path / "dseg.tsv") == {1: "CSF"} and not own.exists()


@pytest.mark.parametrize("output_format", ["nifti", "dicom-seg"])
def test_a_finished_mask_of_other_classes_is_no_result(tmp_path: Path, model: Path, output_format: str) -> None:
    """What a mask lacks may never have been looked for: its volume is not 0, it is unknown."""
    scan = series(tmp_path / "scan")
    options: dict[str, object] = {"output": tmp_path / "out", "output_format": output_format}
    (first,) = run([scan], model, labels=CHOICE, **options)
    (same,) = run([scan], model, labels=CHOICE, skip_existing=True, **options)
    assert same.volumes_ml == pytest.approx(first.volumes_ml) and "warning" not in same.flags
    for other in ({}, {"labels": "hippocampus"}, {"tissues": True}):
        (skipped,) = run([scan], model, skip_existing=True, **options, **other)
        assert not skipped.volumes_ml and skipped.flags == ("warning",)
        assert "a mask of the classes left hippocampus, right hippocampus, other CSF" in skipped.warnings[0]


def test_a_dicom_segmentation_has_the_chosen_classes_as_its_segments(tmp_path: Path, model: Path) -> None:
    scan = series(tmp_path / "scan")
    (nifti,) = run([scan], model, labels=CHOICE, output=tmp_path / "mask.nii.gz")
    page = tmp_path / "page.html"
    (result,) = run([scan], model, labels=CHOICE, output=tmp_path / "mask.dcm", report=page)
    file = pydicom.dcmread(result.outputs["segmentation"])
    assert [(s.SegmentNumber, s.SegmentLabel) for s in file.SegmentSequence] == list(enumerate(CHOSEN.values(), 1))
    parameters = file.SegmentSequence[0].SegmentationAlgorithmIdentificationSequence[0].AlgorithmParameters
    assert "labels=left hippocampus, right hippocampus, other CSF" in parameters
    voxels = {name: round(volume, 6) for name, volume in nifti.volumes_ml.items()}
    assert {name: round(volume, 6) for name, volume in result.volumes_ml.items()} == voxels and all(voxels.values())
    assert not list(tmp_path.glob("*.tsv"))[1:], "only the NIfTI mask has a table: segments have other numbers"
    assert "other CSF" in page.read_text()


def test_probabilities_of_chosen_classes_are_evaluated_by_their_names(tmp_path: Path) -> None:
    """Their channels are not those of the values: read by place, certain and right ones would be wrong."""
    like = Volume(torch.zeros(1, 8, 8, 8), np.eye(4))
    labels = torch.ones(8, 8, 8, dtype=torch.uint8)
    labels[:4] = 5
    write_labels(labels, like, tmp_path / "reference_seg.nii.gz")
    folder = tmp_path / "p"
    folder.mkdir()
    mask = folder / "reference_seg.nii.gz"
    write_labels(torch.where(labels == 5, 5, 0), like, mask, {5: Label("other CSF", "#474F52")})
    p = (labels == 5).float()
    write_map(torch.stack([1 - p, p]), like, folder / "reference_prob.nii.gz")
    found = evaluate(mask, tmp_path / "reference_seg.nii.gz", tmp_path / "e", EvaluateOptions(labels=[5]))
    assert found.reliability is not None and found.reliability.ece == 0
    assert found.labels == {5: "other CSF"} and found.means["dice"][5].mean == 1


@pytest.mark.parametrize(("suffix", "chosen", "other"), [(".nii.gz", 1, 5), (".nrrd", 2, 1)])
def test_what_was_not_chosen_is_what_the_first_channel_is_of(
    tmp_path: Path, suffix: str, chosen: int, other: int
) -> None:
    """Also where the chosen values are the first ones, and where a table names them because the mask cannot."""
    like, folder = Volume(torch.zeros(1, 8, 8, 8), np.eye(4)), tmp_path / "p"
    labels = torch.full((8, 8, 8), other, dtype=torch.uint8)
    labels[:4] = chosen
    folder.mkdir()
    write_labels(labels, like, tmp_path / "a_seg.nii.gz")
    mask, table = folder / f"a_seg{suffix}", {chosen: Label("vessel", "#474F52")}
    write_labels(torch.where(labels == chosen, chosen, 0), like, mask, table)
    if suffix != ".nii.gz":
        (folder / "a_dseg.tsv").write_text(to_tsv(table))
    p = (labels == chosen).float()
    write_map(torch.stack([1 - p, p]), like, folder / "a_prob.nii.gz")
    found = evaluate(mask, tmp_path / "a_seg.nii.gz", tmp_path / "e", EvaluateOptions(labels=[chosen]))
    assert found.reliability is not None and found.reliability.ece == 0


# ---- tissues ---------------------------------------------------------------------------------------------------------


def test_a_tissue_is_the_sum_of_its_structures(tmp_path: Path, model: Path) -> None:
    scan = save(tmp_path / "scan.nii.gz")
    structures, tissues = load_model(model, "cpu", ensemble=1), load_model(model, "cpu", ensemble=1, tissues=True)
    assert isinstance(structures, Segmenter) and isinstance(tissues, Segmenter)
    assert tissues.classes == {0: "background", 1: "CSF", 2: "grey matter", 3: "white matter"}
    p = structures.segment(scan, maps=["probabilities"]).probabilities
    found = tissues.segment(scan, maps=["probabilities", "members"])
    sums = np.stack([p[0], p[5], p[1] + p[2] + p[3], p[4]])
    np.testing.assert_allclose(found.probabilities, sums, atol=1e-5)
    sure = np.sort(sums, 0)[-1] - np.sort(sums, 0)[-2] > 1e-4
    np.testing.assert_array_equal(found.labels[sure], sums.argmax(0)[sure])
    relabelled = np.array([0, 2, 2, 2, 3, 1])[p.argmax(0)]
    assert (found.labels != relabelled)[sure].any(), "several structures of one tissue outvote a single other one"
    volume = abs(np.linalg.det(nib.load(scan).affine[:3, :3])) / 1000
    assert found.volumes_ml["grey matter"] == pytest.approx((found.labels == 2).sum() * volume)
    assert stored_labels(found.save(tmp_path / "saved.nii.gz")) == {1: "CSF", 2: "grey matter", 3: "white matter"}
    nib.save(found.to_nibabel("members"), tmp_path / "members.nii.gz")
    nib.save(found.to_nibabel("probabilities"), tmp_path / "p.nii.gz")
    assert stored_labels(tmp_path / "members.nii.gz") and not stored_labels(tmp_path / "p.nii.gz")
    only_grey = tissues.segment(scan, labels=["grey matter"])
    np.testing.assert_array_equal(only_grey.labels, np.where(found.labels == 2, 2, 0))
    assert only_grey.classes == {0: "background", 2: "grey matter"} and list(only_grey.volumes_ml) == ["grey matter"]


def test_members_are_grouped_before_they_are_compared(tmp_path: Path, model: Path) -> None:
    """Members that differ only in the structure agree about the tissue."""
    scan = save(tmp_path / "scan.nii.gz")
    (whole,) = run([scan], model, output=tmp_path / "s.nii.gz", ensemble=3, statistics=True)
    (result,) = run(
        [scan], model, output=tmp_path / "t.nii.gz", ensemble=3, tissues=True, statistics=True, save_members=True
    )
    classes = statistics(result)["classes"]
    assert list(classes) == ["CSF", "grey matter", "white matter"]
    members = array(result, "members")
    assert members.shape[-1] == 3 and set(np.unique(members)) <= {0, 1, 2, 3}
    assert classes["grey matter"]["pairwise_dice"] > max(  # type: ignore[type-var]
        statistics(whole)["classes"][name]["pairwise_dice"] for name in ("left hippocampus", "right hippocampus")
    )


def test_the_calibration_of_structures_is_not_claimed_for_tissues(tmp_path: Path, model: Path) -> None:
    scan = save(tmp_path / "scan.nii.gz")
    (whole,) = run([scan], model, output=tmp_path / "a.nii.gz", ensemble=3)
    (result,) = run([scan], model, output=tmp_path / "b.nii.gz", ensemble=3, tissues=True)
    assert whole.intervals_ml and not result.intervals_ml and result.quality is None and result.level is None
    assert any("calibration is for its structures, not for tissues" in warning for warning in result.warnings)


def test_structures_of_no_tissue_are_background(tmp_path: Path, model: Path) -> None:
    path = structures_model(tmp_path / "m", tissues={"CSF": ["other CSF"]})
    (result,) = run([save(tmp_path / "scan.nii.gz")], path, tissues=True)
    assert list(result.volumes_ml) == ["CSF"] and set(np.unique(array(result, "segmentation"))) <= {0, 1}


def test_a_model_that_was_trained_on_structures_knows_their_tissues(tmp_path: Path) -> None:
    axes = np.meshgrid(*[np.arange(40) - 19.5] * 3, indexing="ij")
    radius = np.sqrt(sum(axis**2 for axis in axes))
    maps = tmp_path / "maps"
    maps.mkdir()
    for i in range(3):  # balls of white matter, cortex and CSF, left and right
        labels = np.zeros((40,) * 3, np.int16)
        for limit, left, right in ((18 + i, 24, 24), (15, 3, 42), (10, 2, 41)):
            labels[radius < limit] = np.where(axes[0] < 0, left, right)[radius < limit]
        nib.save(nib.Nifti1Image(labels, np.eye(4)), maps / f"map_{i}.nii.gz")
    preset = "baseline-brain-structures-small"
    small = {
        "finder.window": [16, 16, 16], "finder.network.channel_mult": [1, 1], "finder.max_steps": 1,
        "data.window": [16, 16, 16], "data.test_cases": 1, "data.validation_cases": 1, "data.examples_per_map": 1,
        "network.channels": 16, "network.channel_mult": [1, 1], "training.max_steps": 1,
        "training.validate_every": 1, "training.warmup_steps": 0, "inference.window": [16, 16, 16],
        "inference.largest_part": False,
    }  # fmt: skip
    trained = train_segmenter(preset, maps, tmp_path / "run", overrides=small, device="cpu")
    assert load_model_files(trained).card["tissues"] == tissues_of(BRAIN)
    scan = save(tmp_path / "scan.nii.gz", np.random.default_rng(0).random((20, 20, 20)).astype(np.float32), np.eye(4))
    (result,) = run([scan], trained, tissues=True)
    assert result.status == "done" and list(result.volumes_ml) == ["CSF", "grey matter", "white matter"]
    (result,) = run([scan], trained, labels="hippocampus,thalamus", output=tmp_path / "some.nii.gz")
    names = ["left thalamus", "left hippocampus", "right thalamus", "right hippocampus"]
    assert list(result.volumes_ml) == names and list(stored_labels(tmp_path / "some.nii.gz")) == [6, 10, 19, 23]


# ---- refused ---------------------------------------------------------------------------------------------------------


def test_what_a_model_does_not_have_is_one_line_before_any_work(tmp_path: Path, model: Path, tiny_model: Path) -> None:
    scan = save(tmp_path / "scan.nii.gz")
    for options, text in (
        (["--labels", "thalamus"], "no class 'thalamus'; "),
        (["--labels", "9"], "its classes are 1 left hippocampus, 2 right hippocampus"),
        (["--labels", ","], "no class is named"),
        (["--tissues", "--labels", "hippocampus"], "its classes are 1 CSF, 2 grey matter, 3 white matter"),
    ):
        result = medseg("segment", scan, "-m", model, *options)
        (line,) = error_lines(result)
        assert result.exit_code == 2 and text in line
    result = medseg("segment", scan, "-m", tiny_model, "--tissues")
    (line,) = error_lines(result)
    assert result.exit_code == 2 and "its card groups no classes into tissues" in line
    saved = load_model_files(model)
    save_model(tmp_path / "odd", {**saved.card, "tissues": {"CSF": ["blood"]}}, saved.weights, "# card")
    assert medseg("segment", scan, "-m", tmp_path / "odd", "--tissues").exit_code == 4
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["scan.nii.gz"]


def test_the_command_takes_both_options(tmp_path: Path, model: Path) -> None:
    scan = save(tmp_path / "scan.nii.gz")
    result = medseg("segment", scan, "-m", model, "--labels", "hippocampus", "--ensemble", "1", "--json")
    assert result.exit_code == 0, result.stderr
    assert list(json.loads(result.stdout)["volumes_ml"]) == ["left hippocampus", "right hippocampus"]
    result = medseg("segment", scan, "-m", model, "--tissues", "--ensemble", "1", "--json", "-o", tmp_path / "t")
    assert list(json.loads(result.stdout)["volumes_ml"]) == ["CSF", "grey matter", "white matter"]
    assert stored_labels(tmp_path / "t" / "scan_seg.nii.gz") == {1: "CSF", 2: "grey matter", 3: "white matter"}
    assert stored_labels(tmp_path / "scan_seg.nii.gz") == {value: STRUCTURES[value] for value in (1, 2)}
