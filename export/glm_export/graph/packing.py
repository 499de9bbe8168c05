"""Owns how quantised weights lie in memory for the engine's QuantizedMatMul, and which rows a panel holds.

    weights  uint8 [num_panels, panel bytes]; a panel is 32 columns of the output: rows of the matrix
    panel    | block 0 | block 1 | ... | block K / B - 1 |       B = block_size neighbours along K
    block    | line | line | ... | line | scales |               all of 64 bytes
    line     byte 4c + j is the code of k = 4s + j in step s of the block, s = 0 .. B / 4 - 1
      4 bits   one line a step: column c in the low half of the byte, column 16 + c in the high half
      8 bits   two lines a step: columns 0 .. 15, then columns 16 .. 31
    scales   32 float16, one a column

A weight is (code - 8) * scale at 4 bits, (code - 128) * scale at 8. Columns beyond N have scale 0. With
swiglu the first 16 columns of panel p are rows 16p.. of the gate, the others rows 16p.. of the up projection.
engine/kernels/src/quantized_matmul/packing.rs has the same drawing and reads what is written here;
tests/golden/packing.json holds both to it.

Invariant: a panel depends on its own rows of the matrix only, so panels may be made in any order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from glm_export.error import ExportError
from glm_export.quantise.rounding import nearest
from glm_export.read.checkpoint import Source

COLUMNS = 32
HALF = COLUMNS // 2
# Values of K that one instruction multiplies.
STEP = 4
BLOCK_SIZES = (512, 256, 128, 64, 32)
SCALE = np.dtype("<f2")

# Codes and scales of rows at 4 bits, given those and the block size.
Rounding = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Packing:
    """A matrix [num_rows, width]; with swiglu its first half is the gate, its second the up projection."""

    bits: int
    block_size: int
    num_rows: int
    width: int
    swiglu: bool = False

    @property
    def num_panels(self) -> int:
        """Panels of the matrix, the last of them filled up with zeros."""
        return -(-self.num_rows // 2 // HALF) if self.swiglu else -(-self.num_rows // COLUMNS)

    @property
    def shape(self) -> tuple[int, int]:
        """Panels, and bytes of one."""
        block_bytes = self.block_size * COLUMNS * self.bits // 8 + COLUMNS * SCALE.itemsize
        return self.num_panels, self.width // self.block_size * block_bytes

    def panels(self, weight: Source, first: int, end: int, rounding: Rounding = nearest) -> np.ndarray:
        """Some panels, packed."""
        if self.swiglu:
            half = self.num_rows // 2
            parts = [self._rows(weight, first * HALF, end * HALF, start, start + half) for start in (0, half)]
            # Sixteen of the gate, sixteen of the up projection, and so on.
            rows = np.stack([part.reshape(-1, HALF, self.width) for part in parts], axis=1)
        else:
            rows = self._rows(weight, first * COLUMNS, end * COLUMNS, 0, self.num_rows)
        return pack(*self._quantise(weight.name, rows.reshape(-1, self.width), rounding), self.bits)

    def vector(self, values: np.ndarray) -> np.ndarray:
        """One value a row of the matrix, in the panels' order: [num_panels, 32]."""
        parts = np.split(values, 2) if self.swiglu else [values]
        size = COLUMNS // len(parts)
        padded = [np.pad(part, (0, self.num_panels * size - len(part))).reshape(-1, size) for part in parts]
        return np.concatenate(padded, axis=1)

    def _rows(self, weight: Source, first: int, end: int, start: int, stop: int) -> np.ndarray:
        """Rows from `start + first` on; where those up to `stop` end, zeros."""
        rows = weight.rows(start + first, min(start + end, stop))
        return np.pad(rows, [(0, end - first - len(rows)), (0, 0)])

    def _quantise(self, source: str, rows: np.ndarray, rounding: Rounding) -> tuple[np.ndarray, np.ndarray]:
        """Codes, and scales as they are stored."""
        if self.bits == 4:
            codes, scales = rounding(rows, self.block_size)
            return codes, _stored(source, scales)
        blocks = rows.reshape(len(rows), -1, self.block_size)
        scales = _stored(source, np.abs(blocks).max(axis=-1) / np.float32(127))
        # By the scale that is stored, so that rounding it costs nothing.
        divisors = scales.astype(np.float32)[..., None]
        codes = np.divide(blocks, divisors, out=np.zeros_like(blocks), where=divisors > 0)
        return (np.clip(np.rint(codes), -127, 127) + 128).astype(np.uint8).reshape(rows.shape), scales


def _stored(source: str, scales: np.ndarray) -> np.ndarray:
    largest = np.abs(scales).max(initial=0)
    if largest > np.finfo(SCALE).max:
        raise ExportError(f"{source}: a scale of {largest} is beyond float16: choose --kernel ort")
    return scales.astype(SCALE)


def pack(codes: np.ndarray, scales: np.ndarray, bits: int) -> np.ndarray:
    """Bytes [panels, panel bytes] of codes uint8 [32 panels, K] and scales float16 [32 panels, K / block]."""
    blocks = scales.shape[1]
    parts = codes.reshape(-1, 2, HALF, blocks, codes.shape[1] // blocks // STEP, STEP)
    # From panel, half, column, block, step, k to panel, block, step, half, column, k.
    parts = parts.transpose(0, 3, 4, 1, 2, 5)
    lines = parts[:, :, :, 0] | parts[:, :, :, 1] << 4 if bits == 4 else parts
    lines = lines.reshape(len(parts), blocks, -1)
    tails = np.ascontiguousarray(scales.reshape(-1, COLUMNS, blocks).transpose(0, 2, 1)).view(np.uint8)
    return np.concatenate([lines, tails], axis=-1).reshape(len(parts), -1)
