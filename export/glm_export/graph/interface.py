"""Owns what enters and leaves the graph: names, types and shapes, which the engine binds by their roles.

Invariant: every name is in the manifest, so the engine knows none of them by itself.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, ValueInfoProto, helper

from glm_export.graph.target import KV_CACHES, Target
from glm_export.read.config import Geometry

# Candidates a row leaves the graph with. A nucleus is seldom wider; where it is, the engine asks for the row.
TOP_K = 64

NAMES = {
    "token_ids": "token_ids",
    "cumulative_sequence_length": "cumulative_sequence_length",
    "past_seqlens": "past_seqlens",
    "block_table": "block_table",
    "slot_mapping": "slot_mapping",
    "attention_metadata": "attention_metadata",
    "logits_indices": "logits_indices",
    "key_cache": "key_cache.{layer}",
    "value_cache": "value_cache.{layer}",
    "logits": "logits",
}
TOPK_NAMES = {"topk_ids": "topk_ids", "topk_values": "topk_values", "logsumexp": "logsumexp"}
_INDEX_SHAPES: dict[str, list[str | int]] = {
    "token_ids": ["num_tokens"],
    "cumulative_sequence_length": ["num_sequences_plus_1"],
    "past_seqlens": ["num_sequences"],
    "block_table": ["num_sequences", "max_num_blocks"],
    "slot_mapping": ["num_tokens"],
    "attention_metadata": [3],
    "logits_indices": ["num_rows"],
}


def names(target: Target) -> dict[str, str]:
    """Names of inputs and outputs by role."""
    return NAMES | (TOPK_NAMES if target.output == "topk" else {})


def _value(name: str, item_type: int, shape: list[str | int]) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, item_type, shape)


def inputs(geometry: Geometry, target: Target) -> list[ValueInfoProto]:
    """What a step gives the graph."""
    inputs = [_value(NAMES[role], TensorProto.INT32, shape) for role, shape in _INDEX_SHAPES.items()]
    width = geometry.head_dim // 2 if target.kv_cache == "int4" else geometry.head_dim
    cache = ["num_blocks", target.block_size, geometry.num_kv_heads, width]
    item_type = helper.np_dtype_to_tensor_dtype(np.dtype(KV_CACHES[target.kv_cache]))
    for layer in range(geometry.num_layers):
        for role in ("key_cache", "value_cache"):
            inputs.append(_value(NAMES[role].format(layer=layer), item_type, cache))
    return inputs


def outputs(geometry: Geometry, target: Target) -> list[ValueInfoProto]:
    """What the graph gives back."""
    outputs = [_value(NAMES["logits"], TensorProto.FLOAT, ["num_rows", geometry.padded_vocab_size])]
    if target.output == "topk":
        width = num_candidates(geometry)
        outputs.append(_value(TOPK_NAMES["topk_ids"], TensorProto.INT32, ["num_rows", width]))
        outputs.append(_value(TOPK_NAMES["topk_values"], TensorProto.FLOAT, ["num_rows", width]))
        outputs.append(_value(TOPK_NAMES["logsumexp"], TensorProto.FLOAT, ["num_rows", 1]))
    return outputs


def num_candidates(geometry: Geometry) -> int:
    """How many candidates a row leaves the graph with."""
    return min(TOP_K, geometry.vocab_size)
