"""Names of classes from the files beside label maps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from medseg_diffusion.data.class_names import class_names
from medseg_diffusion.errors import InputError
from medseg_diffusion.volumes.io import write_labels
from medseg_diffusion.volumes.label_table import Label
from medseg_diffusion.volumes.volume import Volume


def write(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


BIDS = "index\tname\tabbreviation\n0\tbackground\tbg\n1\tcore \tc\n3\tedema\te\n"
STATISTICS = {"scan": "a.nii.gz", "classes": {"left lung": {"volume_ml": 1}, "right lung": {}}}
DECATHLON = {"labels": {"0": "background", "1": "liver", "2": "tumour"}}
NNUNET = {"labels": {"background": 0, "whole": [1, 2], "core": 2, "ignore": 9}}


@pytest.mark.parametrize(
    ("file", "content", "names"),
    [
        ("masks/a_dseg.tsv", BIDS, {1: "core", 3: "edema"}),
        ("masks/dseg.tsv", BIDS, {1: "core", 3: "edema"}),
        ("masks/a_statistics.json", STATISTICS, {1: "left lung", 2: "right lung"}),
        ("masks/dataset.json", DECATHLON, {1: "liver", 2: "tumour"}),
        ("dataset.json", DECATHLON, {1: "liver", 2: "tumour"}),
        ("dataset.json", NNUNET, {1: "whole without core", 2: "core"}),
    ],
)
def test_names_of_each_kind_of_file(tmp_path: Path, file: str, content: object, names: dict[int, str]) -> None:
    write(tmp_path / file, content)
    for mask in ("a_seg.nii.gz", "a.nii.gz", "a_dseg.nii.gz"):
        assert class_names([tmp_path / "masks" / mask]) == (names, [])


def test_the_nearest_file_counts_and_no_file_gives_no_names(tmp_path: Path) -> None:
    mask = tmp_path / "masks" / "a_seg.nii.gz"
    assert class_names([mask]) == ({}, [])
    write(tmp_path / "dataset.json", DECATHLON)
    write(tmp_path / "masks" / "a_dseg.tsv", BIDS)
    assert class_names([mask])[0] == {1: "core", 3: "edema"}


def test_statistics_of_some_classes_tell_their_values(tmp_path: Path) -> None:
    write(tmp_path / "a_statistics.json", {"classes": {"left lung": {"label": 2}, "right lung": {"label": 7}}})
    assert class_names([tmp_path / "a_seg.nii.gz"])[0] == {2: "left lung", 7: "right lung"}


def test_files_beside_a_mask_count_before_its_own_header(tmp_path: Path) -> None:
    mask, table = tmp_path / "masks" / "a_seg.nii.gz", {1: Label("core", "#FF0000"), 3: Label("oedema", "#00FF00")}
    mask.parent.mkdir()
    write_labels(torch.zeros(2, 2, 2, dtype=torch.uint8), Volume(torch.zeros(1, 2, 2, 2), np.eye(4)), mask, table)
    assert class_names([mask]) == ({1: "core", 3: "oedema"}, [])
    write(tmp_path / "dataset.json", DECATHLON)
    assert class_names([mask])[0] == {1: "liver", 2: "tumour"}
    write(mask.with_name("a_dseg.tsv"), BIDS)
    assert class_names([mask])[0] == {1: "core", 3: "edema"}


def test_contradictions_are_told_once_and_the_first_name_counts(tmp_path: Path) -> None:
    """Two models may number the same classes differently: then Dice would compare apples with pears."""
    write(tmp_path / "ref" / "dataset.json", DECATHLON)
    for name in "abc":
        write(tmp_path / "pred" / f"{name}_statistics.json", {"classes": {"tumour": {}, "liver": {}}})
    masks = [tmp_path / "ref" / "a.nii.gz", *(tmp_path / "pred" / f"{name}_seg.nii.gz" for name in "abc")]
    names, remarks = class_names(masks)
    assert names == {1: "liver", 2: "tumour"}
    assert [remark.partition(" in ")[0] for remark in remarks] == ["Label 1 is liver", "Label 2 is tumour"]
    assert "but tumour in" in remarks[0] and "a_statistics.json" in remarks[0]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("a_dseg.tsv", "value\tlabel\n1\tx\n"),
        ("a_dseg.tsv", "index\tname\none\tx\n"),
        ("a_dseg.tsv", ""),
        ("a_dseg.tsv", "index\tname\n1\n"),
        ("a_statistics.json", "{"),
        ("a_statistics.json", "[]"),
        ("dataset.json", {"name": "x"}),
        ("dataset.json", {"labels": ["a"]}),
        ("dataset.json", {"labels": {"one": "x"}}),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path, file: str, content: object) -> None:
    path = write(tmp_path / file, content)
    with pytest.raises(InputError) as caught:
        class_names([tmp_path / "a_seg.nii.gz"])
    assert str(caught.value).startswith(f"{path}: found") and "\n" not in str(caught.value)
