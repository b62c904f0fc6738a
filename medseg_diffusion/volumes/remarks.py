"""Remarks on files, as warnings. Files are read in several threads, but Python's filters of warnings are common to all.

Hence the lock, and hence filters that spare our own remarks.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock

_LOCK = RLock()
_READERS = ("nibabel", "numpy", "pydicom")


def remark(text: str) -> None:
    """Warns of a fact that the reader of a result should know. The text begins with the file's name."""
    with _LOCK:
        warnings.warn(text, stacklevel=3)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of the libraries that read files: they do not name the file. The block should be short."""
    with _LOCK, warnings.catch_warnings():
        for module in _READERS:
            warnings.filterwarnings("ignore", module=module)
        yield
