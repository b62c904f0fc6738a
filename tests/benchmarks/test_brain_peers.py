"""Manual references become the model's classes, side by side; the table of peers says what was measured."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from medseg_diffusion.data.brain_classes import STRUCTURES, TISSUES

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LAS = np.diag([-1.0, 1.0, 1.0, 1.0])


@pytest.fixture
def references(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS / "studies")
    import brain_references

    return brain_references


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(sys, "path", [*sys.path])
    import brain_peers

    return brain_peers


def names(values: np.ndarray) -> list[str]:
    return [STRUCTURES.names[value] for value in values.ravel()]


def test_numbers_of_the_references_become_classes_of_their_side(references: ModuleType) -> None:
    numbers = np.array([0, 4, 11, 23, 30, 35, 46, 47, 48, 50, 52, 62, 69, 101, 200, 44, 45, 75, 76]).reshape(-1, 1, 1)
    assert names(references.structures(numbers, LAS)) == [
        "background", "third ventricle", "fourth ventricle", "right accumbens", "left accumbens", "brainstem",
        "other CSF", "right hippocampus", "left hippocampus", "left lateral ventricle", "left lateral ventricle",
        "left ventral diencephalon", "background", "left cerebral cortex", "right cerebral cortex",
        "right cerebral white matter", "left cerebral white matter", "left cerebral cortex", "right cerebral cortex",
    ]  # fmt: skip


@pytest.mark.parametrize("affine", [LAS, np.eye(4)])
def test_the_vermis_goes_to_the_side_where_it_lies(affine: np.ndarray, references: ModuleType) -> None:
    """Whatever the direction of the scan's first axis."""
    right_first = affine[0, 0] < 0
    sides = (44, 45) if right_first else (45, 44)
    numbers = np.array([sides[0], 71, 72, 73, 73, sides[1]]).reshape(-1, 1, 1)
    first, last = ("right", "left") if right_first else ("left", "right")
    found = names(references.structures(numbers, affine))
    assert found[1:5] == [f"{side} cerebellar cortex" for side in (first, first, last, last)]


def test_a_structure_belongs_to_one_tissue(peers: ModuleType) -> None:
    labels = np.arange(len(STRUCTURES.names))
    tissues = peers.tissues_of(labels, STRUCTURES.names)
    of = dict(zip(STRUCTURES.names, (TISSUES.names[value] for value in tissues), strict=True))
    assert of["left thalamus"] == "grey matter" and of["brainstem"] == "white matter"
    assert of["third ventricle"] == of["other CSF"] == "CSF" and of["background"] == "background"
    assert np.array_equal(peers.tissues_of(np.arange(4), TISSUES.names), np.arange(4))


def test_structures_are_compared_by_their_names(peers: ModuleType) -> None:
    """Whatever values the model's classes have."""
    own = ["background", "left hippocampus", "left thalamus", "other CSF"]
    reference = np.array([STRUCTURES.names.index(name) for name in (own[1], own[2], own[2], own[0])])
    numbers = peers.scored("ours", np.array([1, 2, 1, 0]), reference, reference, own)
    assert numbers["brain"] == 1 and numbers["left thalamus"] == numbers["left hippocampus"] == pytest.approx(2 / 3)
    assert numbers["grey matter"] == 1 and "other CSF" not in numbers and "right thalamus" not in numbers
    assert peers.scored("deepbet", np.array([1, 1, 1, 1]), reference, reference, own) == {"brain": pytest.approx(6 / 7)}


def test_the_table_counts_scans_that_failed(peers: ModuleType) -> None:
    rows = [
        {"kind": "whole head", "scan": "a", "tool": "ours", "seconds": "10.0", "brain": "0.96"},
        {"kind": "whole head", "scan": "b", "tool": "ours", "seconds": "14.0", "brain": "0.98"},
        {"kind": "whole head", "scan": "a", "tool": "atropos", "seconds": ""},
        {"kind": "whole head", "scan": "b", "tool": "atropos", "seconds": "20.0", "brain": "0.90"},
    ]
    lines = peers.summary(rows, ["ours", "atropos"]).splitlines()
    assert lines[2].startswith("| whole head | ours | 2 of 2 | 12.0 | 0.970 |")
    assert lines[3].startswith("| whole head | atropos | 1 of 2 | 20.0 | 0.900 |")
