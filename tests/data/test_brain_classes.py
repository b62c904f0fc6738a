"""Every label of a brain belongs to a class."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medseg_diffusion.data.brain_classes import PAIRS, STRUCTURES, TISSUES, BrainClasses, tissues_of


def test_labels_become_values_and_unknown_ones_are_refused() -> None:
    assert TISSUES.convert(np.array([0, 24, 42, 41, 515])).tolist() == [0, 1, 2, 3, 0]
    with pytest.raises(ValueError, match="999"):
        TISSUES.convert(np.array([2, 999]))


@pytest.mark.parametrize("classes", [TISSUES, STRUCTURES])
def test_a_label_has_one_class(classes: BrainClasses) -> None:
    labels = [label for group in classes.labels.values() for label in group]
    assert len(labels) == len(set(labels)) and all(classes.labels.values())


def test_both_sides_have_the_same_structures() -> None:
    names, class_of = STRUCTURES.names, STRUCTURES.class_of
    assert len(names) == 31
    for left, right in PAIRS:
        one, other = names[class_of[left]], names[class_of[right]]
        assert one == other == "other CSF" or (one.startswith("left ") and other == one.replace("left", "right"))


def test_structures_are_parts_of_tissues() -> None:
    """Choroid plexus, vessels and lesions, too, belong to the tissue of the structure that they are counted to."""
    groups = tissues_of(STRUCTURES)
    assert list(groups) == ["CSF", "grey matter", "white matter"]
    assert sorted(name for names in groups.values() for name in names) == sorted(STRUCTURES.names[1:])
    assert groups["CSF"] == [
        "left lateral ventricle", "right lateral ventricle", "third ventricle", "fourth ventricle", "other CSF",
    ]  # fmt: skip
    assert {"brainstem", "left ventral diencephalon", "right cerebellar white matter"} <= set(groups["white matter"])
    # Every label of a structure has the same tissue in either model.
    tissue_of = {name: tissue for tissue, names in groups.items() for name in names}
    for label, value in STRUCTURES.class_of.items():
        assert tissue_of.get(STRUCTURES.names[value], "background") == TISSUES.names[TISSUES.class_of[label]]


def test_a_class_of_two_tissues_is_refused() -> None:
    with pytest.raises(ValueError, match="deep nuclei has labels of grey matter and white matter"):
        tissues_of(BrainClasses({"background": (0,), "deep nuclei": (10, 28)}))


@pytest.mark.data
def test_every_label_of_the_real_maps_has_a_class(data_folder: Path) -> None:
    files = sorted((data_folder / "brain_labelmaps").glob("*.nii.gz"))
    assert len(files) == 20
    for file in files:
        labels = np.flatnonzero(np.bincount(np.asarray(nib.load(file).dataobj).astype(np.uint16).ravel()))
        for classes in (TISSUES, STRUCTURES):
            classes.convert(labels)
