"""Owns `model.onnx.data`: where each initialiser lies, and writing them a few rows at a time.

Invariant: places are known before any weight is read, so any thread writes the rows that it made, and at most
a chunk of a tensor for each thread is in memory.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper

from glm_export import progress
from glm_export.read.checkpoint import Source

# A page: a mapped tensor then shares none with its neighbour. ONNX Runtime maps only aligned tensors.
ALIGNMENT = 4096
# Elements that are converted at once: with what is computed on the way they stay in a core's cache.
CHUNK = 1 << 17


@dataclass(frozen=True)
class Content:
    """What fills one or more tensors of as many rows: `make` gives some of each by name."""

    source: str
    shape: tuple[int, ...]
    num_bytes: int
    make: Callable[[int, int], dict[str, np.ndarray]]

    @classmethod
    def of(cls, weight: Source, make: Callable[[int, int], dict[str, np.ndarray]]) -> Content:
        """What is made of a weight of the checkpoint."""
        return cls(weight.name, weight.shape, weight.num_bytes, make)

    def ranges(self) -> list[tuple[int, int]]:
        """All rows as (first, end) of each chunk."""
        step = max(1, CHUNK // math.prod(self.shape[1:]))
        return [(first, min(first + step, self.shape[0])) for first in range(0, self.shape[0], step)]


@dataclass
class ExternalData:
    """The file's layout, and the contents that fill it."""

    file_name: str
    initializers: list[TensorProto] = field(default_factory=list)
    num_bytes: int = 0
    _offsets: dict[str, int] = field(default_factory=dict)
    _contents: dict[str, Content] = field(default_factory=dict)

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

    def fill(self, content: Content, *names: str) -> None:
        """Remembers where the content of these tensors comes from; it is read by `write` and `rows` only."""
        self._contents |= dict.fromkeys(names, content)

    def rows(self, name: str, first: int, count: int) -> np.ndarray:
        """Rows of a tensor as they would be written."""
        return self._contents[name].make(first, first + count)[name]

    def add(self, name: str, array: np.ndarray) -> str:
        """Reserves and fills a small tensor at once."""
        self.reserve(name, array.dtype, array.shape)
        self.fill(Content(name, array.shape, array.nbytes, lambda first, end: {name: array[first:end]}), name)
        return name

    def write(self, folder: Path) -> None:
        """Writes the file, reading every row once, on every core that this process may use."""
        # Several tensors may share one.
        contents = {id(content): content for content in self._contents.values()}.values()
        total = sum(content.num_bytes for content in contents)
        with (
            (folder / self.file_name).open("wb") as file,
            ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool,
            progress.phase("weights", total) as advance,
        ):
            file.truncate(self.num_bytes)
            for content in contents:
                ranges = content.ranges()

                def job(rows: tuple[int, int], content: Content = content) -> None:
                    for name, array in content.make(*rows).items():
                        self._write_rows(file.fileno(), name, rows[0], array)

                for _ in pool.map(job, ranges):
                    advance(content.source, content.num_bytes // len(ranges))

    def _write_rows(self, file: int, name: str, first_row: int, rows: np.ndarray) -> None:
        offset = self._offsets[name] + first_row * rows[:1].nbytes
        # As bytes: the buffer protocol has no bfloat16.
        content = memoryview(np.ascontiguousarray(rows).reshape(-1).view(np.uint8))
        while content:
            written = os.pwrite(file, content, offset)
            content, offset = content[written:], offset + written
