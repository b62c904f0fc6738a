"""Diffusion models that generate, segment and find anomalies in medical images.

This module is the whole public interface: the names of ``__all__``. They stay as they are within a major version. All
other modules, and names that begin with an underscore, are private and change without notice.

A model in memory takes scans as files, images of nibabel, arrays or volumes, and gives results with their geometry::

    from medseg_diffusion import load_model

    model = load_model("brain-tissue-t1")
    segmented = model.segment("scan.nii.gz")
    print(segmented.volumes_ml)
    segmented.save("scan_seg.nii.gz")

`load_model` loads any model: segmenters have ``.segment``, anomaly models ``.anomaly``, generators ``.sample``.
`evaluate_arrays` compares two label maps. Every command of `medseg` is a function of the same name that reads and
writes files: `segment`, `anomaly`, `sample`, `evaluate`, `train_segmenter` and so on. Trainings take a preset's name or
a typed configuration, and a folder or a list of files.

Whatever takes long has ``on_progress``, which is called with a text and the share done, 0 to 1. Errors that a user can
meet are `MedsegError`, with a message of one line.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api.evaluation import ClassMetrics, evaluate_arrays
    from .api.models import AnomalyDetector, Generator, Model, Network, Segmenter, load_model
    from .api.results import Samples, ScoredScan, SegmentedScan
    from .config.anomaly import AnomalyConfig
    from .config.generator import GeneratorConfig, ImageAutoencoderConfig, NoisyClassifierConfig
    from .config.load import load_config, presets
    from .config.pixel_classifier import PixelClassifierConfig
    from .config.segmenter import SegmenterConfig
    from .errors import InputError, MedsegError, ModelError, Stopped, UsageError
    from .models.anomaly import DetectionOptions
    from .models.image_source import SampleOptions
    from .models.store import list_models, load_card
    from .training.options import Progress
    from .volumes.io import read_labels, read_volume, write_labels, write_map
    from .volumes.sources import InputOptions
    from .volumes.volume import Volume
    from .workflows.anomaly import AnomalyOptions, anomaly
    from .workflows.benchmark_segmenter import BenchmarkOptions, benchmark_segmenter
    from .workflows.calibrate_anomaly import CalibrationOptions, calibrate_anomaly
    from .workflows.calibrate_segmenter import calibrate_segmenter
    from .workflows.check import check
    from .workflows.evaluate import EvaluateOptions, compare_predictions, evaluate
    from .workflows.evaluate_generator import GeneratorEvaluationOptions, evaluate_generator
    from .workflows.export_model import export_model
    from .workflows.import_model import import_model
    from .workflows.info import info
    from .workflows.report import report
    from .workflows.sample import sample
    from .workflows.scans import ScanResult
    from .workflows.segment import SegmentOptions, segment
    from .workflows.synthesize_anomalies import SynthesisOptions, synthesize_anomalies
    from .workflows.train_anomaly import train_anomaly
    from .workflows.train_generator import train_generator
    from .workflows.train_pixel_classifier import train_pixel_classifier
    from .workflows.train_segmenter import train_segmenter

__version__ = version("medseg-diffusion")

# Imported on first use: `medseg --help` must not wait for torch.
_HOMES = {
    "api.evaluation": ("ClassMetrics", "evaluate_arrays"),
    "api.models": ("AnomalyDetector", "Generator", "Model", "Network", "Segmenter", "load_model"),
    "api.results": ("Samples", "ScoredScan", "SegmentedScan"),
    "config.anomaly": ("AnomalyConfig",),
    "config.generator": ("GeneratorConfig", "ImageAutoencoderConfig", "NoisyClassifierConfig"),
    "config.load": ("load_config", "presets"),
    "config.pixel_classifier": ("PixelClassifierConfig",),
    "config.segmenter": ("SegmenterConfig",),
    "errors": ("InputError", "MedsegError", "ModelError", "Stopped", "UsageError"),
    "models.anomaly": ("DetectionOptions",),
    "models.image_source": ("SampleOptions",),
    "models.store": ("list_models", "load_card"),
    "training.options": ("Progress",),
    "volumes.io": ("read_labels", "read_volume", "write_labels", "write_map"),
    "volumes.sources": ("InputOptions",),
    "volumes.volume": ("Volume",),
    "workflows.anomaly": ("AnomalyOptions", "anomaly"),
    "workflows.benchmark_segmenter": ("BenchmarkOptions", "benchmark_segmenter"),
    "workflows.calibrate_anomaly": ("CalibrationOptions", "calibrate_anomaly"),
    "workflows.calibrate_segmenter": ("calibrate_segmenter",),
    "workflows.check": ("check",),
    "workflows.evaluate": ("EvaluateOptions", "compare_predictions", "evaluate"),
    "workflows.evaluate_generator": ("GeneratorEvaluationOptions", "evaluate_generator"),
    "workflows.export_model": ("export_model",),
    "workflows.import_model": ("import_model",),
    "workflows.info": ("info",),
    "workflows.report": ("report",),
    "workflows.sample": ("sample",),
    "workflows.scans": ("ScanResult",),
    "workflows.segment": ("SegmentOptions", "segment"),
    "workflows.synthesize_anomalies": ("SynthesisOptions", "synthesize_anomalies"),
    "workflows.train_anomaly": ("train_anomaly",),
    "workflows.train_generator": ("train_generator",),
    "workflows.train_pixel_classifier": ("train_pixel_classifier",),
    "workflows.train_segmenter": ("train_segmenter",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [  # listed for type checkers and editors; a test compares it with _HOMES
    "AnomalyConfig",
    "AnomalyDetector",
    "AnomalyOptions",
    "BenchmarkOptions",
    "CalibrationOptions",
    "ClassMetrics",
    "DetectionOptions",
    "EvaluateOptions",
    "Generator",
    "GeneratorConfig",
    "GeneratorEvaluationOptions",
    "ImageAutoencoderConfig",
    "InputError",
    "InputOptions",
    "MedsegError",
    "Model",
    "ModelError",
    "Network",
    "NoisyClassifierConfig",
    "PixelClassifierConfig",
    "Progress",
    "SampleOptions",
    "Samples",
    "ScanResult",
    "ScoredScan",
    "SegmentOptions",
    "SegmentedScan",
    "Segmenter",
    "SegmenterConfig",
    "Stopped",
    "SynthesisOptions",
    "UsageError",
    "Volume",
    "anomaly",
    "benchmark_segmenter",
    "calibrate_anomaly",
    "calibrate_segmenter",
    "check",
    "compare_predictions",
    "evaluate",
    "evaluate_arrays",
    "evaluate_generator",
    "export_model",
    "import_model",
    "info",
    "list_models",
    "load_card",
    "load_config",
    "load_model",
    "presets",
    "read_labels",
    "read_volume",
    "report",
    "sample",
    "segment",
    "synthesize_anomalies",
    "train_anomaly",
    "train_generator",
    "train_pixel_classifier",
    "train_segmenter",
    "write_labels",
    "write_map",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_HOME_OF[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return [*__all__, "__all__", "__doc__", "__file__", "__name__", "__path__", "__version__"]
