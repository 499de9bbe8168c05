"""Owns a second reading of the graph that was written: its nodes one by one, in numpy, for one short prompt.

Invariant: it shares no arithmetic with ONNX Runtime or with what made the graph, and computes in float64, so
that the digits it gives after rounding are the same on every machine. Few megabytes of weights are in memory.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper
from threadpoolctl import threadpool_limits

from glm_export.error import ExportError

# The accuracy level at which MatMulNBits rounds what enters it.
INT8_ACTIVATIONS = 4
HALVES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
# Elements of a weight that are dequantised at once: what a core's cache holds is fastest.
CHUNK = 1 << 16


def logits(graph_file: Path, token_ids: list[int], names: dict[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """The graph's logits of every token of a sequence, exactly and as rounded as kernels round.

    The second shows how far a kernel may be off: what a node gives is rounded to the type of activations, and
    what enters a product to int8 where the kernel does so.
    """
    model = onnx.load(graph_file, load_external_data=False)
    weights = _Weights(graph_file.parent, model.graph.initializer)
    # Two sequences in one pass, since reading the weights is most of the time.
    values: dict[str, np.ndarray] = {
        names["token_ids"]: np.array(token_ids * 2),
        names["logits_indices"]: np.arange(2 * len(token_ids)),
    }
    dtype = weights.activations(model.graph.node)
    types = {
        value.name: helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        for value in model.graph.input
    }
    uses = Counter(name for node in model.graph.node for name in node.input)
    for node in model.graph.node:
        compute = NODES.get(node.op_type)
        if compute is None:
            raise ExportError(f"known answer: no rule for the node {node.op_type}")
        attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
        outputs = compute(_Inputs(node, values, weights, types), attributes)
        for array in outputs:
            rows = array[len(array) // 2 :]
            rows[...] = rows.astype(dtype)
        if names["logits"] in node.output:
            exact, rounded = np.split(outputs[0], 2)
            return exact, rounded
        # Absent outputs have no name, and those that nothing reads have no value.
        values |= {name: array for name, array in zip(node.output, outputs, strict=False) if name}
        uses.subtract(node.input)
        for name in node.input:
            if not uses[name]:
                values.pop(name, None)
    raise ExportError(f"known answer: the graph has no output {names['logits']}")


class _Weights:
    """Initialisers, read from where they lie when they are asked for."""

    def __init__(self, folder: Path, tensors: list[TensorProto]) -> None:
        self._folder = folder
        self._tensors = {tensor.name: tensor for tensor in tensors}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def num_rows(self, name: str) -> int:
        """How many rows there are."""
        return self._tensors[name].dims[0]

    def dtype(self, name: str) -> np.dtype:
        """The type that elements are stored in."""
        return helper.tensor_dtype_to_np_dtype(self._tensors[name].data_type)

    def activations(self, nodes: list[NodeProto]) -> np.dtype:
        """The type of activations: that of the first norm's weight."""
        norms = (node for node in nodes if node.op_type == "SimplifiedLayerNormalization")
        return next((self.dtype(norm.input[1]) for norm in norms), np.dtype(np.float32))

    def rows(self, name: str, first: int = 0, count: int | None = None) -> np.ndarray:
        """Some rows in the type they are stored in; all without a count."""
        tensor = self._tensors[name]
        shape = list(tensor.dims)
        count = shape[0] - first if count is None else min(count, shape[0] - first)
        if tensor.data_location != TensorProto.EXTERNAL:
            return numpy_helper.to_array(tensor)[first : first + count]
        place = {entry.key: entry.value for entry in tensor.external_data}
        dtype = self.dtype(name)
        row_bytes = int(np.prod(shape[1:])) * dtype.itemsize
        with (self._folder / place["location"]).open("rb") as file:
            file.seek(int(place["offset"]) + first * row_bytes)
            content = np.frombuffer(file.read(count * row_bytes), np.uint8)
        return content.view(dtype).reshape(count, *shape[1:])


class _Inputs:
    """The inputs of one node."""

    def __init__(
        self,
        node: NodeProto,
        values: dict[str, np.ndarray],
        weights: _Weights,
        types: dict[str, np.dtype],
    ) -> None:
        self.names = list(node.input)
        self.values = values
        self.weights = weights
        # Of the graph's own inputs.
        self.types = types

    def has(self, position: int) -> bool:
        """Whether an optional input is there."""
        return position < len(self.names) and bool(self.names[position])

    def __getitem__(self, position: int) -> np.ndarray:
        """A value, or a small initialiser whole."""
        name = self.names[position]
        return self.weights.rows(name).astype(np.float64) if name in self.weights else self.values[name]


