"""Which file belongs to which case: predictions, references, further raters, scans and score maps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from medseg_diffusion.data.pairs import (
    MaskPair,
    find_backgrounds,
    find_for_each,
    find_foregrounds_beside,
    find_masks,
    find_pairs,
    find_rater,
)
from medseg_diffusion.errors import InputError, listed, remarks
from medseg_diffusion.volumes.io import write_labels, write_map
from medseg_diffusion.volumes.paths import MAKER
from medseg_diffusion.volumes.volume import Volume
from tests.helpers.masks import box, save


def touch(folder: Path, *names: str) -> Path:
    """Empty files: pairing looks at names alone."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Predictions and references of the cases a, b and c."""
    pred = touch(tmp_path / "pred", "a_seg.nii.gz", "b.nii.gz", "c_anomaly_mask.nii.gz")
    return pred, touch(tmp_path / "ref", "a.nii.gz", "b_seg.nii.gz", "c.nii.gz")


def pairs_of(*names: str) -> list[MaskPair]:
    return [MaskPair(name, Path(f"{name}_seg.nii.gz"), Path(f"{name}.nii.gz")) for name in names]


def test_folders_are_paired_by_name(folders: tuple[Path, Path]) -> None:
    pred, ref = folders
    pairs, remarks = find_pairs(pred, ref)
    assert pairs == [
        MaskPair("a", pred / "a_seg.nii.gz", ref / "a.nii.gz"),
        MaskPair("b", pred / "b.nii.gz", ref / "b_seg.nii.gz"),
        MaskPair("c", pred / "c_anomaly_mask.nii.gz", ref / "c.nii.gz"),
    ]
    assert remarks == []
    touch(pred, "z_seg.nii.gz")
    assert find_pairs(pred, ref) == (pairs, ["Predictions without a reference, not evaluated: z."])


def test_two_files_are_a_pair_named_by_the_reference(tmp_path: Path) -> None:
    touch(tmp_path, "mine.nii.gz", "truth_seg.nii.gz")
    (pair,), _ = find_pairs(tmp_path / "mine.nii.gz", tmp_path / "truth_seg.nii.gz", merged=True)
    assert pair == MaskPair("truth", tmp_path / "mine.nii.gz", tmp_path / "truth_seg.nii.gz", merged=True)


def test_one_prediction_meets_its_own_reference(folders: tuple[Path, Path], tmp_path: Path) -> None:
    pred, ref = folders
    assert [pair.name for pair in find_pairs(pred / "a_seg.nii.gz", ref)[0]] == ["a"]
    assert [pair.name for pair in find_pairs(pred, ref / "b_seg.nii.gz")[0]] == ["b"]
    with pytest.raises(InputError, match="no reference for z"):
        find_pairs(touch(tmp_path, "z.nii.gz") / "z.nii.gz", ref)


def test_unusable_folders(tmp_path: Path) -> None:
    ref = touch(tmp_path / "ref", "a.nii.gz")
    with pytest.raises(InputError, match="no such file or folder"):
        find_pairs(tmp_path / "nowhere", ref)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="without label maps"):
        find_pairs(tmp_path / "empty", ref)
    touch(ref, "a.nii")
    with pytest.raises(InputError, match=r"the same name as a\.nii"):
        find_pairs(ref, ref)


def test_scans_maps_and_hidden_files_are_not_masks(tmp_path: Path) -> None:
    results = ("a_prob.nii.gz", "a_members.nii.gz", "a_anomaly.nii.gz", "a_anomaly_foreground.nii.gz", "notes.txt")
    touch(tmp_path, "a.nii.gz", "a_seg.nii.gz", "b.nii.gz", ".hidden.nii.gz", *results)
    assert find_masks(tmp_path) == {"a": tmp_path / "a_seg.nii.gz", "b": tmp_path / "b.nii.gz"}


def test_two_masks_of_a_case_are_refused(tmp_path: Path) -> None:
    """As where `segment` and `anomaly` have written into one folder: which of them is meant, is unknown."""
    touch(tmp_path, "a_seg.nii.gz", "a_anomaly_mask.nii.gz")
    with pytest.raises(InputError, match=r"two masks of the case a, .*; expected one mask for each case"):
        find_masks(tmp_path)


def test_a_rater_of_a_single_case_has_any_name(tmp_path: Path) -> None:
    file = touch(tmp_path, "second.nii.gz") / "second.nii.gz"
    assert find_rater(file, pairs_of("a")) == {"a": file}
    assert find_rater(file, pairs_of("a", "b")) == {"second": file}


def test_backgrounds_are_those_that_exist(tmp_path: Path) -> None:
    folder = touch(tmp_path / "images", "a.nii.gz", "b_0000.nii.gz", "other.nii.gz")
    scans = find_backgrounds(folder, pairs_of("a", "b", "c"))
    assert scans == {"a": folder / "a.nii.gz", "b": folder / "b_0000.nii.gz"}
    other = folder / "other.nii.gz"
    assert find_backgrounds(other, pairs_of("a")) == {"a": other}
    assert find_backgrounds(folder / "a.nii.gz", pairs_of("a", "b")) == {"a": folder / "a.nii.gz"}
    with pytest.raises(InputError, match="expected a scan or a folder of scans"):
        find_backgrounds(tmp_path / "nowhere", pairs_of("a"))


