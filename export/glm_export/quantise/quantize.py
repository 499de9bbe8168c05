"""Owns the block quantisation that MatMulNBits reads: rows of float32 in; packed integers, scales, zeros out.

Invariant: every block of a row is quantised by itself, so a matrix may come in chunks of rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from glm_export.error import ExportError

MIN_BLOCK_SIZE = 16
MAX_BLOCK_SIZE = 128
# Ranges tried, in parts of what a block's weights span. A narrower one cuts the ends off and rounds the rest
# finer; four of them come within 0.3 % of the error that eight leave.
SHRINKS = (1.04, 0.98, 0.92, 0.86)


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
        if not self.asymmetric:
            return _symmetric_8(rows.reshape(len(rows), -1, self.block_size))
        codes, scales, zeros = search(rows, self.bits, self.block_size)
        return {
            "packed": pack(codes).reshape(*scales.shape, -1),
            "scales": scales,
            "zeros": pack(zeros),
        }

    def dequantize(self, arrays: dict[str, np.ndarray]) -> np.ndarray:
        """What the kernel makes of the arrays: the measure of the error."""
        packed, scales = arrays["packed"], arrays["scales"].astype(np.float32)
        if self.asymmetric:
            zeros = unpack(arrays["zeros"])[:, : scales.shape[1], None].astype(np.float32)
            blocks = unpack(packed).astype(np.float32) - zeros
        else:
            blocks = packed.astype(np.float32) - 128
        return (blocks * scales[..., None]).reshape(len(packed), -1)


def search(rows: np.ndarray, bits: int, block_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes and scales whose squared error is small: (code - zero) * scale is about the weight.

    Rows are float32 [n, K], K a multiple of the block. Returns codes uint8 [n, K], and scales float32 and
    zeros uint8, both [n, K / block]; codes and zeros are below 2**bits.
    """
    levels = (1 << bits) - 1
    # Blocks along the second axis: every operation then runs over all of them at once.
    blocks = np.ascontiguousarray(rows.reshape(-1, block_size).T)
    # The range includes 0, so that zero is exact and the zero point is one of the codes.
    low, high = np.minimum(blocks.min(axis=0), 0), np.maximum(blocks.max(axis=0), 0)
    inverse = _reciprocal((high - low) / np.float32(levels))
    zeros = np.rint(-low * inverse)

    def offsets(inverse: np.ndarray) -> np.ndarray:
        """Codes less zeros at these steps, into the one buffer."""
        np.add(np.multiply(blocks, inverse, out=codes), zeros, out=codes)
        np.clip(np.rint(codes, out=codes), 0, levels, out=codes)
        return np.subtract(codes, zeros, out=codes)

    codes = np.empty_like(blocks)
    best_gain, best_inverse = np.full_like(inverse, -1), inverse
    for shrink in SHRINKS:
        candidate = inverse / np.float32(shrink)
        along, length = _products(blocks, offsets(candidate))
        # What the best scale takes off the squared error: the codes' share of the weights' length.
        gain = along * along * _reciprocal(length)
        is_better = gain > best_gain
        best_gain = np.where(is_better, gain, best_gain)
        best_inverse = np.where(is_better, candidate, best_inverse)
    along, length = _products(blocks, offsets(best_inverse))
    scales = along * _reciprocal(length)
    codes += zeros
    per_row = (len(rows), -1)
    return (
        codes.T.astype(np.uint8).reshape(rows.shape),
        scales.reshape(per_row),
        zeros.astype(np.uint8).reshape(per_row),
    )


def _products(blocks: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.einsum("kb,kb->b", blocks, codes), np.einsum("kb,kb->b", codes, codes)


def _symmetric_8(blocks: np.ndarray) -> dict[str, np.ndarray]:
    scales = np.abs(blocks).max(axis=-1) / np.float32(127)
    # An all-zero block has no scale; 128 stands for 0 without a zero point.
    packed = np.rint(blocks * _reciprocal(scales)[..., None]) + 128
    return {"packed": packed.astype(np.uint8), "scales": scales}


def _reciprocal(values: np.ndarray) -> np.ndarray:
    return np.divide(1, values, out=np.zeros_like(values), where=values != 0)


def pack(values: np.ndarray) -> np.ndarray:
    """Two 4-bit values a byte along the last axis, the first in the low half."""
    if values.shape[-1] % 2:
        values = np.concatenate([values, np.zeros_like(values[..., :1])], axis=-1)
    pairs = np.ascontiguousarray(values).view("<u2")
    return (pairs | pairs >> 4).astype(np.uint8)


def unpack(packed: np.ndarray) -> np.ndarray:
    """What `pack` packed."""
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