def _gather(inputs: _Inputs, attributes: dict[str, Any]) -> list[np.ndarray]:
    name, indices = inputs.names[0], inputs[1]
    if name not in inputs.weights:
        return [inputs.values[name][indices]]
    # Row by row: the embedding is the largest tensor, and few rows of it are wanted.
    rows = [inputs.weights.rows(name, int(index), 1) for index in indices]
    return [np.concatenate(rows).astype(np.float64)]


def _cast(inputs: _Inputs, attributes: dict[str, Any]) -> list[np.ndarray]:
    # Between half and single precision, which is rounding and not the node's meaning.
    return [inputs[0].copy()]


def _norm(rows: np.ndarray, scale: np.ndarray, attributes: dict[str, Any]) -> np.ndarray:
    mean = np.mean(rows * rows, axis=-1, keepdims=True)
    return rows / np.sqrt(mean + attributes["epsilon"]) * scale


def _rms_norm(inputs: _Inputs, attributes: dict[str, Any]) -> list[np.ndarray]:
    return [_norm(inputs[0], inputs[1], attributes)]


def _skip_rms_norm(inputs: _Inputs, attributes: dict[str, Any]) -> list[np.ndarray]:
    total = inputs[0] + inputs[1]
    nothing = np.zeros(0)
    return [_norm(total, inputs[2], attributes), nothing, nothing, total]


def _linear(
    inputs: _Inputs, rows: np.ndarray, num_rows: int, bias: int, read: Callable[[int, int], np.ndarray]
) -> list[np.ndarray]:
    """rows @ weight.T + bias, where `read` gives some of the weight's `num_rows` rows."""
    out = np.empty((len(rows), num_rows))
    step = max(1, CHUNK // rows.shape[1])

    def part(first: int) -> None:
        # A thread of a pool does not have its maker's settings.
        with np.errstate(over="ignore", invalid="ignore"):
            out[:, first : first + step] = rows @ read(first, step).T

    # A thread a core and none inside a product: BLAS's own lose most of their time on a busy machine.
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(part, range(0, num_rows, step)))
    return [out + inputs[bias] if inputs.has(bias) else out]


def _as_int8(rows: np.ndarray, block_size: int) -> np.ndarray:
    """Whole numbers up to 127 times a scale for each block of a row."""
    num_rows, width = rows.shape
    blocks = np.pad(rows, [(0, 0), (0, -width % block_size)]).reshape(num_rows, -1, block_size)
    scales = np.abs(blocks).max(axis=-1, keepdims=True) / 127
    whole = np.rint(np.divide(blocks, scales, out=np.zeros_like(blocks), where=scales > 0))
    return (whole * scales).reshape(num_rows, -1)[:, :width]


def _gemm(inputs: _Inputs, attributes: dict[str, Any]) -> list[np.ndarray]:
    if attributes != {"transB": 1}:
        raise ExportError(f"known answer: no rule for Gemm with {attributes}")
    weights, name = inputs.weights, inputs.names[1]

    def read(first: int, count: int) -> np.ndarray:
        return weights.rows(name, first, count).astype(np.float64)

    return _linear(inputs, inputs[0], weights.num_rows(name), 2, read)


def _matmul_nbits(inputs: _Inputs, attributes: dict[str, Any]) -> list[np.ndarray]:
    if inputs.has(4):
        raise ExportError("known answer: no rule for MatMulNBits with g_idx")
    bits, block_size = attributes["bits"], attributes["block_size"]
    table = _unpacking(bits)

    def unpacked(position: int, first: int, count: int) -> np.ndarray:
        # Clipping is what spares numpy a look at every index.
        packed = inputs.weights.rows(inputs.names[position], first, count)
        return table.take(packed.astype(np.intp), mode="clip").view(np.float64)

    def read(first: int, count: int) -> np.ndarray:
        blocks = unpacked(1, first, count)
        num_rows = len(blocks)
        scales = inputs.weights.rows(inputs.names[2], first, count).astype(np.float64)
        scales = scales.reshape(num_rows, -1)
        zeros: np.ndarray | int = 1 << bits - 1
        if inputs.has(3):
            # Whole ones are packed like the weights, others are of the scales' type.
            zeros = inputs.weights.rows(inputs.names[3], first, count)
            zeros = unpacked(3, first, count) if zeros.dtype == np.uint8 else zeros.astype(np.float64)
            zeros = zeros.reshape(num_rows, -1)[:, : scales.shape[1], None]
        blocks = blocks.reshape(num_rows, -1, block_size)
        blocks -= zeros
        blocks *= scales[..., None]
        # The last block of a row may reach beyond it.
        return blocks.reshape(num_rows, -1)[:, : attributes["K"]]

    rows = inputs[0]
    if attributes.get("accuracy_level") == INT8_ACTIVATIONS:
        exact, rounded = np.split(rows, 2)
        rows = np.concatenate([exact, _as_int8(rounded, block_size)])
    return _linear(inputs, rows, attributes["N"], 5, read)


