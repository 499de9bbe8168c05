"""Owns a second reading of the graph that was written: its nodes one by one, in numpy, for one short prompt.

Invariant: it shares no arithmetic with ONNX Runtime or with what made the graph, and computes in float64, so
that the digits it gives after rounding are the same on every machine. Few megabytes of weights are in memory.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import GraphProto, NodeProto, helper
from threadpoolctl import threadpool_limits

from glm_export import progress
from glm_export.error import ExportError
from glm_export.graph import fusion, paged_attention, product_weights
from glm_export.graph.initializers import Weights
from glm_export.graph.paged_attention import Heads
from glm_export.graph.product_weights import ReadRows

# The accuracy level at which MatMulNBits rounds what enters it.
INT8_ACTIVATIONS = 4
HALVES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
# What is kept in a quantised cache of each type; two of int4 share a byte.
QUANTISED = {
    np.dtype(ml_dtypes.float8_e4m3fn): "float8e4m3fn",
    np.dtype(np.int8): "int8",
    np.dtype(np.uint8): "int4",
}
# Elements of a weight that are dequantised at once: what a core's cache holds is fastest.
CHUNK = 1 << 16


def logits(graph_file: Path, token_ids: list[int], names: dict[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """The graph's logits of every token of a sequence, exactly and as rounded as kernels round.

    The second shows how far a kernel may be off: what a node gives is rounded to the type of activations, and
    what enters a product to int8 where the kernel does so.
    """
    graph = onnx.load(graph_file, load_external_data=False).graph
    weights = Weights.of_folder(graph_file.parent, graph.initializer)
    exact, rounded = run(graph, weights, token_ids, names)
    return exact, rounded


def run(
    graph: GraphProto,
    weights: Weights,
    token_ids: list[int],
    names: dict[str, str],
    roundings: Sequence[bool] = (False, True),
    title: str = "known answer",
) -> list[np.ndarray]:
    """As `logits`, of a graph that need not be in a file: once for each of `roundings`, rounded or exact."""
    values: dict[str, np.ndarray] = {}
    for _, values in walk(graph, weights, [token_ids] * len(roundings), names, roundings, title):
        if names["logits"] in values:
            break
    if names["logits"] not in values:
        raise ExportError(f"the graph: no output {names['logits']}")
    return np.split(values[names["logits"]], len(roundings))


def walk(
    graph: GraphProto,
    weights: Weights,
    sequences: Sequence[list[int]],
    names: dict[str, str],
    roundings: Sequence[bool],
    title: str,
) -> Iterator[tuple[NodeProto, dict[str, np.ndarray]]]:
    """Gives each node before it is computed, and the values so far, of sequences of one length in one pass.

    They lie one after another, each rounded or exact; a weight is read when its node is computed. Fused nodes
    are given in parts.
    """
    # One pass over all of them, since reading the weights is most of the time.
    values: dict[str, np.ndarray] = {
        names["token_ids"]: np.concatenate(sequences),
        names["logits_indices"]: np.arange(sum(map(len, sequences))),
    }
    nodes = list(fusion.expanded(graph.node))
    dtype = weights.activations(nodes)
    types = {
        value.name: helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type) for value in graph.input
    }
    uses = Counter(name for node in nodes for name in node.input)
    with progress.phase(title, weights.num_bytes) as advance:
        for node in nodes:
            yield node, values
            compute = NODES.get(node.op_type)
            if compute is None:
                raise ExportError(f"the graph: no rule for the node {node.op_type}")
            attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
            outputs = compute(_Inputs(node, values, weights, types, roundings), attributes)
            for array in outputs:
                for rows, is_rounded in zip(np.split(array, len(roundings)), roundings, strict=True):
                    if is_rounded:
                        rows[...] = rows.astype(dtype)
            # Absent outputs have no name, and those that nothing reads have no value.
            values |= {name: array for name, array in zip(node.output, outputs, strict=False) if name}
            uses.subtract(node.input)
            done = {name for name in node.input if not uses[name]}
            for name in done:
                values.pop(name, None)
            advance(node.name, sum(map(weights.size, done)))


class _Inputs:
    """The inputs of one node."""

    def __init__(
        self,
        node: NodeProto,
        values: dict[str, np.ndarray],
        weights: Weights,
        types: dict[str, np.dtype],
        roundings: Sequence[bool],
    ) -> None:
        self.names = list(node.input)
        self.values = values
        self.weights = weights
        # Of the graph's own inputs.
        self.types = types
        # Whether each of the sequences that lie one after another is to be rounded.
        self.roundings = roundings

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
        return [inputs.values[name].take(indices.astype(np.int64), axis=attributes["axis"])]
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
    inputs: _Inputs, rows: np.ndarray, num_rows: int, bias: int, read: ReadRows, multiple: int = 1
) -> list[np.ndarray]:
    """rows @ weight.T + bias, where `read` gives some of the weight's `num_rows` rows, whole `multiple`s."""
    out = np.empty((len(rows), num_rows))
    step = max(1, CHUNK // rows.shape[1] // multiple) * multiple

    def part(first: int) -> None:
        # A thread of a pool does not have its maker's settings.
        with np.errstate(over="ignore", invalid="ignore"):
            out[:, first : first + step] = rows @ read(first, step).T

    # A thread a core and none inside a product: BLAS's own lose most of their time on a busy machine.
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(part, range(0, num_rows, step)))
    return [out + inputs[bias].ravel() if inputs.has(bias) else out]


