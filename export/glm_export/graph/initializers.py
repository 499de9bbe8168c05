"""Owns reading a graph's initialisers for the interpreter, from a folder or before they are written.

Invariant: few rows are in memory at a time, whatever a tensor's size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper


class Weights:
    """Initialisers, a few rows at a time from wherever they lie.

    `read` gives rows of what is not in the graph itself: (name, first row, number of rows).
    """

    def __init__(self, tensors: Sequence[TensorProto], read: Callable[[str, int, int], np.ndarray]) -> None:
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self._read = read

    @classmethod
    def of_folder(cls, folder: Path, tensors: Sequence[TensorProto]) -> Weights:
        """Those of a graph whose external data is in a folder."""
        by_name = {tensor.name: tensor for tensor in tensors}
        return cls(tensors, lambda name, first, count: _from_file(folder, by_name[name], first, count))

    @property
    def num_bytes(self) -> int:
        """Size of all of them."""
        return sum(map(self.size, self._tensors))

    def size(self, name: str) -> int:
        """Bytes of an initialiser; of anything else none."""
        if name not in self:
            return 0
        return math.prod(self._tensors[name].dims) * self.dtype(name).itemsize

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape as it is stored."""
        return tuple(self._tensors[name].dims)

    def dtype(self, name: str) -> np.dtype:
        """The type that elements are stored in."""
        return helper.tensor_dtype_to_np_dtype(self._tensors[name].data_type)

    def activations(self, nodes: Sequence[NodeProto]) -> np.dtype:
        """The type of activations: that of the first norm's weight."""
        norms = (node for node in nodes if node.op_type == "SimplifiedLayerNormalization")
        return next((self.dtype(norm.input[1]) for norm in norms), np.dtype(np.float32))

    def rows(self, name: str, first: int = 0, count: int | None = None) -> np.ndarray:
        """Some rows in the type they are stored in; all without a count."""
        tensor = self._tensors[name]
        count = tensor.dims[0] - first if count is None else min(count, tensor.dims[0] - first)
        if tensor.data_location != TensorProto.EXTERNAL:
            return numpy_helper.to_array(tensor)[first : first + count]
        return self._read(name, first, count)


def place(folder: Path, tensor: TensorProto) -> tuple[Path, int]:
    """File and byte at which an initialiser outside the graph begins."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    return folder / entries["location"], int(entries["offset"])


def _from_file(folder: Path, tensor: TensorProto, first: int, count: int) -> np.ndarray:
    path, offset = place(folder, tensor)
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    row_bytes = math.prod(tensor.dims[1:]) * dtype.itemsize
    with path.open("rb") as file:
        file.seek(offset + first * row_bytes)
        content = np.frombuffer(file.read(count * row_bytes), np.uint8)
    return content.view(dtype).reshape(count, *tensor.dims[1:])
