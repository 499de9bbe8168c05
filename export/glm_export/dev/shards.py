"""Owns writing half-precision weights as they are published: several files and an index, in either format.

Invariant: one chunk of one tensor for each thread is in memory. Torch is not needed to write what it reads.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np

# Names of a shard and of the index.
NAMES = {
    "safetensors": ("model-{:05}-of-{:05}.safetensors", "model.safetensors.index.json"),
    "bin": ("pytorch_model-{:05}-of-{:05}.bin", "pytorch_model.bin.index.json"),
}
FORMATS = tuple(NAMES)
ITEM_BYTES = 2

Shapes = Mapping[str, tuple[int, ...]]
# Gives a tensor's rows as float16, a few at a time.
Chunks = Callable[[str], Iterable[np.ndarray]]


def write(folder: Path, shapes: Shapes, chunks: Chunks, file_format: str, num_shards: int) -> None:
    """Writes all tensors into about this many files, and the index that says where each is."""
    shard_name, index_name = NAMES[file_format]
    total = sum(map(_num_bytes, shapes.values()))
    held: dict[int, dict[str, tuple[int, ...]]] = {}
    before = 0
    for name, shape in shapes.items():
        held.setdefault(before * num_shards // total, {})[name] = shape
        before += _num_bytes(shape)
    files = [shard_name.format(number, len(held)) for number in range(1, len(held) + 1)]
    shards = dict(zip(files, held.values(), strict=True))
    write_shard = _write_safetensors if file_format == "safetensors" else _write_torch
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(lambda item: write_shard(folder / item[0], item[1], chunks), shards.items()))
    weight_map = {name: file for file, names in shards.items() for name in names}
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / index_name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _num_bytes(shape: tuple[int, ...]) -> int:
    return math.prod(shape) * ITEM_BYTES


def _copy(file: BinaryIO, rows: Iterable[np.ndarray]) -> None:
    for chunk in rows:
        file.write(memoryview(np.ascontiguousarray(chunk)).cast("B"))


def _write_safetensors(path: Path, shapes: Shapes, chunks: Chunks) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + _num_bytes(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in shapes:
            _copy(file, chunks(name))


def _write_torch(path: Path, shapes: Shapes, chunks: Chunks) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{path.stem}/data.pkl", _state_dict(shapes))
        archive.writestr(f"{path.stem}/byteorder", "little")
        for key, name in enumerate(shapes):
            with archive.open(f"{path.stem}/data/{key}", "w", force_zip64=True) as file:
                _copy(file, chunks(name))
        archive.writestr(f"{path.stem}/version", "3\n")


def _state_dict(shapes: Shapes) -> bytes:
    """The pickle of a dict of tensors, opcode by opcode, since pickling the real classes would need torch."""

    def value(item: object) -> bytes:
        return pickle.dumps(item, protocol=2)[2:-1]

    def tuple_of(*items: bytes) -> bytes:
        return pickle.MARK + b"".join(items) + pickle.TUPLE

    def named(module: str, name: str) -> bytes:
        return pickle.GLOBAL + f"{module}\n{name}\n".encode()

    content = pickle.PROTO + b"\x02" + pickle.EMPTY_DICT + pickle.MARK
    for key, (name, shape) in enumerate(shapes.items()):
        half = named("torch", "HalfStorage")
        storage = tuple_of(value("storage"), half, value(str(key)), value("cpu"), value(math.prod(shape)))
        strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        no_hooks = named("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
        tensor = tuple_of(
            storage + pickle.BINPERSID, value(0), value(shape), value(strides), value(False), no_hooks
        )
        content += value(name) + named("torch._utils", "_rebuild_tensor_v2") + tensor + pickle.REDUCE
    return content + pickle.SETITEMS + pickle.STOP
