"""ONNX files of small convolutional networks, in the place of published feature extractors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def save_network(path: Path, weight: np.ndarray, stride: int, outputs: int = 3) -> Path:
    """RGB images -> features, a map, logits, and the features again, as many of them as ``outputs``.

    The map is a convolution with ``weight`` (C, 3, k, k), where it is above 0; the features are its means, and the
    logits repeat the features.
    """
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, "height", "width"])
    nodes = [
        helper.make_node("Conv", ["image", "weight"], ["linear"], strides=[stride, stride]),
        helper.make_node("Relu", ["linear"], ["map"]),
        helper.make_node("ReduceMean", ["map"], ["features"], axes=[2, 3], keepdims=0),
        helper.make_node("Identity", ["features"], ["logits"]),
        helper.make_node("Identity", ["features"], ["more"]),
    ]
    flat = ["batch", len(weight)]
    shapes = {"features": flat, "map": ["batch", len(weight), "rows", "columns"], "logits": flat, "more": flat}
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    graph = helper.make_graph(
        nodes, "network", [image], infos[:outputs], [numpy_helper.from_array(weight.astype(np.float32), "weight")]
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), str(path))
    return path
