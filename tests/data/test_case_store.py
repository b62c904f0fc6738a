"""Prepared cases come back as they were stored, after a kill too, and no process copies them."""

from __future__ import annotations

import tempfile
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.utils.data import DataLoader

from medseg_diffusion.data.case_store import CaseStore
from medseg_diffusion.data.draws import Draws
from medseg_diffusion.data.mask_examples import MaskExamples, PreparedCase, stored_case

ARRAYS = st.lists(
    hnp.arrays(
        st.sampled_from([np.float32, np.uint8, np.int32]),
        hnp.array_shapes(min_dims=1, max_dims=4, max_side=5),
        elements=st.integers(0, 100),
    ),
    min_size=1,
    max_size=4,
)


def store_of(folder: Path, count: int = 3, side: int = 16) -> CaseStore:
    store = CaseStore(folder)
    for i in range(count):
        image = np.random.default_rng(i).standard_normal((1, side, side, side)).astype(np.float32)
        store.add(f"case{i}", "new", [image, (image[0] > 0).astype(np.uint8)])
    return store


@settings(max_examples=40, deadline=None)
@given(cases=st.dictionaries(st.text(max_size=8), ARRAYS, min_size=1, max_size=5))
def test_arrays_of_any_type_and_shape_come_back(cases: dict[str, list[np.ndarray]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = CaseStore(Path(folder))
        for name, arrays in cases.items():
            store.add(name, "made so", arrays)
        for opened in (store, CaseStore(Path(folder))):
            for name, arrays in cases.items():
                for tensor, array in zip(opened.tensors(name), arrays, strict=True):
                    assert tensor.numpy().dtype == array.dtype and np.array_equal(tensor.numpy(), array)


def test_a_case_that_is_stored_again_replaces_the_first(tmp_path: Path) -> None:
    """Views of the first one stay as they were."""
    store = store_of(tmp_path)
    before = store.tensors("case1")[0].clone()
    view = store.tensors("case1")[0]
    store.add("case1", "changed", [np.zeros(3, np.float32)])
    assert store.holds("case1", "changed") and not store.holds("case1", "new") and store.holds("case0", "new")
    again = CaseStore(tmp_path)
    assert again.holds("case1", "changed") and torch.equal(again.tensors("case1")[0], torch.zeros(3))
    assert torch.equal(view, before)


@pytest.mark.parametrize(
    ("file", "lost"), [("cases.bin", 1), ("cases.bin", 50), ("cases.jsonl", 2), ("cases.jsonl", 50)]
)
def test_a_case_that_was_being_written_is_not_there(tmp_path: Path, file: str, lost: int) -> None:
    """The others are, and it can be stored again."""
    store_of(tmp_path)
    content = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(content[:-lost])
    store = CaseStore(tmp_path)
    assert [store.holds(f"case{i}", "new") for i in range(3)] == [True, True, False]
    expected = [store.tensors("case0")[0].clone(), torch.arange(5)]
    store.add("case2", "again", [np.arange(5)])
    for opened in (store, CaseStore(tmp_path)):
        assert torch.equal(opened.tensors("case0")[0], expected[0])
        assert opened.holds("case2", "again") and torch.equal(opened.tensors("case2")[0], expected[1])


def test_a_case_goes_to_another_process_by_its_name(tmp_path: Path) -> None:
    """Its tensors would be copied into shared memory: a whole data set."""
    store = store_of(tmp_path)
    examples = MaskExamples([stored_case(store, name) for name in store.entries], (8, 8, 8))
    cases = ForkingPickler.dumps(examples.cases)
    assert len(cases) < 1000
    in_memory = PreparedCase("a", torch.zeros(1, 8, 8, 8), torch.zeros(8, 8, 8))
    assert torch.equal(ForkingPickler.loads(ForkingPickler.dumps(in_memory)).image, in_memory.image)
    for case, again in zip(examples.cases, ForkingPickler.loads(cases), strict=True):
        assert torch.equal(case.image, again.image) and torch.equal(case.label, again.label)


def test_what_is_written_into_a_case_stays_in_the_process(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    store.tensors("case0")[0].fill_(7)
    assert not torch.equal(CaseStore(tmp_path).tensors("case0")[0], store.tensors("case0")[0])


@pytest.mark.slow  # a worker process starts
def test_a_worker_process_draws_the_same_examples(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    draws = Draws(MaskExamples([stored_case(store, name) for name in store.entries], (8, 8, 8)), seed=0)
    here = DataLoader(draws, batch_size=2, sampler=range(6))
    there = DataLoader(draws, batch_size=2, sampler=range(6), num_workers=1, multiprocessing_context="spawn")
    for a, b in zip(here, there, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