def _unpacking(bits: int) -> np.ndarray:
    """What every byte holds, the lowest bits first, as one item a byte."""
    shifts = np.arange(0, 8, bits)
    values = (np.arange(256)[:, None] >> shifts & (1 << bits) - 1).astype(np.float64)
    return values.view(f"V{8 * len(shifts)}").ravel()


def _split(inputs: _Inputs, attributes: dict[str, Any]) -> list[np.ndarray]:
    return np.split(inputs[0], attributes["num_outputs"], axis=attributes["axis"])


def _quick_gelu(inputs: _Inputs, attributes: dict[str, Any]) -> list[np.ndarray]:
    return [inputs[0] / (1 + np.exp(-attributes["alpha"] * inputs[0]))]


def _mul(inputs: _Inputs, attributes: dict[str, Any]) -> list[np.ndarray]:
    return [inputs[0] * inputs[1]]


def _add(inputs: _Inputs, attributes: dict[str, Any]) -> list[np.ndarray]:
    return [inputs[0] + inputs[1]]


def _paged_attention(inputs: _Inputs, attributes: dict[str, Any]) -> list[np.ndarray]:
    if not attributes.get("do_rotary") or not attributes.get("rotary_interleaved") or inputs.has(1):
        raise ExportError("known answer: attention is known with packed inputs and interleaved rotary only")
    count = len(inputs[0]) // 2
    cos, sin = (inputs.weights.rows(name, 0, count).astype(np.float64) for name in inputs.names[8:10])
    heads, groups = attributes["num_heads"], attributes["kv_num_heads"]
    packed = inputs[0].reshape(2, count, heads + 2 * groups, -1)
    # What the cache keeps is rounded; a quantised one's scales are not known here.
    cache = inputs.types[inputs.names[3]]
    caches = [np.dtype(np.float64), cache if cache in HALVES else np.dtype(np.float64)]
    scale = attributes["scale"]
    return [
        np.concatenate(
            [
                _attention(rows, heads, groups, cos, sin, scale, cache)
                for rows, cache in zip(packed, caches, strict=True)
            ]
        )
    ]


def _attention(
    packed: np.ndarray,
    heads: int,
    groups: int,
    cos: np.ndarray,
    sin: np.ndarray,
    scale: float,
    cache: np.dtype,
) -> np.ndarray:
    """Causal attention of one sequence over its own keys and values, rounded to the cache's type."""
    count = len(packed)
    rotated = _rotate(packed[:, : heads + groups], cos[:, None], sin[:, None])
    # Query heads in groups that share a key head: [token, group, head of the group, channel].
    query = rotated[:, :heads].reshape(count, groups, heads // groups, -1)
    kept = (rotated[:, heads:], packed[:, heads + groups :])
    key, value = (part.astype(cache).astype(np.float64) for part in kept)
    scores = np.einsum("qghd,kgd->ghqk", query, key) * scale
    scores[..., ~np.tri(count, dtype=bool)] = -np.inf
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    return np.einsum("ghqk,kgd->qghd", shares, value).reshape(count, -1)


def _rotate(heads: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Turns the pairs of neighbours among a head's first channels as complex numbers; the others pass."""
    width = 2 * cos.shape[-1]
    turned = (heads[..., 0:width:2] + 1j * heads[..., 1:width:2]) * (cos + 1j * sin)
    pairs = np.stack([turned.real, turned.imag], axis=-1).reshape(*heads.shape[:-1], width)
    return np.concatenate([pairs, heads[..., width:]], axis=-1)


NODES: dict[str, Callable[[_Inputs, dict[str, Any]], list[np.ndarray]]] = {
    "Add": _add,
    "Cast": _cast,
    "Gather": _gather,
    "Gemm": _gemm,
    "MatMulNBits": _matmul_nbits,
    "Mul": _mul,
    "PagedAttention": _paged_attention,
    "QuickGelu": _quick_gelu,
    "SimplifiedLayerNormalization": _rms_norm,
    "SkipSimplifiedLayerNormalization": _skip_rms_norm,
    "Split": _split,
}
