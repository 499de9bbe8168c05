"""Owns the graph while it is written: its nodes in order, and its initialisers.

Invariant: a node has the name of what it computes; a constant that shapes depend on is in the graph itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import ml_dtypes
import numpy as np
from onnx import NodeProto, TensorProto, helper

from glm_export.error import ExportError
from glm_export.graph.external_data import Content, ExternalData
from glm_export.read.checkpoint import Source


class Nodes:
    """Collects nodes and initialisers; methods return the name of what they add."""

    def __init__(self, data_file: str) -> None:
        self.nodes: list[NodeProto] = []
        self.data = ExternalData(data_file)

    def add(self, kind: str, inputs: list[str], output: str, domain: str = "", **attributes: object) -> str:
        """Adds a node with one output."""
        return self.add_many(kind, inputs, [output], output, domain, **attributes)[0]

    def add_many(
        self,
        kind: str,
        inputs: list[str],
        outputs: list[str],
        name: str,
        domain: str = "",
        **attributes: object,
    ) -> list[str]:
        """Adds a node with several outputs; those without a name are absent."""
        self.nodes.append(helper.make_node(kind, inputs, outputs, name, domain=domain, **attributes))
        return outputs

    def constant(self, name: str, values: Sequence[int]) -> str:
        """A few whole numbers that shapes depend on; in the graph itself, where shape inference sees them."""
        self.data.initializers.append(helper.make_tensor(name, TensorProto.INT64, [len(values)], values))
        return name

    def keep(self, name: str, weight: Source, dtype: np.dtype | type) -> str:
        """Adds a weight that is not quantised."""

        def make(first: int, end: int) -> dict[str, np.ndarray]:
            return {name: narrowed(weight.name, weight.rows(first, end), dtype)}

        self.data.reserve(name, dtype, weight.shape)
        self.data.fill(Content.of(weight, make), name)
        return name


def narrowed(source: str, rows: np.ndarray, dtype: np.dtype | type) -> np.ndarray:
    """Rows in another type, which must hold them."""
    largest = np.abs(rows).max(initial=0)
    if largest > float(ml_dtypes.finfo(dtype).max):
        raise ExportError(f"{source}: {largest} is beyond the largest {np.dtype(dtype).name}")
    return rows.astype(dtype)
