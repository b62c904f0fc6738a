"""`medseg models export --onnx`: the network of a segmenter that evaluates it once, checked against PyTorch."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medseg_diffusion import build
from medseg_diffusion.config.segmenter import SegmenterConfig
from medseg_diffusion.errors import ModelError, UsageError, quiet_libraries
from medseg_diffusion.files import require_new_file, whole_file
from medseg_diffusion.models.one_evaluation import OneEvaluation
from medseg_diffusion.models.segmenter import restore_segmenter
from medseg_diffusion.models.store import SavedModel, load_model_files

TOLERANCE = 1e-3
"""Largest difference of a probability between ONNX Runtime and PyTorch at which the file is written."""


def export_onnx(model: str | Path, output: str | Path) -> Path:
    """Write an ONNX file of a segmenter of one evaluation; return its path.

    Inputs are ``image`` (B, C, *S), preprocessed, and for a mask diffusion model ``noise`` (B, C', *S), standard
    normal; S is the model's window, B is free. The output is ``probabilities`` (B, K, *S). What happens before and
    after the network is described in the file's metadata and done by the caller: windows, mean over members, parts. A
    finder is left out, and a warning says so: the image is then the box of the organ, scaled by its own intensities.

    Args:
        model: Model folder, run folder or installed name.
        output: A new .onnx file.

    Raises:
        ModelError: No segmenter, one that takes several steps, a network that ONNX cannot hold, or a missing library.
        UsageError: An output that exists or has another ending.
    """
    output = Path(output)
    if output.suffix.lower() != ".onnx":
        raise UsageError(f"{output}: expected a name that ends in .onnx")
    require_new_file(output)
    saved = load_model_files(model)
    segmenter, config = restore_segmenter(saved)
    steps = config.inference.steps if build.samplers(config) else 1
    try:
        network = OneEvaluation(segmenter, build.times(config, steps)).eval()
    except ValueError as error:
        raise ModelError(
            f"{saved.path}: method {config.method} with {steps} step{'s'[: steps != 1]}; ONNX files are made of "
            "models that evaluate their network once (inference.steps 1, or the baseline)"
        ) from error
    size = config.inference.window or config.data.window
    inputs = [_normal(0, 2, config.data.channels, *size)]
    if network.noise_channels:
        inputs.append(_normal(1, 2, network.noise_channels, *size))
    if config.finder is not None:
        warnings.warn(
            f"{output}: holds the segmenter alone, without the finder of the box that the segmenter sees",
            stacklevel=2,
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(output) as temporary:
        _write(network, inputs, _metadata(saved, config, size), temporary, saved)
        _check(network, inputs, temporary, saved)
    return output


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _write(
    network: OneEvaluation, inputs: list[Tensor], metadata: dict[str, str], file: Path, saved: SavedModel
) -> None:
    names = ["image", "noise"][: len(inputs)]
    try:
        with quiet_libraries(), torch.no_grad():
            program = torch.onnx.export(
                network,
                tuple(inputs),
                input_names=names,
                output_names=["probabilities"],
                dynamic_shapes=tuple({0: torch.export.Dim.DYNAMIC} for _ in inputs),
                dynamo=True,
                verbose=False,
            )
            assert program is not None
            program.model.metadata_props.update(metadata)
            program.save(file, external_data=False)
    except ImportError as error:
        raise ModelError(f"ONNX needs onnxscript ({error}); pip install 'medseg-diffusion[onnx]'") from error
    except (RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{saved.path}: its network cannot be written as ONNX ({reason})") from error


def _metadata(saved: SavedModel, config: SegmenterConfig, size: tuple[int, ...]) -> dict[str, str]:
    """What a caller needs to know beside the network, each as JSON."""
    content: dict[str, Any] = {
        "model": saved.name,
        "weights_sha256": saved.sha256,
        "licence": saved.card.get("licence", ""),
        "channels": saved.card["channels"],
        "labels": saved.card["labels"],
        "window": list(size),
        "overlap": config.inference.overlap,
        "ensemble": config.inference.ensemble,
        "preprocessing": config.preprocessing.model_dump(mode="json"),
        **({} if config.finder is None else {"finder": config.finder.model_dump(mode="json")}),
    }
    return {f"medseg.{key}": json.dumps(value) for key, value in content.items()}


def _check(network: OneEvaluation, inputs: list[Tensor], file: Path, saved: SavedModel) -> None:
    try:
        import onnxruntime
    except ImportError as error:
        raise ModelError("the check needs onnxruntime; pip install 'medseg-diffusion[onnx]'") from error
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    (output,) = session.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})
    with torch.no_grad():
        difference = float((torch.from_numpy(output) - network(*inputs)).abs().max())
    if not difference <= TOLERANCE:
        raise ModelError(
            f"{saved.path}: probabilities of the ONNX file differ by {difference:.2g}; nothing was written"
        )
