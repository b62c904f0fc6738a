"""Items in several processes: the same results in the same order as in one, and failures that say what happened."""

from __future__ import annotations

import os
import pickle
import time
from pathlib import Path

import pytest

from medseg_diffusion.errors import InputError, MedsegError
from medseg_diffusion.workflows import parallel
from medseg_diffusion.workflows.parallel import call_each

# Called in processes of their own, these must be functions of modules that can be imported: of the standard library.


def test_one_process_calls_in_order() -> None:
    calls: list[int] = []
    done: list[int] = []
    assert call_each(lambda item: calls.append(item) or 2 * item, [3, 1, 2], 1, done.append) == [6, 2, 4]
    assert calls == [3, 1, 2] and done == [1, 2, 3]
    assert call_each(str, [], None) == []


def test_several_processes_give_the_results_of_one() -> None:
    done: list[int] = []
    items = [10**k for k in range(6)]
    assert call_each(oct, items, 2, done.append) == [oct(item) for item in items]
    assert done == [1, 2, 3, 4, 5, 6]


def test_processes_are_not_started_for_little_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "usable_cpus", lambda: 8)
    monkeypatch.setattr(parallel, "ProcessPoolExecutor", None)  # would fail if called
    assert call_each(lambda item: os.getpid(), [1, 2], None) == [os.getpid()] * 2
    assert call_each(lambda item: item, [5], 8) == [5], "a single item stays here whatever was asked for"
    with pytest.raises(TypeError):  # and this shows that the first assertion can fail: lambdas take long here
        call_each(lambda item: time.sleep(0.3), [1] * 100, None)


def test_a_killed_process_is_told_in_one_line() -> None:
    with pytest.raises(MedsegError, match="a process ended without a result") as caught:
        call_each(os._exit, [1, 1, 1], 2)
    assert "\n" not in str(caught.value)


def test_a_refused_file_keeps_its_message_between_processes() -> None:
    error = InputError(Path("a.nii.gz"), "a hole", "none", "fill it")
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error) and (copy.source, copy.remedy) == (error.source, error.remedy)
