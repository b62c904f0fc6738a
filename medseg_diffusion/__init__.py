"""Diffusion models that generate, segment and find anomalies in medical images.

This module is the whole public interface: the names of ``__all__``, with their documented parameters and attributes.
They stay as they are within a major version. All other modules, and names that begin with an underscore, are private
and change without notice.

A model in memory takes scans as files, images of nibabel, arrays or volumes, and gives results with their geometry::

    from medseg_diffusion import load_model

    model = load_model("brain-tissue-t1")
    segmented = model.segment("scan.nii.gz")
    print(segmented.volumes_ml)
    segmented.save("scan_seg.nii.gz")

`load_model` loads any model: segmenters have ``.segment``, anomaly models ``.anomaly``, generators ``.sample``.
`evaluate_arrays` compares two label maps. Commands of `medseg` are functions of the same name that read and write
files: `segment`, `anomaly`, `sample`, `evaluate`, `train_segmenter` and so on; for `medseg models` and `medseg configs`
these are `list_models`, `install_model`, `presets`, `load_config` and others. Trainings take a preset's name or a typed
configuration, and a folder or a list of files.

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
    from .config.load import Preset, described_presets, load_config, presets
    from .config.pixel_classifier import PixelClassifierConfig
    from .config.segmenter import SegmenterConfig
    from .data.image_check import ImageCheck
    from .errors import InputError, MedsegError, ModelError, Stopped, UsageError
    from .methods.calibration import Calibration
    from .metrics.benchmark_summary import BenchmarkRow
    from .metrics.comparison import Comparison
    from .metrics.evaluation_summary import Evaluation
    from .metrics.generation_summary import GeneratorEvaluation, GeneratorRow
    from .models.anomaly import DetectionOptions
    from .models.image_source import SampleOptions
    from .models.store import ModelInfo, list_models, load_card
    from .reports.run_page import RunSummary
    from .training.options import Progress
    from .training.trainer import Outcome
    from .volumes.io import read_labels, read_volume, write_labels, write_map
    from .volumes.modality import SeriesChoice
    from .volumes.sources import InputOptions
    from .volumes.volume import Volume
    from .workflows.anomaly import AnomalyOptions, anomaly
    from .workflows.anomaly_calibration import CalibratedAnomaly
    from .workflows.anomaly_result import AnomalyResult
    from .workflows.benchmark_segmenter import BenchmarkOptions, benchmark_segmenter
    from .workflows.calibrate_anomaly import CalibrationOptions, calibrate_anomaly
    from .workflows.calibrate_segmenter import calibrate_segmenter
    from .workflows.check import check
    from .workflows.evaluate import EvaluateOptions, compare_predictions, evaluate
    from .workflows.evaluate_generator import GeneratorEvaluationOptions, evaluate_generator
    from .workflows.export_bundle import export_bundle
    from .workflows.export_model import export_model
    from .workflows.export_onnx import export_onnx
    from .workflows.import_bundle import import_bundle
    from .workflows.import_model import import_model
    from .workflows.info import info
    from .workflows.install_model import install_model, remove_model
    from .workflows.report import report
    from .workflows.sample import sample
    from .workflows.scans import ScanResult
    from .workflows.segment import SegmentOptions, segment
    from .workflows.synthesize_anomalies import SynthesisOptions, synthesize_anomalies
    from .workflows.train_anomaly import train_anomaly
    from .workflows.train_generator import train_generator
    from .workflows.train_pixel_classifier import TrainedPixelClassifier, train_pixel_classifier
    from .workflows.train_segmenter import train_segmenter

__version__ = version("medseg-diffusion")

# Imported on first use: `medseg --help` must not wait for torch.
_HOMES = {
    "api.evaluation": ("ClassMetrics", "evaluate_arrays"),
    "api.models": ("AnomalyDetector", "Generator", "Model", "Network", "Segmenter", "load_model"),
    "api.results": ("Samples", "ScoredScan", "SegmentedScan"),
    "config.anomaly": ("AnomalyConfig",),
    "config.generator": ("GeneratorConfig", "ImageAutoencoderConfig", "NoisyClassifierConfig"),
    "config.load": ("Preset", "described_presets", "load_config", "presets"),
    "config.pixel_classifier": ("PixelClassifierConfig",),
    "config.segmenter": ("SegmenterConfig",),
    "data.image_check": ("ImageCheck",),
    "errors": ("InputError", "MedsegError", "ModelError", "Stopped", "UsageError"),
    "methods.calibration": ("Calibration",),
    "metrics.benchmark_summary": ("BenchmarkRow",),
    "metrics.comparison": ("Comparison",),
    "metrics.evaluation_summary": ("Evaluation",),
    "metrics.generation_summary": ("GeneratorEvaluation", "GeneratorRow"),
    "models.anomaly": ("DetectionOptions",),
    "models.image_source": ("SampleOptions",),
    "models.store": ("ModelInfo", "list_models", "load_card"),
    "reports.run_page": ("RunSummary",),
    "training.options": ("Progress",),
    "training.trainer": ("Outcome",),
    "volumes.io": ("read_labels", "read_volume", "write_labels", "write_map"),
    "volumes.modality": ("SeriesChoice",),
    "volumes.sources": ("InputOptions",),
    "volumes.volume": ("Volume",),
    "workflows.anomaly": ("AnomalyOptions", "anomaly"),
    "workflows.anomaly_calibration": ("CalibratedAnomaly",),
    "workflows.anomaly_result": ("AnomalyResult",),
    "workflows.benchmark_segmenter": ("BenchmarkOptions", "benchmark_segmenter"),
    "workflows.calibrate_anomaly": ("CalibrationOptions", "calibrate_anomaly"),
    "workflows.calibrate_segmenter": ("calibrate_segmenter",),
    "workflows.check": ("check",),
    "workflows.evaluate": ("EvaluateOptions", "compare_predictions", "evaluate"),
    "workflows.evaluate_generator": ("GeneratorEvaluationOptions", "evaluate_generator"),
    "workflows.export_bundle": ("export_bundle",),
    "workflows.export_model": ("export_model",),
    "workflows.export_onnx": ("export_onnx",),
    "workflows.import_bundle": ("import_bundle",),
    "workflows.import_model": ("import_model",),
    "workflows.info": ("info",),
    "workflows.install_model": ("install_model", "remove_model"),
    "workflows.report": ("report",),
    "workflows.sample": ("sample",),
    "workflows.scans": ("ScanResult",),
    "workflows.segment": ("SegmentOptions", "segment"),
    "workflows.synthesize_anomalies": ("SynthesisOptions", "synthesize_anomalies"),
    "workflows.train_anomaly": ("train_anomaly",),
    "workflows.train_generator": ("train_generator",),
    "workflows.train_pixel_classifier": ("TrainedPixelClassifier", "train_pixel_classifier"),
    "workflows.train_segmenter": ("train_segmenter",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [  # listed for type checkers and editors; a test compares it with _HOMES
    "AnomalyConfig",
    "AnomalyDetector",
    "AnomalyOptions",
    "AnomalyResult",
    "BenchmarkOptions",
    "BenchmarkRow",
    "CalibratedAnomaly",
    "Calibration",
    "CalibrationOptions",
    "ClassMetrics",
    "Comparison",
    "DetectionOptions",
    "EvaluateOptions",
    "Evaluation",
    "Generator",
    "GeneratorConfig",
    "GeneratorEvaluation",
    "GeneratorEvaluationOptions",
    "GeneratorRow",
    "ImageAutoencoderConfig",
    "ImageCheck",
    "InputError",
    "InputOptions",
    "MedsegError",
    "Model",
    "ModelError",
    "ModelInfo",
    "Network",
    "NoisyClassifierConfig",
    "Outcome",
    "PixelClassifierConfig",
    "Preset",
    "Progress",
    "RunSummary",
    "SampleOptions",
    "Samples",
    "ScanResult",
    "ScoredScan",
    "SegmentOptions",
    "SegmentedScan",
    "Segmenter",
    "SegmenterConfig",
    "SeriesChoice",
    "Stopped",
    "SynthesisOptions",
    "TrainedPixelClassifier",
    "UsageError",
    "Volume",
    "anomaly",
    "benchmark_segmenter",
    "calibrate_anomaly",
    "calibrate_segmenter",
    "check",
    "compare_predictions",
    "described_presets",
    "evaluate",
    "evaluate_arrays",
    "evaluate_generator",
    "export_bundle",
    "export_model",
    "export_onnx",
    "import_bundle",
    "import_model",
    "info",
    "install_model",
    "list_models",
    "load_card",
    "load_config",
    "load_model",
    "presets",
    "read_labels",
    "read_volume",
    "remove_model",
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