def test_scans_of_no_case_are_refused(tmp_path: Path) -> None:
    """A wrong folder would otherwise be noticed after the evaluation, when the pictures are black."""
    folder = touch(tmp_path / "images", "other.nii.gz")
    for path in (folder, folder / "other.nii.gz"):
        with pytest.raises(InputError, match=r"no scan of any case; expected .* as the cases, a or a_0000; check"):
            find_backgrounds(path, pairs_of("a", "b"))


def test_the_first_ending_that_exists_is_taken_for_each_case(tmp_path: Path) -> None:
    endings = ("_anomaly", "_scores", "")
    folder = touch(tmp_path / "maps", "a.nii.gz", "b_scores.nii.gz", "b.nii.gz")
    maps = find_for_each(folder, pairs_of("a", "b"), endings, "score map")
    assert maps == {"a": folder / "a.nii.gz", "b": folder / "b_scores.nii.gz"}
    with pytest.raises(InputError, match=r"no score map for c \(1 of 2 cases\).*NAME_anomaly, NAME_scores, NAME"):
        find_for_each(folder, pairs_of("a", "c"), endings, "score map")
    with pytest.raises(InputError, match="expected a score map or a folder of them"):
        find_for_each(tmp_path / "nowhere", pairs_of("a"), endings, "score map")


def test_foregrounds_beside_the_maps_are_used_if_every_case_has_one(tmp_path: Path) -> None:
    maps = {name: tmp_path / f"{name}_anomaly.nii.gz" for name in "ab"}
    touch(tmp_path, "a_anomaly_foreground.nii.gz")
    assert find_foregrounds_beside(maps) is None
    touch(tmp_path, "b_anomaly_foreground.nii.gz")
    assert find_foregrounds_beside(maps) == {name: tmp_path / f"{name}_anomaly_foreground.nii.gz" for name in "ab"}
    single = {"lesions": maps["a"]}  # two files that are compared may have any names
    assert find_foregrounds_beside(single) == {"lesions": tmp_path / "a_anomaly_foreground.nii.gz"}


def test_companions_lie_beside_the_prediction(tmp_path: Path) -> None:
    pair = MaskPair("truth", tmp_path / "a_seg.nii.gz", tmp_path / "truth.nii.gz")
    assert pair.companion("probabilities") is None
    touch(tmp_path, "a_prob.nii.gz", "truth_members.nii.gz")
    assert pair.companion("probabilities") == tmp_path / "a_prob.nii.gz" and pair.companion("members") is None


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd"])
def test_a_companion_is_of_the_model_that_made_the_mask(tmp_path: Path, suffix: str) -> None:
    """Another model's probabilities, which an earlier call left, would be credited to the model of the mask."""
    mask, file = tmp_path / f"a_seg{suffix}", tmp_path / "a_prob.nii.gz"
    like = Volume(torch.zeros(1, 4, 4, 1), np.eye(4))
    pair = MaskPair("a", mask, mask)
    for maker, model, used in (
        (f"{MAKER} one 012345678901", f"{MAKER} one 012345678901", True),
        (f"{MAKER} one 012345678901", f"{MAKER} two 012345678901", False),
        ("", f"{MAKER} one 012345678901", False),
        (f"{MAKER} one 012345678901", "", False),
        ("FSL 6", "", True),  # not of medseg: what its files say of their makers is unknown
    ):
        write_labels(torch.zeros(4, 4, 1, dtype=torch.uint8), like.described(maker), mask)
        write_map(torch.zeros(2, 4, 4, 1), like.described(model), file)
        with remarks() as said:
            assert (pair.companion("probabilities") == file) is used, (maker, model)
        assert said == ([] if used else [f"{file}: not of the model that made the mask beside it, so it is not used"])


def test_labels_are_merged_in_both_masks(tmp_path: Path) -> None:
    files = save(tmp_path / "a_seg.nii.gz", box(4)), save(tmp_path / "a.nii.gz", box(6, 255))
    for merged, largest in ((False, 255), (True, 1)):
        prediction, reference = MaskPair("a", *files, merged).read()
        assert (prediction.data.max(), reference.data.max()) == (1, largest)
    save(tmp_path / "a.nii.gz", np.zeros((3, 3, 3), np.uint8))
    with pytest.raises(InputError, match="10 x 9 x 8 voxels; expected 3 x 3 x 3"):
        MaskPair("a", *files).read()


def test_a_long_list_is_cut() -> None:
    assert listed([1, 2, 3]) == "1, 2, 3"
    assert listed(range(23)).endswith("18, 19 and 3 more")