def _entering(inputs: _Inputs, block_size: int) -> np.ndarray:
    """What enters a product, in int8 where it is to be rounded."""
    parts = zip(np.split(inputs[0], len(inputs.roundings)), inputs.roundings, strict=True)
    return np.concatenate([_as_int8(part, block_size) if is_rounded else part for part, is_rounded in parts])


def _as_int8(rows: np.ndarray, block_size: int) -> np.ndarray:
    """Whole numbers up to 127 times a scale for each block of a row."""
    num_rows, width = rows.shape
    blocks = np.pad(rows, [(0, 0), (0, -width % block_size)]).reshape(num_rows, -1, block_size)
    scales = np.abs(blocks).max(axis=-1, keepdims=True) / 127
    whole = np.rint(np.divide(blocks, scales, out=np.zeros_like(blocks), where=scales > 0))
    return (whole * scales).reshape(num_rows, -1)[:, :width]


def _gemm(inputs: _Inputs, attributes: dict[str, Any]) -> list[np.ndarray]:
    if attributes != {"transB": 1}:
        raise ExportError(f"the graph: no rule for Gemm with {attributes}")
    num_rows = inputs.weights.shape(inputs.names[1])[0]
    read = product_weights.gemm_rows(inputs.names, inputs.weights, attributes)
    return _linear(inputs, inputs[0], num_rows, 2, read)


def _matmul_nbits(inputs: _Inputs, attributes: dict[str, Any]) -> list[np.ndarray]:
    if inputs.has(4):
        raise ExportError("the graph: no rule for MatMulNBits with g_idx")
    is_int8 = attributes.get("accuracy_level") == INT8_ACTIVATIONS
    rows = _entering(inputs, attributes["block_size"]) if is_int8 else inputs[0]
    read = product_weights.nbits_rows(inputs.names, inputs.weights, attributes)
    return _linear(inputs, rows, attributes["N"], 5, read)


def _fp8_matmul(inputs: _Inputs, attributes: dict[str, Any]) -> list[np.ndarray]:
    if inputs.has(3):
        raise ExportError("the graph: no rule for MatMulBlockQuantizedFp8Weight with a_scale")
    num_rows = inputs.weights.shape(inputs.names[1])[0]
    read = product_weights.fp8_rows(inputs.names, inputs.weights, attributes)
    return _linear(inputs, inputs[0], num_rows, 4, read)


def _quantized_matmul(inputs: _Inputs, attributes: dict[str, Any]) -> list[np.ndarray]:
    rows = _entering(inputs, attributes["block_size"])
    num_panels, _ = inputs.weights.shape(inputs.names[1])
    read = product_weights.panel_columns(inputs.names, inputs.weights, attributes)
    (sums,) = _linear(inputs, rows, 32 * num_panels, 2, read, multiple=32)
    if attributes["epilogue"] == b"none":
        return [sums[:, : attributes["N"]]]
    gate, up = sums.reshape(len(sums), num_panels, 2, 16).transpose(2, 0, 1, 3).reshape(2, len(sums), -1)
    return [(gate / (1 + np.exp(-gate)) * up)[:, : attributes["N"] // 2]]


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
        raise ExportError("the graph: attention is known with packed inputs and interleaved rotary only")
    cache = inputs.types[inputs.names[3]]
    rows = []
    for heads, is_rounded in zip(
        _heads(inputs.names, attributes, inputs[0], inputs.weights, len(inputs.roundings)),
        inputs.roundings,
        strict=True,
    ):
        if is_rounded and cache in HALVES:
            # What the cache keeps is rounded.
            key, value = (part.astype(cache).astype(np.float64) for part in (heads.key, heads.value))
            heads = replace(heads, key=key, value=value)
        elif is_rounded and inputs.has(paged_attention.KEY_SCALE):
            kind = QUANTISED[cache]
            key, value = (
                paged_attention.stored(part, kind, inputs[position])
                for part, position in (
                    (heads.key, paged_attention.KEY_SCALE),
                    (heads.value, paged_attention.VALUE_SCALE),
                )
            )
            heads = replace(heads, key=key, value=value)
        rows.append(paged_attention.attend(heads, attributes["scale"]))
    return [np.concatenate(rows)]


def keys_and_values(
    node: NodeProto, packed: np.ndarray, weights: Weights, num_sequences: int
) -> tuple[np.ndarray, np.ndarray]:
    """What an attention keeps of sequences of one length, not yet rounded: [token, group, channel] each."""
    attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    parts = _heads(list(node.input), attributes, packed, weights, num_sequences)
    return np.concatenate([part.key for part in parts]), np.concatenate([part.value for part in parts])


def _heads(
    names: Sequence[str],
    attributes: dict[str, Any],
    packed: np.ndarray,
    weights: Weights,
    num_sequences: int,
) -> list[Heads]:
    count = len(packed) // num_sequences
    cos, sin = (weights.rows(name, 0, count).astype(np.float64) for name in names[8:10])
    return [paged_attention.heads(part, attributes, cos, sin) for part in np.split(packed, num_sequences)]


NODES: dict[str, Callable[[_Inputs, dict[str, Any]], list[np.ndarray]]] = {
    "Add": _add,
    "Cast": _cast,
    "Gather": _gather,
    "Gemm": _gemm,
    "MatMulBlockQuantizedFp8Weight": _fp8_matmul,
    "MatMulNBits": _matmul_nbits,
    "Mul": _mul,
    "PagedAttention": _paged_attention,
    "QuantizedMatMul": _quantized_matmul,
    "QuickGelu": _quick_gelu,
    "SimplifiedLayerNormalization": _rms_norm,
    "SkipSimplifiedLayerNormalization": _skip_rms_norm,
    "Split": _split,
}
