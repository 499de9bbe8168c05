"""Owns checkpoints that are GPTQ or AWQ already: their codes go to MatMulNBits as they are.

Invariant: no weight is rounded again. What cannot be expressed exactly is refused by name.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from glm_export.error import ExportError
from glm_export.quantise.quantize import Scheme, pack, unpack
from glm_export.read.checkpoint import Source, Tensor
from glm_export.read.json_file import read_object

BITS = 4
# Eight codes share an int32.
PER_WORD = 8
# The column, among eight, that each four bits of AWQ's words hold.
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
# Blocks that MatMulNBits takes; a larger group is several with the same scale.
BLOCK_SIZES = (128, 64, 32, 16)
SETTINGS_FILES = ("quantize_config.json", "quant_config.json")
PARTS = ("qweight", "qzeros", "scales")


@dataclass(frozen=True)
class Settings:
    """What the file says of how codes are to be read."""

    method: str
    # Weights of a row that share a scale; -1 is the whole row.
    group_size: int
    # What AutoGPTQ takes off a zero point before it stores it; version 2 of the format does not.
    zero_offset: int = 0


@dataclass(frozen=True)
class Matrix:
    """A quantised weight [N, K]; rows of it are columns of what lies in the file."""

    name: str
    shape: tuple[int, int]
    settings: Settings
    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    group_size: int
    # The group of each weight of a row, where they are not in order.
    groups: np.ndarray | None = None

    @property
    def num_bytes(self) -> int:
        """As `Tensor.num_bytes`."""
        return sum(tensor.num_bytes for tensor in (self.qweight, self.qzeros, self.scales))

    @property
    def scheme(self) -> Scheme:
        """How the arrays are to be read."""
        return Scheme(BITS, next(size for size in BLOCK_SIZES if self.group_size % size == 0))

    @cached_property
    def order(self) -> np.ndarray | None:
        """The order of a row's weights in the arrays, if it is another: what enters must be put into it."""
        return None if self.groups is None else np.argsort(self.groups, kind="stable")

    def rows(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The weights that the codes stand for, by the formula of either method."""
        stop = self.shape[0] if stop is None else min(stop, self.shape[0])
        groups = np.arange(self.shape[1]) // self.group_size if self.groups is None else self.groups
        codes, zeros, scales = self._read(start, stop)
        return (codes.astype(np.float32) - zeros[:, groups]) * scales[:, groups]

    def arrays(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """As `Scheme.quantize`, without any rounding."""
        codes, zeros, scales = self._read(start, stop)
        if self.order is not None:
            codes = codes[:, self.order]
        block_size = self.scheme.block_size
        times = self.group_size // block_size
        return {
            "packed": pack(codes).reshape(stop - start, -1, block_size // 2),
            "scales": scales.repeat(times, axis=1),
            "zeros": pack(zeros.repeat(times, axis=1)),
        }

    def _read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Codes uint8 [n, K], zeros uint8 and scales float32 [n, groups]."""
        is_awq = self.settings.method == "awq"
        codes = self._columns(self.qweight, start, stop) if is_awq else self._words(start, stop)
        stored = self._columns(self.qzeros, start, stop)
        if self.settings.zero_offset and (stored == 15).any():
            raise ExportError(
                f"{self.qzeros.name}: a stored zero point of 15 is 0 to some readers of GPTQ's first format "
                "and 16 to others; save the checkpoint as gptq_v2"
            )
        scales = self.scales.stored()[:, start:stop].T.astype(np.float32)
        for tensor in (self.qweight, self.qzeros, self.scales):
            tensor.release()
        if not np.isfinite(scales).all():
            raise ExportError(f"{self.scales.name} holds values that are not finite")
        return codes, stored + np.uint8(self.settings.zero_offset), scales

    def _words(self, start: int, stop: int) -> np.ndarray:
        """GPTQ packs along K: a row's words are its codes in order."""
        words = np.ascontiguousarray(self.qweight.stored()[:, start:stop].T)
        return unpack(words.view(np.uint8))

    def _columns(self, tensor: Tensor, start: int, stop: int) -> np.ndarray:
        """What is packed along N, [*, N / 8] words, as rows [n, *]."""
        first, end = start // PER_WORD, -(-stop // PER_WORD)
        words = np.ascontiguousarray(tensor.stored()[:, first:end])
        codes = unpack(words.view(np.uint8)).reshape(len(words), -1, PER_WORD)
        if self.settings.method == "awq":
            codes = codes[..., np.argsort(AWQ_COLUMNS)]
        return codes.reshape(len(words), -1)[:, start - first * PER_WORD : stop - first * PER_WORD].T


def opened(tensors: Mapping[str, Tensor], folder: Path, wanted: Container[str]) -> Mapping[str, Source]:
    """The tensors, with every quantised matrix in place of its parts, under its weight's name.

    Biases that are zero and not `wanted` are left out: GPTQ's authors write one for every matrix.
    """
    names = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    settings = _settings(folder)
    if not names:
        if settings is not None:
            raise ExportError(f"{folder}: the config says {settings.method}, and there is no qweight")
        return tensors
    if settings is None:
        listed = " nor ".join(("config.json", *SETTINGS_FILES))
        raise ExportError(f"{folder}: {names[0]}.qweight is quantised, and neither {listed} says how")
    found: dict[str, Source] = dict(tensors)
    for name in names:
        found[f"{name}.weight"] = _matrix(name, settings, tensors)
        for part in (*PARTS, "g_idx"):
            found.pop(f"{name}.{part}", None)
        bias = f"{name}.bias"
        if bias in tensors and bias not in wanted and not tensors[bias].rows().any():
            del found[bias]
    return found


def _settings(folder: Path) -> Settings | None:
    files = [folder / name for name in ("config.json", *SETTINGS_FILES) if (folder / name).is_file()]
    for path in files:
        content = read_object(path)
        raw = content.get("quantization_config") if path.name == "config.json" else content
        if raw is not None:
            if not isinstance(raw, dict):
                raise ExportError(f"{path}: quantization_config is not an object")
            return _read_settings(path, raw)
    return None


def _read_settings(path: Path, raw: Mapping[str, Any]) -> Settings:
    is_awq = path.name == "quant_config.json" or "w_bit" in raw
    method = str(raw.get("quant_method") or ("awq" if is_awq else "gptq")).lower()
    if method not in ("gptq", "awq"):
        raise ExportError(f"{path}: quant_method {method!r} is not supported, only gptq and awq are")
    bits = raw.get("bits", raw.get("w_bit"))
    if bits != BITS:
        raise ExportError(f"{path}: {method} of {bits} bits is not supported, only {BITS} are")
    group_size = raw.get("group_size", raw.get("q_group_size", -1))
    if not isinstance(group_size, int):
        raise ExportError(f"{path}: group_size is {group_size!r}, expected a whole number")
    if method == "awq":
        version = str(raw.get("version", "gemm")).lower()
        if version != "gemm" or not raw.get("zero_point", True):
            raise ExportError(f"{path}: AWQ is supported in version gemm with zero points, not {version}")
        return Settings(method, group_size)
    form = str(raw.get("checkpoint_format") or "gptq").lower()
    if form not in ("gptq", "gptq_v2") or raw.get("is_marlin_format"):
        raise ExportError(f"{path}: checkpoint_format {form!r} is not supported, only gptq and gptq_v2 are")
    return Settings(method, group_size, zero_offset=int(form == "gptq"))


def _matrix(name: str, settings: Settings, tensors: Mapping[str, Tensor]) -> Matrix:
    for part in PARTS:
        if f"{name}.{part}" not in tensors:
            raise ExportError(f"tensor {name}.{part} is missing beside {name}.qweight")
    qweight, qzeros, scales = (tensors[f"{name}.{part}"] for part in PARTS)
    if len(qweight.shape) != 2:
        raise ExportError(f"tensor {qweight.name} has shape {list(qweight.shape)}, expected two dimensions")
    height, breadth = qweight.shape
    is_awq = settings.method == "awq"
    num_rows, width = (breadth * PER_WORD, height) if is_awq else (breadth, height * PER_WORD)
    group_size = width if settings.group_size == -1 else settings.group_size
    if group_size < 1 or width % group_size or group_size % BLOCK_SIZES[-1]:
        raise ExportError(
            f"{qweight.name}: groups of {group_size} weights are not a multiple of {BLOCK_SIZES[-1]} that "
            f"divides rows of {width}"
        )
    num_groups = width // group_size
    for tensor, shape, kinds in (
        (qweight, qweight.shape, ("I32",)),
        (qzeros, (num_groups, num_rows // PER_WORD), ("I32",)),
        (scales, (num_groups, num_rows), ("F16", "F32")),
    ):
        if tensor.shape != shape or tensor.item_type not in kinds:
            raise ExportError(
                f"tensor {tensor.name} is {tensor.item_type} of shape {list(tensor.shape)}, expected "
                f"{' or '.join(kinds)} of shape {list(shape)}"
            )
    groups = _groups(name, width, group_size, tensors)
    return Matrix(f"{name}.weight", (num_rows, width), settings, qweight, qzeros, scales, group_size, groups)


def _groups(name: str, width: int, group_size: int, tensors: Mapping[str, Tensor]) -> np.ndarray | None:
    tensor = tensors.get(f"{name}.g_idx")
    if tensor is None:
        return None
    if tensor.shape != (width,) or tensor.item_type != "I32":
        raise ExportError(
            f"tensor {tensor.name} is {tensor.item_type} of {list(tensor.shape)}, not I32 of [{width}]"
        )
    groups = tensor.stored().astype(np.int64)
    in_order = np.arange(width) // group_size
    if not np.array_equal(np.sort(groups), in_order):
        raise ExportError(f"{tensor.name}: not every group has {group_size} weights")
    return None if np.array_equal(groups, in_order) else groups
