"""Owns the reading of a product's weight as numbers, whichever node multiplies by it: a few rows at a time.

Invariant: it shares nothing with what packed them, and knows no activations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from onnx import NodeProto, helper

from glm_export.graph.initializers import Weights

# Gives rows of a product's weight in float64: from the first, so many.
ReadRows = Callable[[int, int], np.ndarray]
# What the node's inputs are called.
Names = Sequence[str]


def weight_rows(node: NodeProto, weights: Weights) -> ReadRows | None:
    """How to read the weight of a product; None if the node is something else."""
    compute = WEIGHTS.get(node.op_type)
    attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    return compute and compute(node.input, weights, attributes)


def gemm_rows(names: Names, weights: Weights, attributes: dict[str, Any]) -> ReadRows:
    """Of Gemm with transB: as they lie."""
    return lambda first, count: weights.rows(names[1], first, count).astype(np.float64)


def nbits_rows(names: Names, weights: Weights, attributes: dict[str, Any]) -> ReadRows:
    """Of MatMulNBits: codes less their zero points, times their scales."""
    bits, block_size = attributes["bits"], attributes["block_size"]
    table = _unpacking(bits)

    def unpacked(position: int, first: int, count: int) -> np.ndarray:
        # Clipping is what spares numpy a look at every index.
        packed = weights.rows(names[position], first, count)
        return table.take(packed.astype(np.intp), mode="clip").view(np.float64)

    def read(first: int, count: int) -> np.ndarray:
        blocks = unpacked(1, first, count)
        num_rows = len(blocks)
        scales = weights.rows(names[2], first, count).astype(np.float64)
        scales = scales.reshape(num_rows, -1)
        zeros: np.ndarray | int = 1 << bits - 1
        if names[3:] and names[3]:
            # Whole ones are packed like the weights, others are of the scales' type.
            zeros = weights.rows(names[3], first, count)
            zeros = unpacked(3, first, count) if zeros.dtype == np.uint8 else zeros.astype(np.float64)
            zeros = zeros.reshape(num_rows, -1)[:, : scales.shape[1], None]
        blocks = blocks.reshape(num_rows, -1, block_size)
        blocks -= zeros
        blocks *= scales[..., None]
        # The last block of a row may reach beyond it.
        return blocks.reshape(num_rows, -1)[:, : attributes["K"]]

    return read


def fp8_rows(names: Names, weights: Weights, attributes: dict[str, Any]) -> ReadRows:
    """Of MatMulBlockQuantizedFp8Weight: codes times the scales of their blocks."""
    block_size = attributes["block_size"]

    def read(first: int, count: int) -> np.ndarray:
        rows = weights.rows(names[1], first, count).astype(np.float64)
        scales = weights.rows(names[2], first, count).astype(np.float64)
        # The last block of a row may reach beyond it.
        rows *= scales.repeat(block_size, axis=1)[:, : rows.shape[1]]
        return rows

    return read


def panel_columns(names: Names, weights: Weights, attributes: dict[str, Any]) -> ReadRows:
    """Of QuantizedMatMul, in the order of its panels' columns, from a multiple of 32 on."""
    bits, block_size, width = attributes["bits"], attributes["block_size"], attributes["K"]
    name, num_blocks = names[1], width // block_size

    def read(first: int, count: int) -> np.ndarray:
        panels = weights.rows(name, first // 32, -(-count // 32))
        blocks = panels.reshape(len(panels), num_blocks, -1)
        scales = blocks[..., -64:].copy().view(np.float16).astype(np.float64)
        lines = blocks[..., :-64]
        # One code an item, the columns' halves apart: [panel, block, step, half, column and k].
        if bits == 4:
            lines = lines.reshape(len(panels), num_blocks, -1, 1, 64)
            codes = np.concatenate([lines & 15, lines >> 4], axis=3)
        else:
            codes = lines.reshape(len(panels), num_blocks, -1, 2, 64)
        values = codes.astype(np.float64) - (1 << bits - 1)
        values = values.reshape(len(panels), num_blocks, block_size // 4, 32, 4)
        values *= scales[:, :, None, :, None]
        return values.transpose(0, 3, 1, 2, 4).reshape(-1, width)

    return read


def _panel_rows(names: Names, weights: Weights, attributes: dict[str, Any]) -> ReadRows:
    """Rows of the matrix, which with an epilogue lie in halves of the panels: sixteen of the gate, of up."""
    columns, num_rows = panel_columns(names, weights, attributes), attributes["N"]

    def read(first: int, count: int) -> np.ndarray:
        rows = np.arange(first, min(first + count, num_rows))
        if attributes["epilogue"] != b"none":
            is_up, rows = np.divmod(rows, num_rows // 2)
            rows = rows // 16 * 32 + rows % 16 + 16 * is_up
        start = rows.min() // 32 * 32
        return columns(start, rows.max() + 1 - start)[rows - start]

    return read


def _unpacking(bits: int) -> np.ndarray:
    """What every byte holds, the lowest bits first, as one item a byte."""
    shifts = np.arange(0, 8, bits)
    values = (np.arange(256)[:, None] >> shifts & (1 << bits) - 1).astype(np.float64)
    return values.view(f"V{8 * len(shifts)}").ravel()


WEIGHTS: dict[str, Callable[[Names, Weights, dict[str, Any]], ReadRows]] = {
    "Gemm": gemm_rows,
    "MatMulBlockQuantizedFp8Weight": fp8_rows,
    "MatMulNBits": nbits_rows,
    "QuantizedMatMul": _panel_rows,
}
