"""Owns reading weights: safetensors or torch shards, mapped into memory and read a few rows at a time.

Invariant: no code of the checkpoint ever runs. Torch's pickles are read by an unpickler that knows a handful
of names and refuses all others.
"""

from __future__ import annotations

import json
import math
import mmap
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from glm_export.error import ExportError
from glm_export.read.json_file import read_object

# bfloat16 has no numpy type: its 16 bits are the upper half of a float32.
_ITEM_TYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I32": np.int32}
_TORCH_TYPES = {"FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "IntStorage": "I32"}
# Two large pages.
NEIGHBOURS = 4 << 20
_SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")


class Source(Protocol):
    """What a weight comes from, however it is stored: its rows are read a few at a time."""

    @property
    def name(self) -> str:
        """The checkpoint's name."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape as rows give it."""

    @property
    def num_bytes(self) -> int:
        """Bytes read for all of it."""

    def rows(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows of the first dimension as float32: a copy, so the caller decides how much memory it takes."""


@dataclass(frozen=True)
class Rows:
    """Some rows of a weight, as a weight."""

    whole: Source
    first: int
    count: int

    @property
    def name(self) -> str:
        """The whole's."""
        return self.whole.name

    @property
    def shape(self) -> tuple[int, ...]:
        """As a weight of its own."""
        return (self.count, *self.whole.shape[1:])

    @property
    def num_bytes(self) -> int:
        """A part of the whole's."""
        return self.whole.num_bytes * self.count // self.whole.shape[0]

    def rows(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """As the whole's, counted from the first."""
        stop = self.count if stop is None else min(stop, self.count)
        return self.whole.rows(self.first + start, self.first + stop)


@dataclass(frozen=True)
class Tensor:
    """A weight that still lies in its file."""

    name: str
    shape: tuple[int, ...]
    item_type: str
    buffer: mmap.mmap
    offset: int

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * np.dtype(_ITEM_TYPES[self.item_type]).itemsize

    def rows(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows of the first dimension as float32: a copy, so the caller decides how much memory it takes."""
        if self.item_type == "I32":
            raise ExportError(f"tensor {self.name} has type I32, expected F32, F16 or BF16")
        stop = self.shape[0] if stop is None else min(stop, self.shape[0])
        stored = self.stored(start, stop)
        if self.item_type == "BF16":
            values = (stored.astype(np.uint32) << 16).view(np.float32)
        else:
            values = stored.astype(np.float32)
        self.release(start, stop)
        if not np.isfinite(values).all():
            raise ExportError(f"{self.name}: rows {start} to {stop - 1} hold values that are not finite")
        return values

    def stored(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows as they lie in the file, not copied; bfloat16 as its bits."""
        stop = self.shape[0] if stop is None else stop
        width = math.prod(self.shape[1:])
        dtype = np.dtype(_ITEM_TYPES[self.item_type]).newbyteorder("<")
        offset = self.offset + start * width * dtype.itemsize
        flat = np.frombuffer(self.buffer, dtype, (stop - start) * width, offset)
        return flat.reshape(stop - start, *self.shape[1:])

    def release(self, start: int = 0, stop: int | None = None) -> None:
        """Gives pages back: what is mapped and was read counts as this process's memory."""
        stop = self.shape[0] if stop is None else stop
        row_bytes = self.num_bytes // max(self.shape[0], 1)
        # And what lies before: reading here has mapped the neighbours again, up to a large page.
        first = max(self.offset + start * row_bytes - NEIGHBOURS, 0) // mmap.PAGESIZE * mmap.PAGESIZE
        end = min(self.offset + stop * row_bytes, len(self.buffer))
        if end > first:
            self.buffer.madvise(mmap.MADV_DONTNEED, first, end - first)


class Checkpoint(Mapping[str, Tensor]):
    """Every tensor of a checkpoint folder by name."""

    def __init__(self, folder: Path) -> None:
        self._tensors: dict[str, Tensor] = {}
        for path, listed in _shards(folder).items():
            found = read_file(path)
            missing = sorted(listed - found.keys())
            if missing:
                raise ExportError(f"{path}: the index lists {missing[0]}, which is not in the file")
            twice = sorted(found.keys() & self._tensors.keys())
            if twice:
                raise ExportError(f"{path}: {twice[0]} was in another shard already")
            self._tensors |= found

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def require(
    found: Mapping[str, Source], shapes: Mapping[str, tuple[int, ...]], ignored: frozenset[str]
) -> None:
    """Checks that exactly these weights are there, in these shapes."""
    for name, shape in shapes.items():
        if name not in found:
            raise ExportError(f"tensor {name} is missing, expected shape {list(shape)}")
        if found[name].shape != shape:
            raise ExportError(f"tensor {name} has shape {list(found[name].shape)}, expected {list(shape)}")
    extra = sorted(found.keys() - shapes.keys() - ignored)
    if extra:
        more = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
        raise ExportError(
            f"tensor {extra[0]} of shape {list(found[extra[0]].shape)} has no place in the network{more}"
        )


def read_file(path: Path) -> dict[str, Tensor]:
    """Every tensor of one file, which its name says the format of."""
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)


def _shards(folder: Path) -> dict[Path, set[str]]:
    """The weight files, each with the tensors that an index promises in it."""
    for single in _SINGLE_FILES:
        index = folder / f"{single}.index.json"
        if index.is_file():
            weight_map = read_object(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
                raise ExportError(f"{index}: weight_map must be an object that says the file of each tensor")
            shards: dict[Path, set[str]] = {}
            for name, file in weight_map.items():
                shards.setdefault(folder / Path(file).name, set()).add(name)
            for path in shards:
                if not path.is_file():
                    raise ExportError(f"{path} is missing; {index.name} lists it")
            return shards
        if (folder / single).is_file():
            return {folder / single: set()}
    # AutoGPTQ names the bits and the groups in the file's name.
    quantised = list(folder.glob("gptq_model-*.safetensors"))
    if len(quantised) == 1:
        return {quantised[0]: set()}
    names = ", ".join(f"{single}[.index.json]" for single in _SINGLE_FILES)
    raise ExportError(f"{folder} has no weights: expected one of {names}")


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        try:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise ExportError(f"{path} is empty") from None


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    buffer = _map(path)
    start = 8 + int.from_bytes(buffer[:8], "little")
    if start > len(buffer):
        raise ExportError(f"{path}: not a safetensors file: the header is cut off")
    try:
        header = json.loads(buffer[8:start])
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{path}: not a safetensors file: the header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise ExportError(f"{path}: not a safetensors file: the header is not an object")
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        match entry:
            case {"dtype": str(item_type), "shape": [*shape], "data_offsets": [int(begin), int(end)]} if all(
                isinstance(size, int) and size >= 0 for size in shape
            ):
                pass
            case _:
                raise ExportError(
                    f"{path}: not a safetensors file: {name} needs a dtype, a shape and data_offsets"
                )
        if item_type not in _ITEM_TYPES:
            known = ", ".join(_ITEM_TYPES)
            raise ExportError(f"{path}: tensor {name} has type {item_type}, expected one of {known}")
        tensors[name] = Tensor(name, tuple(shape), item_type, buffer, start + begin)
        _check_extent(path, tensors[name], start + end)
    return tensors


def _check_extent(path: Path, tensor: Tensor, limit: int) -> None:
    if tensor.offset + tensor.num_bytes > min(limit, len(tensor.buffer)) or tensor.offset < 0:
        raise ExportError(f"{path}: tensor {tensor.name} reaches beyond its data")


@dataclass(frozen=True)
class _Storage:
    """A run of numbers in the archive, as torch's pickles refer to it."""

    item_type: str
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class _View:
    """A tensor as torch pickles it: a window on a storage."""

    storage: _Storage
    first: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _rebuild_tensor(storage: _Storage, first: int, shape: Any, stride: Any, *_: object) -> _View:
    return _View(storage, int(first), tuple(shape), tuple(stride))


def _rebuild_parameter(view: _View, *_: object) -> _View:
    return view


class _Unpickler(pickle.Unpickler):
    """Reads a state dict and nothing else: any other name in the pickle is refused, not called."""

    def __init__(self, file: Any, path: Path, storages: Mapping[str, tuple[int, int]]) -> None:
        super().__init__(file)
        self._path = path
        self._storages = storages

    def find_class(self, module: str, name: str) -> Any:
        known = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
        }
        if (module, name) in known:
            return known[module, name]
        if module == "torch" and name in _TORCH_TYPES:
            return _TORCH_TYPES[name]
        raise ExportError(f"{self._path}: refused to load {module}.{name}: not plain float weights")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, item_type, key, *_ = pid
        if kind != "storage" or key not in self._storages:
            raise ExportError(f"{self._path}: the archive has no storage {key}")
        return _Storage(item_type, *self._storages[key])


def _read_torch(path: Path) -> dict[str, Tensor]:
    buffer = _map(path)
    try:
        with zipfile.ZipFile(path) as archive:
            pickled = [entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl")]
            if len(pickled) != 1:
                raise ExportError(f"{path}: not a torch weight file: {len(pickled)} data.pkl in it")
            root = pickled[0].filename.removesuffix("data.pkl")
            if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
                raise ExportError(f"{path}: its numbers are not little-endian")
            storages = {}
            for entry in archive.infolist():
                if entry.filename.startswith(f"{root}data/"):
                    if entry.compress_type != zipfile.ZIP_STORED:
                        raise ExportError(f"{path}: {entry.filename} is compressed, which torch never does")
                    key = entry.filename.removeprefix(f"{root}data/")
                    storages[key] = (_data_offset(buffer, entry), entry.file_size)
            with archive.open(pickled[0]) as file:
                state = _Unpickler(file, path, storages).load()
    except zipfile.BadZipFile:
        raise ExportError(f"{path}: not a zip archive; torch before 1.6 wrote another format") from None
    except ExportError:
        raise
    # Damaged archives and pickles fail in more ways than can be listed (found by flipping bytes).
    except Exception as error:
        raise ExportError(f"{path}: not a torch state dict: {error}") from None
    if not isinstance(state, dict):
        raise ExportError(f"{path}: not a torch state dict")
    return {name: _tensor(path, name, view, buffer) for name, view in state.items()}


def _data_offset(buffer: mmap.mmap, entry: zipfile.ZipInfo) -> int:
    """Where an entry's bytes begin. The local header is read since its padding is not in the directory."""
    name_size, extra_size = struct.unpack_from("<HH", buffer, entry.header_offset + 26)
    return entry.header_offset + 30 + name_size + extra_size


def _tensor(path: Path, name: object, view: object, buffer: mmap.mmap) -> Tensor:
    if not isinstance(name, str) or not isinstance(view, _View):
        raise ExportError(f"{path}: {name!r} is not a tensor")
    dense = tuple(math.prod(view.shape[axis + 1 :]) for axis in range(len(view.shape)))
    if view.stride != dense:
        raise ExportError(f"{path}: tensor {name} is stored with strides {view.stride}, expected {dense}")
    item_size = np.dtype(_ITEM_TYPES[view.storage.item_type]).itemsize
    tensor = Tensor(
        name, view.shape, view.storage.item_type, buffer, view.storage.offset + view.first * item_size
    )
    _check_extent(path, tensor, view.storage.offset + view.storage.num_bytes)
    return tensor
