"""Inputs that other tools, or earlier versions, got wrong: one test protects from each, here or where `CASES` says."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from medseg_diffusion.data.cases import find_cases
from medseg_diffusion.data.images import find_images
from medseg_diffusion.data.mask_examples import CaseFormat, read_case
from medseg_diffusion.errors import InputError, UsageError
from medseg_diffusion.volumes.io import read_volume
from medseg_diffusion.workflows.train_segmenter import train_segmenter
from tests.helpers import segmenters
from tests.helpers.cli import error_lines, medseg
from tests.helpers.segmenters import calibrated, run, thresholding

HERE = "tests.test_reported_inputs"
NIFTI, DICOM, CHECK = "tests.volumes.test_untrusted_nifti", "tests.volumes.test_dicom", "tests.workflows.test_check"
CASES = {
    "gz_bitflip_scan": (NIFTI, "test_a_flipped_bit_in_a_compressed_file_is_found_by_its_check_sum"),
    "gz_bitflip_labels": (HERE, "test_evaluate_reads_the_check_sum_of_masks"),
    "vox_offset_0": (NIFTI, "test_voxels_do_not_begin_inside_the_header"),
    "vox_offset_0_gz": (NIFTI, "test_voxels_do_not_begin_inside_the_header"),
    "quaternion_rounding": (NIFTI, "test_a_quaternion_above_one_by_rounding_is_one"),
    "quaternion_nan": (NIFTI, "test_an_unusable_quaternion_is_said_and_not_written_again"),
    "pixdim_0_qform_only": (NIFTI, "test_no_voxel_size_is_refused"),
    "no_qform_no_sform": (NIFTI, "test_a_header_without_orientation_is_said_once"),
    "qform_sform_voxel_size": (NIFTI, "test_two_transforms_of_different_voxel_sizes_are_said"),
    "units_metres": (HERE, "test_a_unit_of_metres_is_refused_before_memory_is_asked_for"),
    "voxels_10mm_brain": (NIFTI, "test_a_scan_is_not_enlarged_beyond_reason"),
    "voxels_10mm_hippocampus": (NIFTI, "test_impossible_voxel_sizes_are_refused_and_unusual_ones_said"),
    "dicom_reference": (DICOM, "test_voxels_lie_where_the_headers_say"),
    "dicom_slope_per_slice": (DICOM, "test_every_slice_has_its_own_slope"),
    "dicom_mixed_orientation": (DICOM, "test_a_slice_that_differs_is_named"),
    "dicom_no_pixel_spacing": (DICOM, "test_slices_that_are_no_volume_are_refused"),
    "dicom_multiframe": (DICOM, "test_frames_of_one_file_are_ordered_by_their_places"),
    "dicom_multiframe_two_stacks": (DICOM, "test_stacks_of_one_file_are_told_apart"),
    "dicom_two_echoes": (DICOM, "test_slices_that_are_no_volume_are_refused"),
    "dicom_localizer_in_series": (DICOM, "test_a_slice_that_differs_is_named"),
    "dicom_no_preamble": (DICOM, "test_a_zip_and_files_without_preamble_are_the_same_series"),
    "dicom_zip": (DICOM, "test_a_zip_and_files_without_preamble_are_the_same_series"),
    "dicom_dot": (DICOM, "test_results_lie_beside_a_series_and_never_in_it"),
    "empty_mask_usual": (HERE, "test_an_empty_mask_is_said_and_is_not_usual"),
    "import_empty_file": (HERE, "test_a_checkpoint_that_is_none_is_one_line"),
    "import_lfs_pointer": (HERE, "test_a_checkpoint_that_is_none_is_one_line"),
    "label_names_swapped": (HERE, "test_names_of_labels_in_another_order_are_refused"),
    "check_label_shape": (CHECK, "test_what_would_stop_a_training_is_said_with_a_remedy"),
    "check_label_missing": (CHECK, "test_what_would_stop_a_training_is_said_with_a_remedy"),
    "label_0.002mm_away": (HERE, "test_training_and_evaluation_agree_on_one_grid"),
    "nnunet_v2": (HERE, "test_a_raw_folder_of_nnunet_is_training_data"),
    "nnunet_0000_names": (HERE, "test_names_of_nnunet_are_paired_with_their_labels"),
    "exclude_labelled_without_labels": (HERE, "test_leaving_out_labelled_slices_needs_labels"),
    "zip_hidden_class": (HERE, "test_a_folder_and_a_zip_of_it_have_the_same_classes"),
    "exif_generator": (HERE, "test_a_turned_photograph_is_the_same_image_to_a_generator_and_a_segmenter"),
    "shard_same_names": (HERE, "test_scans_of_one_file_name_are_in_all_shards"),
    "out_is_file_evaluate": (HERE, "test_an_output_that_is_a_file_is_refused_before_any_work"),
    "out_is_file_segment": (HERE, "test_an_output_that_is_a_file_is_refused_before_any_work"),
    "out_dcm": (HERE, "test_an_output_of_another_format_is_no_folder"),
}
"""Case -> module and name of the test that protects from it."""


@pytest.mark.parametrize("case", CASES)
def test_every_case_has_its_test(case: str) -> None:
    module, name = CASES[case]
    assert callable(getattr(importlib.import_module(module), name))


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_evaluate_reads_the_check_sum_of_masks(tmp_path: Path) -> None:
    labels = np.random.default_rng(0).integers(0, 2, (30, 30, 30)).astype(np.uint8)
    for folder in ("p", "r"):
        segmenters.save(tmp_path / folder / "c.nii.gz", labels)
    damaged = bytearray((tmp_path / "p" / "c.nii.gz").read_bytes())
    damaged[-5] ^= 16  # of the sum
    (tmp_path / "p" / "c.nii.gz").write_bytes(bytes(damaged))
    result = medseg("evaluate", tmp_path / "p", tmp_path / "r", "-o", tmp_path / "out")
    (line,) = error_lines(result)
    assert result.exit_code == 3 and "p/c.nii.gz: found a damaged file (CRC check failed" in line
    assert not list(tmp_path.glob("out/*"))


def test_a_unit_of_metres_is_refused_before_memory_is_asked_for(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.random.default_rng(0).random((20, 20, 20)).astype(np.float32), np.eye(4))
    image.header.set_xyzt_units("meter")
    nib.save(image, tmp_path / "a.nii.gz")
    with pytest.raises(InputError, match=r"voxels of 1000 x 1000 x 1000 mm; .* check the unit"):
        read_volume(tmp_path / "a.nii.gz")


def test_a_turned_photograph_is_the_same_image_to_a_generator_and_a_segmenter(tmp_path: Path) -> None:
    pixels = np.zeros((20, 20, 3), np.uint8)
    pixels[:10], pixels[10:] = (220, 30, 30), (30, 30, 220)  # red above blue as stored
    exif = Image.Exif()
    exif[0x0112] = 3  # half a turn
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    collection = find_images(tmp_path)
    generator = collection.pixels(collection.entries[0], (20, 20), 3)[0]
    segmenter = read_volume(tmp_path / "a.png", channels=3).data[:, :, :, 0].permute(2, 1, 0).numpy()
    assert generator[2, 10].tolist() == [30, 30, 220] and np.array_equal(generator, segmenter)


def test_a_folder_and_a_zip_of_it_have_the_same_classes(tmp_path: Path) -> None:
    for name in ("one/a.png", "one/b.png", "two/c.png", ".ipynb_checkpoints/d.png", "one/.e.png"):
        path = tmp_path / "d" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(path)
    shutil.make_archive(str(tmp_path / "d"), "zip", tmp_path / "d")
    folder, archive = find_images(tmp_path / "d"), find_images(tmp_path / "d.zip")
    assert folder.classes == archive.classes == ("one", "two")
    assert [entry.name for entry in archive.entries] == ["one/a.png", "one/b.png", "two/c.png"]
    assert folder.entries == archive.entries


# ---- training data ---------------------------------------------------------------------------------------------------


def nnunet_folder(folder: Path, dataset: dict[str, object]) -> Path:
    """Scans NAME_0000.nii.gz and NAME_0001.nii.gz beside labels NAME.nii.gz."""
    rng = np.random.default_rng(0)
    for name in "abc":
        for channel in ("0000", "0001"):
            segmenters.save(folder / "imagesTr" / f"{name}_{channel}.nii.gz", rng.random((8, 8, 8)).astype(np.float32))
        segmenters.save(folder / "labelsTr" / f"{name}.nii.gz", rng.integers(0, 3, (8, 8, 8)).astype(np.uint8))
    (folder / "dataset.json").write_text(json.dumps(dataset))
    return folder


def test_a_raw_folder_of_nnunet_is_training_data(tmp_path: Path) -> None:
    dataset = {
        "channel_names": {"0": "T1", "1": "FLAIR"},
        "labels": {"background": 0, "front": 1, "back": 2},
        "numTraining": 3,
        "file_ending": ".nii.gz",
    }
    found = find_cases(nnunet_folder(tmp_path, dataset))
    assert found.labels == {0: "background", 1: "front", 2: "back"} and found.channels == ("T1", "FLAIR")
    assert [case.name for case in found.cases] == ["a", "b", "c"]
    volume, labels = read_case(found.cases[0], CaseFormat(2, 3))
    assert volume.data.shape == (2, 8, 8, 8) and labels.data.max() == 2


def test_names_of_nnunet_are_paired_with_their_labels(tmp_path: Path) -> None:
    cases = [{"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"} for name in "abc"]
    names = {"0": "background", "1": "front", "2": "back"}
    found = find_cases(
        nnunet_folder(tmp_path, {"training": cases, "labels": names, "modality": {"0": "T1", "1": "T2"}})
    )
    assert [[path.name for path in case.images] for case in found.cases] == [
        [f"{name}_0000.nii.gz", f"{name}_0001.nii.gz"] for name in "abc"
    ]


def test_names_of_labels_in_another_order_are_refused(block_scans: Path, tmp_path: Path) -> None:
    """Positions mirror each other: with swapped names, the model would call the front the back."""
    config = segmenters.tiny_config(data={"labels": ["front part", "back part"], "window": [8, 8, 8]})
    shutil.copytree(block_scans / "images", tmp_path / "d" / "imagesTr")
    shutil.copytree(block_scans / "labels", tmp_path / "d" / "labelsTr")
    names = sorted(path.name for path in (tmp_path / "d" / "imagesTr").iterdir())
    content = {
        "training": [{"image": f"imagesTr/{name}", "label": f"labelsTr/{name}"} for name in names],
        "labels": {"0": "background", "1": "Back", "2": "Front"},
        "modality": {"0": "T1"},
    }
    (tmp_path / "d" / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match=r"dataset\.json names label 1 'Back', but data.labels names it 'front part'"):
        train_segmenter(config, tmp_path / "d", tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_training_and_evaluation_agree_on_one_grid(tmp_path: Path) -> None:
    """A label whose position differs by rounding is on the grid of its image for both of them; 0.2 mm is not."""
    rng, labels = np.random.default_rng(0), np.eye(8, dtype=np.uint8)[None].repeat(8, 0)
    for shift, fits in ((0.002, True), (0.2, False)):
        folder = tmp_path / str(shift)
        segmenters.save(folder / "images" / "a.nii.gz", rng.random((8, 8, 8)).astype(np.float32), np.eye(4))
        moved = np.eye(4)
        moved[0, 3] = shift
        segmenters.save(folder / "labels" / "a.nii.gz", labels, moved)
        segmenters.save(folder / "p" / "a.nii.gz", labels, np.eye(4))
        (case,) = find_cases(folder).cases
        result = medseg("evaluate", folder / "p", folder / "labels", "-o", folder / "out")
        if fits:
            read_case(case, CaseFormat(1, 2))
            assert result.exit_code == 0, result.output
        else:
            with pytest.raises(InputError, match=r"a grid up to 0.2 mm away"):
                read_case(case, CaseFormat(1, 2))
            assert result.exit_code == 3 and "a grid up to 0.2 mm away" in result.stderr


def test_leaving_out_labelled_slices_needs_labels(tmp_path: Path) -> None:
    for name in "abcdef":
        segmenters.save(tmp_path / "d" / f"{name}.nii.gz")
    command = ["train-anomaly", "anomaly-partial-noise-small", "--healthy", tmp_path / "d", "--exclude-labelled", 1]
    held_out = [f"generator.data.{side}_images=1" for side in ("test", "validation")]
    result = medseg(*command, "-o", tmp_path / "run", "--device", "cpu", "--set", held_out[0], "--set", held_out[1])
    (line,) = error_lines(result)
    assert result.exit_code == 2 and "has no labels, so --exclude-labelled 1 leaves nothing out" in line
    assert not (tmp_path / "run").exists()


# ---- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file, expected a checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer, not the checkpoint"),
    ],
)
def test_a_checkpoint_that_is_none_is_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_bytes(content)
    command = ["models", "import", tmp_path / "w.pt", "--from", "monai", "-o", tmp_path / "m", "--set", "size=16"]
    result = medseg(*command, "--set", "head_channels=8")
    (line,) = error_lines(result)
    assert result.exit_code == 4 and message in line and not (tmp_path / "m").exists()


def test_an_empty_mask_is_said_and_is_not_usual(tiny_model: Path, tmp_path: Path, monkeypatch) -> None:
    """Members that agree on nothing agree."""
    from medseg_diffusion.models.load import load_segmenter
    from medseg_diffusion.workflows import segment as workflow

    model = load_segmenter(calibrated(tiny_model, tmp_path / "model"), "cpu", ensemble=3)
    model.model = thresholding(tmp_path / "other", level=9.0).model  # type: ignore[attr-defined]
    monkeypatch.setattr(workflow, "load_segmenter", lambda *arguments, **options: model)
    (result,) = run([segmenters.save(tmp_path / "scan.nii.gz")], tmp_path)
    assert result.volumes_ml == {"bright": 0.0} and result.quality == "check"
    assert any("nothing was found: the mask is empty" in line for line in result.warnings)


def test_an_empty_mask_of_members_that_are_not_says_so() -> None:
    """Where most readers mark nothing, most members do; "nothing was found" would hide the others."""
    from medseg_diffusion.workflows.finished import doubts_about

    (line,) = doubts_about({"nodule": 0.0}, {"nodule": (0.0, 0.2)}, None, "").values()
    assert "sampled masks are not" in line and "nothing was found" not in line
    (line,) = doubts_about({"nodule": 0.0}, {"nodule": (0.0, 0.0)}, None, "").values()
    assert "nothing was found" in line
    assert doubts_about({"nodule": 0.1}, {"nodule": (0.0, 0.2)}, None, "") == {}


# ---- outputs ---------------------------------------------------------------------------------------------------------


def test_scans_of_one_file_name_are_in_all_shards(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the paths as given decide, and these are the same in every run
    scans = [segmenters.save(Path(f"sub-{i:02}") / "T1.nii.gz") for i in range(12)]
    parts = [[one.scan for one in run(scans, tiny_model, shard=(part, 3))] for part in (1, 2, 3)]
    assert sorted(path for part in parts for path in part) == scans and min(map(len, parts)) >= 1


def test_an_output_that_is_a_file_is_refused_before_any_work(tiny_model: Path, tmp_path: Path) -> None:
    scans = [segmenters.save(tmp_path / f"{name}.nii.gz") for name in "ab"]
    for folder in ("p", "r"):
        segmenters.save(tmp_path / folder / "c.nii.gz", np.eye(8, dtype=np.uint8)[None].repeat(8, 0))
    (tmp_path / "file").write_text("mine")
    for command in (
        ["segment", *scans, "-m", tiny_model, "-o", tmp_path / "file", "--device", "cpu"],
        ["evaluate", tmp_path / "p", tmp_path / "r", "-o", tmp_path / "file"],
    ):
        result = medseg(*command)
        (line,) = error_lines(result)
        assert result.exit_code == 2 and "file: is a file, but results need a folder" in line
    assert (tmp_path / "file").read_text() == "mine" and not list(tmp_path.glob("*_seg*"))


@pytest.mark.parametrize("name", ["seg.dcm", "seg.mgz"])
def test_an_output_of_another_format_is_no_folder(name: str, tiny_model: Path, tmp_path: Path) -> None:
    scan = segmenters.save(tmp_path / "a.nii.gz")
    result = medseg("segment", scan, "-m", tiny_model, "-o", tmp_path / name, "--device", "cpu")
    (line,) = error_lines(result)
    reason = "is no DICOM series" if name.endswith(".dcm") else name
    assert result.exit_code == 2 and reason in line and not (tmp_path / name).exists()
