"""Names and colours in the header of a mask: they return, harm no reader, and are never worth refusing a mask."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nibabel.nifti1 import Nifti1Extension

from medseg_diffusion.volumes.io import read_labels, stored_labels, write_labels
from medseg_diffusion.volumes.label_table import CARET, Label, from_extension, to_extension, to_tsv
from medseg_diffusion.volumes.volume import Volume

TABLE = {1: Label("left <lung> & more", "#FF8000"), 7: Label("rein\tgauche é", "#000010")}
NAMES = {1: "left <lung> & more", 7: "rein gauche é"}


def mask(path: Path, members: int = 1, table: object = TABLE) -> Path:
    labels = torch.zeros(members, 4, 5, 6, dtype=torch.uint8)
    labels[:, 1, 2, 3], labels[:, 0, 0, 0] = 7, 1
    like = Volume(torch.zeros(1, 4, 5, 6), np.diag([2.0, 2.0, 3.0, 1.0]))
    write_labels(labels[0] if members == 1 else labels, like, path, table)
    return path


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("members", [1, 3])
def test_names_return_and_every_reader_sees_the_same_voxels(tmp_path: Path, suffix: str, members: int) -> None:
    path, plain = mask(tmp_path / f"a{suffix}", members), mask(tmp_path / f"b{suffix}", members, None)
    assert stored_labels(path) == NAMES and stored_labels(plain) == {}
    (extension,) = nib.load(path).header.extensions
    assert extension.get_code() == CARET and (len(extension.content) + 8) % 16 == 0
    assert extension.content.count(b"<VolumeInformation") == members  # Workbench wants a table for each map
    for read in (
        lambda file: np.asarray(nib.load(file).dataobj),
        lambda file: sitk.GetArrayFromImage(sitk.ReadImage(file)),
    ):
        np.testing.assert_array_equal(read(path), read(plain))
    np.testing.assert_allclose(nib.load(path).affine, nib.load(plain).affine)
    if members == 1:
        assert torch.equal(read_labels(path).data, read_labels(plain).data)


def test_the_longest_table_returns_whole() -> None:
    names = {value: f"class {value}" for value in range(1, 65536)}
    content = to_extension({value: Label(name, "#808080") for value, name in names.items()})
    assert from_extension(content) == names


def test_colours_are_shares_of_one() -> None:
    text = to_extension(TABLE).decode()
    assert 'Key="1" Red="1" Green="0.501961" Blue="0" Alpha="1"' in text
    assert text.index("LabelTable") < text.index("<VolumeType>Label</VolumeType>")


def with_extensions(path: Path, *extensions: tuple[int, bytes]) -> Path:
    image = nib.load(mask(path, table=None))
    image.header.extensions.extend(Nifti1Extension(*extension) for extension in extensions)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), None, image.header), path.with_name("x.nii"))
    return path.with_name("x.nii")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe not text",
        b"<CaretExtension>",
        b"<CaretExtension/>",
        b"<CaretExtension><VolumeInformation><LabelTable><Label Key='one'>a</Label></LabelTable></VolumeInformation>"
        b"</CaretExtension>",
        b"<CaretExtension><VolumeInformation><LabelTable><Label>a</Label></LabelTable></VolumeInformation>"
        b"</CaretExtension>",
        to_extension(TABLE)[:-60],
        b"<!DOCTYPE CaretExtension [<!ENTITY a 'aaaa'>]>" + to_extension(TABLE)[39:].replace(b"left", b"&a;"),
        b"<CaretExtension>" + b" " * 2**24 + b"</CaretExtension>",
        b"<other>text</other>",
    ],
)
def test_a_damaged_or_foreign_extension_names_nothing_and_refuses_nothing(tmp_path: Path, content: bytes) -> None:
    assert from_extension(content) == {}
    path = with_extensions(tmp_path / "a.nii", (CARET, content), (6, b"a comment"))
    assert stored_labels(path) == {} and int(read_labels(path).data.max()) == 7


def test_the_form_of_totalsegmentator_is_read_behind_other_extensions(tmp_path: Path) -> None:
    """It has the code 0, dates and empty elements, names as CDATA, and spaces at its end."""
    form = (
        b'<?xml version="1.0" encoding="UTF-8"?> <CaretExtension>  <Date><![CDATA[2013-07-14]]></Date>'
        b'<VolumeInformation Index="0"><LabelTable>\n<Label Key="1" Red="1.0" Green="0" Blue="0" Alpha="1">'
        b'<![CDATA[spleen]]></Label>\n<Label Key="0">???</Label></LabelTable><StudyMetaDataLinkSet>'
        b"</StudyMetaDataLinkSet><VolumeType><![CDATA[Label]]></VolumeType></VolumeInformation></CaretExtension>\n    "
    )
    assert stored_labels(with_extensions(tmp_path / "a.nii", (6, b"a comment"), (0, form))) == {1: "spleen"}


def test_files_that_are_no_nifti_tell_nothing(tmp_path: Path) -> None:
    assert stored_labels(mask(tmp_path / "a.nrrd")) == {}
    (tmp_path / "b.nii.gz").write_bytes(b"no image")
    assert stored_labels(tmp_path / "b.nii.gz") == {}


def test_the_table_beside_a_mask_is_that_of_bids() -> None:
    assert to_tsv(TABLE) == "index\tname\tcolor\n1\tleft <lung> & more\t#FF8000\n7\trein gauche é\t#000010\n"
