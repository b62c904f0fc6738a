"""Labelled images for generators: the segmenter's splits, and masks that stay on their images."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from medseg_diffusion.data.cases import find_cases, split_by_hash
from medseg_diffusion.data.image_cache import ImageExamples, PackedImages
from medseg_diffusion.data.labelled_images import LabelledImages, packed_labelled
from medseg_diffusion.errors import InputError
from medseg_diffusion.volumes.preprocessing import Preprocessing
from tests.helpers.generators import save_labelled_pictures, save_labelled_volumes


def pack(folder: Path, store: Path, size: tuple[int, ...], **changes: object) -> PackedImages:
    names = {0: "background", 1: "block"}
    source = {"folder": find_cases(folder), "names": names, "channels": 1, "merge_labels": False, "held_out": (1, 1)}
    preprocessing = Preprocessing(square_pixels=len(size) == 2)
    return packed_labelled(LabelledImages(**{**source, **changes}), store, size, preprocessing)


@pytest.mark.parametrize("size", [(16, 16), (12, 12, 12)])
def test_masks_lie_on_their_images_mirrored_or_not(size, tmp_path: Path) -> None:
    (save_labelled_pictures if len(size) == 2 else save_labelled_volumes)(tmp_path / "data")
    images = pack(tmp_path / "data", tmp_path / "store", size)
    examples, seen = ImageExamples(images, images.part("train")), set()
    for seed in range(6):
        example = examples.example(0, torch.Generator().manual_seed(seed))
        assert torch.equal(example["image"][0] > 0, example["mask"] == 1)
        seen.add(int(example["mask"].argmax()))
    assert len(seen) == 2 and images.mask_classes == ("background", "block")


def test_image_files_are_upright_and_not_mirrored(tmp_path: Path) -> None:
    save_labelled_pictures(tmp_path / "data")
    images = pack(tmp_path / "data", tmp_path / "store", (16, 16))
    assert images.masks is not None
    for name, mask in zip(images.names, images.masks, strict=True):
        with Image.open(tmp_path / "data" / "masks" / f"{name}.png") as picture:
            assert np.array_equal(mask, np.asarray(picture))


def test_the_splits_are_those_of_a_segmenter(tmp_path: Path) -> None:
    """A generator that sees the test patients of the segmenter would make its test worthless."""
    save_labelled_pictures(tmp_path / "data")
    rows = "".join(f"{i},patient{i // 2}\n" for i in range(12))
    (tmp_path / "data" / "patients.csv").write_text("case,patient\n" + rows)
    images = pack(tmp_path / "data", tmp_path / "store", (16, 16), held_out=(2, 1))
    split = split_by_hash(find_cases(tmp_path / "data").cases, 2, 1)
    for part in ("train", "validation", "test"):
        assert {images.names[i] for i in images.part(part)} == set(getattr(split, part))


def test_slices_are_kept_for_what_is_in_them_or_labelled(tmp_path: Path) -> None:
    """Of nine slices, five are dark; one of these is labelled."""
    for part in ("images", "labels"):
        (tmp_path / "data" / part).mkdir(parents=True)
    for i in range(3):
        image, label = np.zeros((16, 16, 9), np.float32), np.zeros((16, 16, 9), np.uint8)
        image[2:14, 2:14, 5:] = 1 + np.random.default_rng(i).random((12, 12, 4))
        label[4:6, 4:6, 2], image[4, 4, 2] = 1, 0.5
        for part, data in (("images", image), ("labels", label)):
            nib.save(nib.Nifti1Image(data, np.eye(4)), tmp_path / "data" / part / f"{i}.nii.gz")
    images = pack(tmp_path / "data", tmp_path / "store", (16, 16))
    assert images.masks is not None
    assert len(images.images) == 3 * 5 and [int(mask.sum()) for mask in images.masks[:5]] == [4, 0, 0, 0, 0]


def test_every_reader_gives_an_example(tmp_path: Path) -> None:
    save_labelled_pictures(tmp_path / "data", 4)
    (tmp_path / "data" / "raters").mkdir()
    (tmp_path / "data" / "masks").rename(tmp_path / "data" / "raters" / "1")
    (tmp_path / "data" / "raters" / "2").mkdir()
    for file in (tmp_path / "data" / "raters" / "1").iterdir():
        (tmp_path / "data" / "raters" / "2" / file.name).write_bytes(file.read_bytes())
    assert len(pack(tmp_path / "data", tmp_path / "store", (16, 16)).images) == 8


def test_what_cannot_be_learned_is_refused(tmp_path: Path) -> None:
    save_labelled_pictures(tmp_path / "data", 6)
    with pytest.raises(InputError, match=r"no voxel of label 2 \(other\)"):
        pack(tmp_path / "data", tmp_path / "store", (16, 16), names={0: "background", 1: "block", 2: "other"})
    with pytest.raises(InputError, match="a 2D image; expected volumes"):
        pack(tmp_path / "data", tmp_path / "store", (16, 16, 16))
    with pytest.raises(InputError, match="a greyscale image; expected a colour image"):
        pack(tmp_path / "data", tmp_path / "store", (16, 16), channels=3)
    assert not list((tmp_path / "store").glob("*/index.json"))
