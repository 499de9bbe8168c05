"""Owns the 8-bit floats that MatMulBlockQuantizedFp8Weight reads: rows of float32 in; codes and scales out.

Invariant: every block of a row is scaled by itself, so a matrix may come in chunks of rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

# Four bits of exponent and three of mantissa, no infinities.
DTYPE = np.dtype(ml_dtypes.float8_e4m3fn)
LARGEST = float(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max)
# What ONNX Runtime's kernels have (1.31.1).
BLOCK_SIZE = 128


@dataclass(frozen=True)
class Fp8Scheme:
    """How many neighbours along K share a scale."""

    block_size: int = BLOCK_SIZE

    def shapes(self, rows: int, width: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the arrays that `quantize` makes of a matrix."""
        return {"codes": (rows, width), "block_scales": (rows, -(-width // self.block_size))}

    def dtypes(self) -> dict[str, np.dtype]:
        """Types of those arrays."""
        return {"codes": DTYPE, "block_scales": np.dtype(np.float32)}

    def quantize(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Quantises whole rows, float32 [n, K]; the keys are those of `shapes`.

        A block's largest weight becomes the largest code: floats lose nothing by large codes, and what is
        too small for the exponent is then as small as can be.
        """
        num_rows, width = rows.shape
        blocks = np.pad(rows, [(0, 0), (0, -width % self.block_size)]).reshape(num_rows, -1, self.block_size)
        scales = (np.abs(blocks).max(axis=-1) / LARGEST).astype(np.float32)
        scales[scales == 0] = 1
        codes = (blocks / scales[..., None]).clip(-LARGEST, LARGEST).astype(DTYPE)
        return {"codes": codes.reshape(num_rows, -1)[:, :width], "block_scales": scales}
