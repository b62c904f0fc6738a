"""Folders of several readers: which files belong together, and what a training example shows of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from medseg_diffusion.data.cases import find_cases
from medseg_diffusion.data.mask_examples import CaseFormat, MaskExamples, PreparedCase, prepare
from medseg_diffusion.errors import InputError
from medseg_diffusion.volumes.preprocessing import Preprocessing

FORMAT = CaseFormat(channels=1, num_classes=2)


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array.astype(np.uint8)).save(path)


def folder_of_readers(folder: Path) -> Path:
    """Case a has readers 1, 2 and 10; case b has reader 2 alone, whose mask is empty."""
    for name in ("a", "b"):
        save(folder / "images" / f"{name}.png", np.arange(64).reshape(8, 8))
    for reader in (1, 2, 10):
        mask = np.zeros((8, 8))
        mask[:reader, 0] = 1
        save(folder / "raters" / str(reader) / "a.png", mask)
    save(folder / "raters" / "2" / "b_seg.png", np.zeros((8, 8)))
    return folder


def test_readers_are_found_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    a, b = find_cases(folder_of_readers(tmp_path)).cases
    assert [path.parent.name for path in a.labels] == ["1", "2", "10"]
    assert [path.name for path in b.labels] == ["b_seg.png"] and b.further_labels == ()


def test_an_image_without_a_reader_and_a_mask_without_an_image_are_refused(tmp_path: Path) -> None:
    folder = folder_of_readers(tmp_path / "first")
    save(folder / "images" / "c.png", np.zeros((8, 8)))
    with pytest.raises(InputError, match=r"c\.png: found no mask in any of the 3 folders"):
        find_cases(folder)
    folder = folder_of_readers(tmp_path / "second")
    (folder / "images" / "b.png").unlink()
    with pytest.raises(InputError, match=r"b_seg\.png: found a mask without an image"):
        find_cases(folder)


def test_one_answer_for_every_image_goes_before_several_readers(tmp_path: Path) -> None:
    folder = folder_of_readers(tmp_path)
    for name in ("a", "b"):
        save(folder / "labels" / f"{name}.png", np.zeros((8, 8)))
    assert all(case.further_labels == () and case.label.parent.name == "labels" for case in find_cases(folder).cases)


def test_every_readers_mask_is_checked_and_prepared(tmp_path: Path) -> None:
    folder = folder_of_readers(tmp_path / "data")
    cases = find_cases(folder).cases
    preprocessing = Preprocessing(orientation=None)
    a, b = prepare(cases, preprocessing, FORMAT, tmp_path / "cache")
    assert [int(label.sum()) for label in a.labels] == [1, 2, 8] and [int(label.sum()) for label in b.labels] == [0]
    again = prepare(cases, preprocessing, FORMAT, tmp_path / "cache")[0]
    for first, second in zip(a.labels, again.labels, strict=True):
        torch.testing.assert_close(first, second)
    save(folder / "raters" / "10" / "a.png", np.zeros((8, 9)))
    with pytest.raises(InputError, match=r"10/a\.png: found 9 x 8 x 1 voxels"):
        prepare(cases, preprocessing, FORMAT, tmp_path / "cache")
    save(folder / "raters" / "10" / "a.png", np.full((8, 8), 3))
    with pytest.raises(InputError, match=r"10/a\.png: found label 3; expected labels 0 to 1"):
        prepare(cases, preprocessing, FORMAT, tmp_path / "cache")


def test_readers_are_drawn_equally_often_by_the_examples_own_generator() -> None:
    labels = [torch.full((8, 8, 1), float(i > 0)).to(torch.uint8) for i in range(4)]
    labels[2][4:], labels[3][2:] = 0, 0
    case = PreparedCase("a", torch.zeros(1, 8, 8, 1), labels[0], tuple(labels[1:]))
    examples = MaskExamples([case], (8, 8), foreground_share=0.5)
    sizes = [int(label.sum()) for label in labels]
    drawn = [int(examples.example(0, torch.Generator().manual_seed(i))["label"].sum()) for i in range(400)]
    assert [drawn[i] for i in range(5)] == [
        int(examples.example(0, torch.Generator().manual_seed(i))["label"].sum()) for i in range(5)
    ]
    for size in sizes:  # 100 of 400 expected; 60 to 140 has a chance of 0.99999
        assert 60 <= drawn.count(size) <= 140


def test_any_number_of_cases_holds_one_file_open(tmp_path: Path) -> None:
    """A folder of thousands of slices would exceed the number of files that a process may open."""
    a, _ = prepare(
        find_cases(folder_of_readers(tmp_path / "data")).cases, Preprocessing(orientation=None), FORMAT, tmp_path / "c"
    )
    opened = [path.resolve() for path in Path("/proc/self/fd").iterdir()] if Path("/proc/self/fd").exists() else []
    assert a.image.shape == (1, 8, 8, 1) and len([path for path in opened if path.is_relative_to(tmp_path)]) <= 1
