"""Owns `model.onnx.data`: where each initialiser lies, and writing them one after the other.

Invariant: places are known before any weight is read, so at most a chunk of one tensor is in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from onnx import TensorProto, helper

# A page: a mapped tensor then shares none with its neighbour. ONNX Runtime maps only aligned tensors.
ALIGNMENT = 4096


@dataclass
class ExternalData:
    """The file's layout, and the chunks that fill it."""

    file_name: str
    initializers: list[TensorProto] = field(default_factory=list)
    num_bytes: int = 0
    _offsets: dict[str, int] = field(default_factory=dict)
    _sources: list[Iterable[tuple[str, int, np.ndarray]]] = field(default_factory=list)

    def reserve(self, name: str, dtype: np.dtype | type, shape: tuple[int, ...]) -> str:
        """Gives a tensor its place in the file; returns its name."""
        dtype = np.dtype(dtype)
        size = math.prod(shape) * dtype.itemsize
        offset = -(-self.num_bytes // ALIGNMENT) * ALIGNMENT
        tensor = TensorProto(
            name=name,
            data_type=helper.np_dtype_to_tensor_dtype(dtype),
            dims=shape,
            data_location=TensorProto.EXTERNAL,
        )
        for key, value in (("location", self.file_name), ("offset", offset), ("length", size)):
            tensor.external_data.add(key=key, value=str(value))
        self.initializers.append(tensor)
        self._offsets[name] = offset
        self.num_bytes = offset + size
        return name

    def fill(self, chunks: Iterable[tuple[str, int, np.ndarray]]) -> None:
        """Remembers where content comes from: (tensor name, first row, rows), read only by `write`."""
        self._sources.append(chunks)

    def add(self, name: str, array: np.ndarray) -> str:
        """Reserves and fills a small tensor at once."""
        self.reserve(name, array.dtype, array.shape)
        self.fill([(name, 0, array)])
        return name

    def write(self, folder: Path) -> None:
        """Writes the file, pulling every chunk once."""
        with (folder / self.file_name).open("wb") as file:
            file.truncate(self.num_bytes)
            for source in self._sources:
                for name, first_row, rows in source:
                    self._write_rows(file, name, first_row, rows)

    def _write_rows(self, file: BinaryIO, name: str, first_row: int, rows: np.ndarray) -> None:
        rows = np.ascontiguousarray(rows)
        file.seek(self._offsets[name] + first_row * rows[:1].nbytes)
        # As bytes: the buffer protocol has no bfloat16.
        file.write(rows.reshape(-1).view(np.uint8).data)
