"""The classes that a user names, and the tissues of a card."""

from __future__ import annotations

import pytest

from medseg_diffusion.data.brain_classes import STRUCTURES
from medseg_diffusion.data.brain_classes import tissues_of as grouped
from medseg_diffusion.errors import ModelError, UsageError
from medseg_diffusion.models.card import render_card
from medseg_diffusion.models.classes import chosen_classes, tissues_of
from medseg_diffusion.models.store import load_card

BRAIN = dict(enumerate(STRUCTURES.names))
FEW = {0: "background", 1: "CSF", 2: "grey matter", 5: "Left_lung"}


@pytest.mark.parametrize(
    ("wanted", "values"),
    [
        ("hippocampus", [10, 23]),
        ("Hippocampus , THALAMUS", [6, 10, 19, 23]),
        ("left hippocampus", [10]),
        ("left-hippocampus,left_hippocampus,10", [10]),
        ("brainstem", [27]),
        ([27, "amygdala"], [11, 24, 27]),
        ("cerebral  cortex", [2, 15]),
    ],
)
def test_names_sides_and_values_select_classes(wanted: str | list[str | int], values: list[int]) -> None:
    assert chosen_classes(BRAIN, wanted, "brain") == {value: BRAIN[value] for value in values}


def test_a_name_is_itself_before_it_is_a_name_without_its_side() -> None:
    classes = {1: "lung", 2: "left lung", 3: "right lung"}
    assert chosen_classes(classes, "lung", "m") == {1: "lung"}
    assert chosen_classes(FEW, "left lung,csf", "m") == {1: "CSF", 5: "Left_lung"}


@pytest.mark.parametrize("wanted", ["grey", "0", "3", "background", "", " , "])
def test_an_unknown_name_lists_few_classes(wanted: str) -> None:
    with pytest.raises(UsageError, match=r"its classes are 1 CSF, 2 grey matter, 5 Left_lung$") as caught:
        chosen_classes(FEW, wanted, "lungs")
    assert "\n" not in str(caught.value)


def test_an_unknown_name_among_many_classes_lists_the_nearest_and_says_how_to_see_all() -> None:
    with pytest.raises(UsageError) as caught:
        chosen_classes(BRAIN, "thalamus,hipocampus", "brain")
    assert str(caught.value) == (
        "brain: no class 'hipocampus'; the nearest are left hippocampus, right hippocampus; "
        "`medseg models show brain` lists all 30"
    )
    with pytest.raises(UsageError, match=r"no class 'xyz'; `medseg models show brain` lists all 30$"):
        chosen_classes(BRAIN, "xyz", "brain")


def card(**changes: object) -> dict[str, object]:
    return {"labels": {str(value): name for value, name in BRAIN.items()}, "tissues": grouped(STRUCTURES), **changes}


def test_the_tissues_of_the_brain_model() -> None:
    labels, groups = tissues_of(card(), "brain")
    assert labels == {0: "background", 1: "CSF", 2: "grey matter", 3: "white matter"}
    tissue = {BRAIN[value]: labels[group] for value, group in enumerate(groups)}
    assert tissue["background"] == "background" and tissue["left lateral ventricle"] == tissue["other CSF"] == "CSF"
    assert tissue["right thalamus"] == "grey matter" and tissue["brainstem"] == "white matter"


def test_the_readme_of_a_model_tells_its_tissues() -> None:
    text = render_card({**load_card("brain-tissue-t1"), "tissues": {"fluid": ["CSF"], "tissue": ["grey", "white"]}})
    assert "| tissues (`--tissues`) | 1 fluid: CSF; 2 tissue: grey, white |\n| sampling |" in text


def test_a_card_without_tissues_or_with_wrong_ones_is_one_line() -> None:
    with pytest.raises(
        UsageError, match=r"m: its card groups no classes .* \(its classes are CSF\); leave --tissues out"
    ):
        tissues_of({"labels": {"0": "background", "1": "CSF"}}, "m")
    for wrong, message in (
        ({"CSF": ["blood"]}, "names 'blood', which is no class"),
        ({"CSF": ["brainstem"], "grey matter": ["brainstem"]}, "names a class twice"),
        ({"CSF": ["brainstem"], "grey matter": []}, "names no class for 'grey matter'"),
        (["CSF"], "no list of classes"),
        ({"CSF": 3}, "no list of classes"),
    ):
        with pytest.raises(ModelError, match=message):
            tissues_of(card(tissues=wrong), "m")
