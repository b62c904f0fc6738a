"""Diffusion models that generate, segment and find anomalies in medical images.

`load_segmenter` gives a model that segments scans in memory, `segment` writes files, `train_segmenter` trains,
`evaluate` compares masks, and `import_model` converts published weights. The command line `medseg` calls the same
functions.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .models.imported import load_model
    from .models.load import load_segmenter
    from .volumes.io import read_labels, read_volume, write_labels, write_map
    from .workflows.evaluate import EvaluateOptions, evaluate
    from .workflows.import_model import import_model
    from .workflows.segment import SegmentOptions, segment
    from .workflows.train_segmenter import train_segmenter

__version__ = version("medseg-diffusion")

# Imported on first use: `medseg --help` must not wait for torch.
_HOMES = {
    "evaluate": "workflows.evaluate",
    "EvaluateOptions": "workflows.evaluate",
    "import_model": "workflows.import_model",
    "load_model": "models.imported",
    "load_segmenter": "models.load",
    "SegmentOptions": "workflows.segment",
    "segment": "workflows.segment",
    "train_segmenter": "workflows.train_segmenter",
    "read_labels": "volumes.io",
    "read_volume": "volumes.io",
    "write_labels": "volumes.io",
    "write_map": "volumes.io",
}
__all__ = [
    "EvaluateOptions",
    "SegmentOptions",
    "evaluate",
    "import_model",
    "load_model",
    "load_segmenter",
    "read_labels",
    "read_volume",
    "segment",
    "train_segmenter",
    "write_labels",
    "write_map",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
