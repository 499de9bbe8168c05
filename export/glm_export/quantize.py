"""Owns the block quantisation that MatMulNBits reads: rows of float32 in; packed integers, scales, zeros out.

Invariant: every block of a row is quantised by itself, so a matrix may come in chunks of rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from glm_export.error import ExportError

MIN_BLOCK_SIZE = 16


@dataclass(frozen=True)
class Scheme:
    """Bits an element takes, and how many neighbours along K share a scale."""

    bits: int
    block_size: int

    @property
    def asymmetric(self) -> bool:
        """Whether a block has a zero point of its own. At 8 bits it buys nothing measurable."""
        return self.bits == 4

    def fitted(self, name: str, width: int) -> Scheme:
        """The scheme with the largest block, up to this one's, that divides the width of a matrix."""
        block_size = self.block_size
        while block_size >= MIN_BLOCK_SIZE:
            if width % block_size == 0:
                return Scheme(self.bits, block_size)
            block_size //= 2
        raise ExportError(f"{name}: rows of {width} values are not a multiple of {MIN_BLOCK_SIZE}")

    def shapes(self, rows: int, width: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the arrays that `quantize` makes of a matrix."""
        blocks = width // self.block_size
        shapes: dict[str, tuple[int, ...]] = {
            "packed": (rows, blocks, self.block_size * self.bits // 8),
            "scales": (rows, blocks),
        }
        if self.asymmetric:
            shapes["zeros"] = (rows, (blocks * self.bits + 7) // 8)
        return shapes

    def quantize(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Quantises whole rows; the keys are those of `shapes`."""
        blocks = rows.reshape(len(rows), -1, self.block_size)
        return _asymmetric_4(blocks) if self.asymmetric else _symmetric_8(blocks)

    def dequantize(self, arrays: dict[str, np.ndarray]) -> np.ndarray:
        """What the kernel makes of the arrays: the measure of the error."""
        packed, scales = arrays["packed"], arrays["scales"]
        if self.asymmetric:
            zeros = _unpack(arrays["zeros"])[:, : scales.shape[1], None].astype(np.float32)
            blocks = _unpack(packed).astype(np.float32) - zeros
        else:
            blocks = packed.astype(np.float32) - 128
        return (blocks * scales[..., None]).reshape(len(packed), -1)


def _symmetric_8(blocks: np.ndarray) -> dict[str, np.ndarray]:
    scales = np.abs(blocks).max(axis=-1) / np.float32(127)
    # An all-zero block has no scale; 128 stands for 0 without a zero point.
    packed = np.rint(blocks * _reciprocal(scales)[..., None]) + 128
    return {"packed": packed.astype(np.uint8), "scales": scales}


def _asymmetric_4(blocks: np.ndarray) -> dict[str, np.ndarray]:
    # The range includes 0, so that zero is exact and the zero point fits in 4 bits.
    low = np.minimum(blocks.min(axis=-1), 0)
    high = np.maximum(blocks.max(axis=-1), 0)
    scales = (high - low) / np.float32(15)
    inverse = _reciprocal(scales)
    zeros = np.rint(-low * inverse)
    values = np.clip(np.rint(blocks * inverse[..., None]) + zeros[..., None], 0, 15)
    return {"packed": _pack(values), "scales": scales, "zeros": _pack(zeros)}


def _reciprocal(scales: np.ndarray) -> np.ndarray:
    return np.divide(1, scales, out=np.zeros_like(scales), where=scales > 0)


def _pack(values: np.ndarray) -> np.ndarray:
    """Two 4-bit values a byte along the last axis, the first in the low half."""
    values = values.astype(np.uint8)
    if values.shape[-1] % 2:
        values = np.concatenate([values, np.zeros_like(values[..., :1])], axis=-1)
    return values[..., 0::2] | values[..., 1::2] << 4


def _unpack(packed: np.ndarray) -> np.ndarray:
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
