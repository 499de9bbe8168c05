"""Owns the scales of a quantised KV cache where none are given: how large keys and values become when the
model reads a text.

Invariant: they are measured on the graph that was written, whose other bytes stay as they are.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper

from glm_export.error import ExportError
from glm_export.graph import interpreter, onnx_graph
from glm_export.graph.initializers import Weights, place
from glm_export.graph.paged_attention import KEY_SCALE, LARGEST_STORED, VALUE_SCALE


def measure(sequences: list[list[int]], kv_cache: str, folder: Path) -> None:
    """Rewrites the scales in a folder that holds the graph, by sequences of one length."""
    written = onnx.load(folder / onnx_graph.GRAPH_FILE, load_external_data=False).graph
    tensors = {tensor.name: tensor for tensor in written.initializer}
    weights = Weights.of_folder(folder, written.initializer)
    steps = interpreter.walk(
        written, weights, sequences, onnx_graph.NAMES, [False] * len(sequences), "KV cache scales"
    )
    for node, values in steps:
        if node.op_type == "PagedAttention":
            kept = interpreter.keys_and_values(node, values[node.input[0]], weights, len(sequences))
            for position, stored in zip((KEY_SCALE, VALUE_SCALE), kept, strict=True):
                tensor = tensors[node.input[position]]
                _write(folder, tensor, _scales(node, stored, tensor, LARGEST_STORED[kv_cache]))
        if onnx_graph.NAMES["logits"] in node.output:
            break


def _scales(node: NodeProto, stored: np.ndarray, tensor: TensorProto, largest: float) -> np.ndarray:
    """What [token, head, channel] is divided by, so that the largest becomes the largest that is stored."""
    if not np.isfinite(stored).all():
        raise ExportError(f"{node.name}: keys or values are not finite")
    per_channel = np.abs(stored).max(axis=0)
    found = per_channel if len(tensor.dims) > 1 else per_channel.max(keepdims=True).ravel()[:1]
    scales = np.where(found > 0, found / largest, 1).astype(np.float32)
    return scales.reshape(tuple(tensor.dims))


def _write(folder: Path, tensor: TensorProto, scales: np.ndarray) -> None:
    path, offset = place(folder, tensor)
    content = scales.astype(helper.tensor_dtype_to_np_dtype(tensor.data_type)).tobytes()
    with path.open("r+b", buffering=0) as file:
        if os.pwrite(file.fileno(), content, offset) != len(content):
            raise ExportError(f"{path}: could not be written")
