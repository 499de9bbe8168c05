"""Owns the interpreter's reading of PagedAttention: what rotates, what the cache keeps, and the attention.

Invariant: arrays are of one sequence, in float64; rounding is what the cache's type does and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

# Inputs of the node: the scales of keys and values.
KEY_SCALE, VALUE_SCALE = 14, 15
# The largest magnitude that a quantised cache stores.
LARGEST_STORED = {
    "float8e4m3fn": float(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max),
    "int8": 127.0,
    "int4": 7.0,
}


@dataclass(frozen=True)
class Heads:
    """Queries [token, group, head of the group, channel]; keys and values [token, group, channel]."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray


def heads(packed: np.ndarray, attributes: dict[str, Any], cos: np.ndarray, sin: np.ndarray) -> Heads:
    """The heads of packed rows [token, heads * channels], rotated by their positions from 0 on."""
    num_heads, groups = attributes["num_heads"], attributes["kv_num_heads"]
    count = len(packed)
    rows = packed.reshape(count, num_heads + 2 * groups, -1)
    rotated = _rotate(rows[:, : num_heads + groups], cos[:, None], sin[:, None])
    query = rotated[:, :num_heads].reshape(count, groups, num_heads // groups, -1)
    return Heads(query, rotated[:, num_heads:], rows[:, num_heads + groups :])


def attend(parts: Heads, scale: float) -> np.ndarray:
    """Causal attention over the sequence's own keys and values: [token, heads * channels]."""
    count = len(parts.query)
    key, value = parts.key[:, :, None], parts.value[:, :, None]
    # Products of [group, head, token, channel]: an einsum would not use BLAS.
    scores = parts.query.transpose(1, 2, 0, 3) @ key.transpose(1, 2, 3, 0) * scale
    scores[..., ~np.tri(count, dtype=bool)] = -np.inf
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    return (shares @ value.transpose(1, 2, 0, 3)).transpose(2, 0, 1, 3).reshape(count, -1)


def stored(values: np.ndarray, kind: str, scales: np.ndarray) -> np.ndarray:
    """What a quantised cache of a kind gives back for [token, group, channel]."""
    scales = scales.astype(np.float64).reshape((-1, scales.shape[-1]) if scales.ndim > 1 else ())
    largest = LARGEST_STORED[kind]
    scaled = (values / scales).clip(-largest, largest)
    codes = scaled.astype(ml_dtypes.float8_e4m3fn) if kind == "float8e4m3fn" else np.rint(scaled)
    return codes.astype(np.float64) * scales


def _rotate(rows: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Turns the pairs of neighbours among a head's first channels as complex numbers; the others pass."""
    width = 2 * cos.shape[-1]
    turned = (rows[..., 0:width:2] + 1j * rows[..., 1:width:2]) * (cos + 1j * sin)
    pairs = np.stack([turned.real, turned.imag], axis=-1).reshape(*rows.shape[:-1], width)
    return np.concatenate([pairs, rows[..., width:]], axis=-1)
