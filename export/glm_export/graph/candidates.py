"""Owns the nodes that find the best logits of each row and the weight of all, so that whole rows need not
leave a GPU.

Invariant: an id at or above the vocabulary's size is never a candidate, and no candidate is missed: the best
of a row are among the best of its parts.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from glm_export.graph import interface
from glm_export.graph.interface import TOPK_NAMES
from glm_export.graph.nodes import Nodes
from glm_export.read.config import Geometry


def add(nodes: Nodes, geometry: Geometry, logits: str) -> None:
    """Adds topk_ids, topk_values and logsumexp of float32 logits [rows, padded_vocab_size]."""
    count = interface.num_candidates(geometry)
    part = part_width(geometry.padded_vocab_size, count)
    top = nodes.constant("topk.count", [count])
    if part is None:
        rows = _real(nodes, geometry, logits)
        nodes.add_many("TopK", [rows, top], [TOPK_NAMES["topk_values"], "topk.ids"], "topk", axis=1)
    else:
        rows = _masked(nodes, geometry, logits)
        _in_parts(nodes, geometry.padded_vocab_size // part, part, count, rows)
    nodes.add("Cast", ["topk.ids"], TOPK_NAMES["topk_ids"], to=TensorProto.INT32)
    _logsumexp(nodes, rows)


def part_width(num_columns: int, count: int) -> int | None:
    """Columns of the parts in which a row is searched; None if it is better searched whole.

    CUDA's TopK (1.31.1) searches a row with one block of threads: its time grows with the row's length,
    while most of the device is idle. Parts of one row are searched at once: what counts is the length of a
    part and that of the list of their best.
    """
    widths = [width for width in range(count, num_columns) if num_columns % width == 0]

    def columns_in_turn(width: int) -> int:
        return width + num_columns // width * count

    best = min(widths, key=columns_in_turn, default=num_columns)
    return best if 2 * columns_in_turn(best) < num_columns else None


def _real(nodes: Nodes, geometry: Geometry, logits: str) -> str:
    """The columns of ids that there are."""
    if geometry.vocab_size == geometry.padded_vocab_size:
        return logits
    start, end = nodes.constant("topk.start", [0]), nodes.constant("topk.vocab_size", [geometry.vocab_size])
    return nodes.add("Slice", [logits, start, end, nodes.constant("topk.columns", [1])], "topk.real")


def _masked(nodes: Nodes, geometry: Geometry, logits: str) -> str:
    """All columns, those of no id without any chance."""
    if geometry.vocab_size == geometry.padded_vocab_size:
        return logits
    mask = np.zeros(geometry.padded_vocab_size, np.float32)
    mask[geometry.vocab_size :] = -np.inf
    return nodes.add("Add", [logits, nodes.data.add("topk.mask", mask)], "topk.real")


def _in_parts(nodes: Nodes, num_parts: int, width: int, count: int, rows: str) -> None:
    """The best of each part, and the best of those."""
    top = "topk.count"
    shape = nodes.constant("topk.parts_shape", [-1, num_parts, width])
    parts = nodes.add("Reshape", [rows, shape], "topk.parts")
    best = ["topk.part_values", "topk.part_ids"]
    nodes.add_many("TopK", [parts, top], best, "topk.of_parts", axis=2)
    shape = nodes.constant("topk.best_shape", [-1, num_parts * count])
    values, columns = (nodes.add("Reshape", [name, shape], f"{name}.flat") for name in best)
    nodes.add_many("TopK", [values, top], [TOPK_NAMES["topk_values"], "topk.places"], "topk", axis=1)
    # A place says which part, and the part's own list says which of its columns.
    column = nodes.add("GatherElements", [columns, "topk.places"], "topk.column", axis=1)
    part = nodes.add("Div", ["topk.places", top], "topk.part")
    start = nodes.add("Mul", [part, nodes.constant("topk.part_width", [width])], "topk.part_start")
    nodes.add("Add", [start, column], "topk.ids")


def _logsumexp(nodes: Nodes, rows: str) -> None:
    """Spelt out, since ReduceLogSumExp needs cuDNN on the CUDA provider and these nodes do not."""
    start, end, axis = (
        nodes.constant(f"topk.{name}", [value]) for name, value in (("first", 0), ("one", 1), ("axis", 1))
    )
    best = nodes.add("Slice", [TOPK_NAMES["topk_values"], start, end, axis], "topk.best")
    shifted = nodes.add("Sub", [rows, best], "topk.shifted")
    exponentials = nodes.add("Exp", [shifted], "topk.exponentials")
    total = nodes.add("ReduceSum", [exponentials, axis], "topk.total", keepdims=1)
    log = nodes.add("Log", [total], "topk.log")
    nodes.add("Add", [log, best], TOPK_NAMES["logsumexp"])
