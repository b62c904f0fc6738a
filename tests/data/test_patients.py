"""Cases of one patient stay together; a patients.csv that does not fit the cases is refused."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from medseg_diffusion.data.cases import Case, find_cases, split_by_hash
from medseg_diffusion.data.patients import patients_of, read_patients
from medseg_diffusion.errors import InputError


def folder_of_slices(folder: Path, patients: str | None) -> Path:
    """Two slices of each of three patients, as PNG files with masks."""
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True)
        for name in ("a1", "a2", "b1", "b2", "c1", "c2"):
            Image.fromarray(np.zeros((4, 4), np.uint8)).save(folder / kind / f"{name}.png")
    if patients is not None:
        (folder / "patients.csv").write_text(patients)
    return folder


def rows(**patients: str) -> str:
    return "\n".join(["case,patient", *(f"{case},{patient}" for case, patient in patients.items())]) + "\n"


def test_the_file_names_the_patients(tmp_path: Path) -> None:
    names = {name: name[0] for name in ("a1", "a2", "b1", "b2", "c1", "c2")}
    folder = folder_of_slices(tmp_path / "data", rows(**names))
    assert {case.name: case.patient for case in find_cases(folder).cases} == names
    split = split_by_hash(find_cases(folder).cases, test=1, validation=1)
    for side in (split.train, split.validation, split.test):
        assert len(side) == 2 and len({name[0] for name in side}) == 1
    (folder / "patients.csv").unlink()
    assert {case.patient for case in find_cases(folder).cases} == set(names)


def test_rows_without_a_case_are_counted_in_one_warning(tmp_path: Path) -> None:
    names = {name: name[0] for name in ("a1", "a2", "b1", "b2", "c1", "c2", "d1", "d2")}
    folder = folder_of_slices(tmp_path / "data", rows(**names))
    with pytest.warns(UserWarning, match=r"patients\.csv: 2 of 8 rows are of cases that are not there") as caught:
        find_cases(folder)
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (rows(a1="a", a2="a", b1="b", b2="b"), "no row for case c1 and 1 more"),
        ("case,patient\na1,a\na1,b\n", "case a1 twice"),
        ("name,patient\na1,a\n", "the columns name, patient"),
        ("", "the columns none"),
        ("case,patient\na1,\n", "a row without patient"),
        ("case,patient\n,a\n", "a row without case"),
        ("case,patient\na1\n", "a row without patient"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path: Path, content: str, message: str) -> None:
    folder = folder_of_slices(tmp_path / "data", content)
    with pytest.raises(InputError, match=message) as caught:
        find_cases(folder)
    assert str(folder / "patients.csv") in str(caught.value)


def test_an_unreadable_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "patients.csv").write_bytes(b"case,patient\n\xff\xfe,\x00\n")
    with pytest.raises(InputError, match="an unreadable file"):
        read_patients(tmp_path / "patients.csv", ["a"])
    assert patients_of(tmp_path / "elsewhere", ["a"]) == {}


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), patients=st.integers(4, 12), slices=st.integers(1, 4))
def test_the_split_does_not_depend_on_the_order_of_the_cases(seed: int, patients: int, slices: int) -> None:
    cases = [Case(f"p{p}-{i}", Path(), Path(), f"p{p}") for p in range(patients) for i in range(slices)]
    shuffled = random.Random(seed).sample(cases, len(cases))
    first, second = (split_by_hash(order, test=1, validation=2) for order in (cases, shuffled))
    for side in ("train", "validation", "test"):
        names = set(getattr(first, side))
        assert names == set(getattr(second, side))
        assert len(names) == slices * {"train": patients - 3, "validation": 2, "test": 1}[side]


@pytest.mark.data
def test_relatives_of_the_real_folders_are_on_one_side(data_folder: Path) -> None:
    for name, groups in (("Task04_Hippocampus", 147), ("nuclei_dsb2018", 164), ("lidc_nodules", 600)):
        cases = find_cases(data_folder / name).cases
        assert len({case.patient for case in cases}) == groups
        split = split_by_hash(cases, test=20, validation=10)
        sides = [{case.patient for case in cases if case.name in set(names)} for names in (split.train, split.test)]
        assert not sides[0] & sides[1] and len(sides[1]) == 20


def test_a_copy_of_the_folder_has_the_same_split(tmp_path: Path) -> None:
    folder = folder_of_slices(tmp_path / "data", rows(a1="a", a2="a", b1="b", b2="b", c1="c", c2="c"))
    copy = shutil.copytree(folder, tmp_path / "copy")
    splits = [split_by_hash(find_cases(where).cases, test=1, validation=1) for where in (folder, copy)]
    assert splits[0] == splits[1]
