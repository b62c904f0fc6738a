"""A function called for each of many items, in several processes where that pays."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import TypeVar

from medseg_diffusion.errors import MedsegError

T = TypeVar("T")
R = TypeVar("R")

_WORTH_SECONDS = 20.0
"""Expected time of the items left from which further processes are started: each imports torch, which takes seconds."""

_MOST = 8
"""Largest number of processes that are started unasked: each holds an item, and two maps of 512 x 512 x 400 voxels with
what is computed from them take up to 3 GB."""


def usable_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def call_each(
    function: Callable[[T], R],
    items: Sequence[T],
    jobs: int | None = 1,
    on_done: Callable[[int], None] = lambda count: None,
) -> list[R]:
    """The results of ``function(item)``, in the order of the items; they do not depend on ``jobs``.

    Args:
        function: A function of a module: processes are spawned, and import it.
        items: What can be pickled, as the results can.
        jobs: Number of processes. 1 calls all in this process. None starts one for each CPU, up to 8, if the time of
            the first item tells that they pay.
        on_done: Called with the number of finished items after each.

    Raises:
        MedsegError: A process ended without a result, for instance because it was killed for lack of memory.
    """
    results: list[R] = []

    def here(part: Sequence[T]) -> None:
        for item in part:
            results.append(function(item))
            on_done(len(results))

    if jobs is None:
        started = time.perf_counter()
        here(items[:1])
        left = (time.perf_counter() - started) * (len(items) - 1)
        jobs = min(usable_cpus(), _MOST) if left >= _WORTH_SECONDS else 1
    rest = items[len(results) :]
    if min(jobs, len(rest)) <= 1:
        here(rest)
        return results
    pool = ProcessPoolExecutor(min(jobs, len(rest)), mp_context=get_context("spawn"), initializer=_one_thread)
    try:
        for future in [pool.submit(function, item) for item in rest]:
            results.append(future.result())
            on_done(len(results))
    except BrokenProcessPool as error:
        raise MedsegError(
            "a process ended without a result, for instance for lack of memory; use fewer with --jobs"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
    return results


def _one_thread() -> None:
    """Keep torch to one thread: the processes use all CPUs together."""
    import torch

    torch.set_num_threads(1)
