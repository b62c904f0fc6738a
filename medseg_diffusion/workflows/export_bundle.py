"""`medseg models export --monai-bundle`: a segmenter as a MONAI bundle, which MONAI loads and runs."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from medseg_diffusion.errors import ModelError, UsageError
from medseg_diffusion.files import require_new_folder, whole_folder
from medseg_diffusion.models.bundle_network import BundleSegmenter, bundle_card, bundle_state
from medseg_diffusion.models.segmenter import restore_segmenter
from medseg_diffusion.models.store import SavedModel, load_model_files

from .export_model import rendered_card
from .hub import repository_of

_HOW = """
## How to run this bundle

It needs Python with medseg-diffusion and its extra `monai-bundle` (pytorch-ignite): the network of the bundle is the
whole of `medseg segment`, so that preprocessing, windows, members and the way back to the scan's grid are the same.

    python -m monai.bundle run --config_file configs/inference.json --meta_file configs/metadata.json \\
        --bundle_root . --dataset_dir /folder/of/scans --output_dir /folder/of/masks

The scans are the files `*.nii.gz` of `dataset_dir` (`--pattern` chooses others). Masks are named `<scan>_seg.nii.gz`.
In Python: `monai.bundle.ConfigWorkflow("configs/inference.json", workflow_type="inference", ...)`. `models/model.pt` is
a plain state dict, read with `weights_only=True`. As with every bundle, the configuration is code: run those you trust.
"""


def export_bundle(model: str | Path, output: str | Path) -> Path:
    """Write a MONAI bundle of a segmenter of masks; return its folder.

    Args:
        model: Model folder, run folder or installed name.
        output: A new folder; its name is that of the bundle.

    Raises:
        ModelError: No usable model, another kind of model, or a card with a text that MONAI would execute.
        UsageError: An output that exists or is no folder.
    """
    output = Path(output)
    if repository_of(output) is not None or output.suffix.lower() in (".zip", ".onnx"):
        raise UsageError(f"{output}: a MONAI bundle is written as a folder; choose a new one")
    require_new_folder(output)
    saved = load_model_files(model)
    restore_segmenter(saved)  # refuses other kinds of models
    name = output.resolve().name
    metadata = _metadata(saved, name)
    _require_no_code(metadata, saved)
    readme = rendered_card(saved, {"licence": "see the training data", **saved.card}, name)
    with whole_folder(output, private=False) as folder:
        for part in ("configs", "models", "docs"):
            (folder / part).mkdir()
        _write_json(folder / "configs" / "metadata.json", metadata)
        _write_json(folder / "configs" / "inference.json", _inference(bundle_card(saved), _type_of(saved)))
        torch.save(bundle_state(saved), folder / "models" / "model.pt")
        BundleSegmenter(bundle_card(saved)).load_state_dict(bundle_state(saved))  # or nothing is written
        (folder / "docs" / "README.md").write_text(readme + _HOW, encoding="utf-8")
        (folder / "LICENSE").write_text(f"{saved.card.get('licence', '')}\n", encoding="utf-8")
    return output


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=4, allow_nan=False) + "\n", encoding="utf-8")


def _require_no_code(content: Any, saved: SavedModel) -> None:
    """ModelError for a text that MONAI takes for an expression, a reference or a macro: a card may be a stranger's."""
    if isinstance(content, str) and content.startswith(("$", "@", "%")):
        raise ModelError(
            f"{saved.path / 'model.json'}: MONAI would execute the text {content[:60]!r}; name channels, classes and "
            "the bundle without $, @ and % at the beginning"
        )
    for part in content.values() if isinstance(content, dict) else content if isinstance(content, list) else ():
        _require_no_code(part, saved)


def _metadata(saved: SavedModel, name: str) -> dict[str, Any]:
    card = saved.card
    shape = ["*", "*", "*"]
    return {
        "schema": "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/"
        "meta_schema_20240725.json",
        "version": "1.0.0",
        "changelog": {"1.0.0": "exported"},
        "monai_version": version("monai"),
        "pytorch_version": version("torch").partition("+")[0],
        "numpy_version": version("numpy"),
        "required_packages_version": {name: version(name) for name in ("medseg-diffusion", "nibabel")}
        | {"pytorch-ignite": "0.5.0"},
        "name": name,
        "task": "segmentation",
        "description": card["config"].get("description", ""),
        "authors": "see docs/README.md",
        "copyright": "see docs/README.md",
        "data_source": card.get("about", {}).get("data", ""),
        "intended_use": card.get("about", {}).get("intended_use", ""),
        "network_data_format": {
            "inputs": {
                "image": {
                    "type": "image",
                    "format": "magnitude",
                    "modality": ", ".join(card["channels"]),
                    "num_channels": len(card["channels"]),
                    "spatial_shape": shape,
                    "dtype": "float32",
                    "value_range": [],
                    "is_patch_data": False,
                    "channel_def": {str(i): channel for i, channel in enumerate(card["channels"])},
                }
            },
            "outputs": {
                "pred": {
                    "type": "image",
                    "format": "labels",
                    "num_channels": 1,
                    "spatial_shape": shape,
                    "dtype": _type_of(saved),
                    "value_range": [0, max(map(int, card["labels"]))],
                    "is_patch_data": False,
                    "channel_def": card["labels"],
                }
            },
        },
    }


def _type_of(saved: SavedModel) -> str:
    """Type of the masks, which holds every label."""
    return "uint8" if len(saved.card["labels"]) <= 256 else "int32"


def _inference(card: str, dtype: str) -> dict[str, Any]:
    return {
        "imports": ["$from pathlib import Path", "$import numpy as np", "$import torch"],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/scans'",
        "output_dir": "$@bundle_root + '/eval'",
        "pattern": "*.nii.gz",
        "seed": 0,
        "data": "$[{'image': str(path)} for path in sorted(Path(@dataset_dir).glob(@pattern))]",
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
        "network_def": {
            "_target_": "medseg_diffusion.models.bundle_network.BundleSegmenter",
            "card": card,
            "seed": "@seed",
        },
        "network": "$@network_def.to(@device)",
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "LoadImaged", "keys": "image"},
                {"_target_": "EnsureChannelFirstd", "keys": "image"},
            ],
        },
        "dataset": {"_target_": "Dataset", "data": "@data", "transform": "@preprocessing"},
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1, "num_workers": 0},
        "inferer": {"_target_": "SimpleInferer"},
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [
                {
                    "_target_": "SaveImaged",
                    "keys": "pred",
                    "output_dir": "@output_dir",
                    "output_postfix": "seg",
                    "output_dtype": f"$np.{dtype}",
                    "separate_folder": False,
                    "resample": False,
                }
            ],
        },
        "handlers": [
            {
                "_target_": "CheckpointLoader",
                "load_path": "$@bundle_root + '/models/model.pt'",
                "load_dict": {"model": "@network"},
                "map_location": "@device",
            }
        ],
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
            "val_handlers": "@handlers",
        },
        "run": ["$@evaluator.run()"],
    }
