"""Owns how a weight becomes a 4-bit code of QuantizedMatMul: (code - 8) * scale, a float16 scale a block.

Invariant: codes are chosen by the scale as it is stored, and a row depends on no other row.
"""

from __future__ import annotations

from contextlib import suppress

import numpy as np

from glm_export.error import ExportError

LOWEST, HIGHEST = -8, 7
# Scales tried, in parts of the one at which a block's largest weight is exact. A smaller one cuts that weight
# and rounds the rest finer.
SHRINKS = (0.86, 0.92, 0.98, 1.04)
# Weights count alike up to so many times their block's root mean square.
OUTLIER = 1.5
# Added to the diagonal, in parts of its mean: a short text leaves directions in which it says nothing. The
# next is taken where few channels have nearly all, and what float32 gets wrong of them leaves no factor.
DAMPINGS = (0.01, 0.1, 1.0)
# Columns that share their errors. It bounds memory and time where a matrix is very wide.
SEGMENT = 4096


def nearest(rows: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Each weight to the nearest code: codes uint8 [n, K], scales float32 [n, K / block].

    Where all errors count alike, a block's outliers are cut off for the others' sake: the squared error is
    smaller then, and in a trained network the logits are further off. So an outlier counts by its size.
    """
    blocks = np.ascontiguousarray(rows.reshape(-1, block_size).T)
    usual = np.float32(OUTLIER) * np.sqrt(np.einsum("kb,kb->b", blocks, blocks) / np.float32(block_size))
    scales = _scales(blocks, np.maximum(np.abs(blocks), usual))
    codes = _codes(blocks, scales, np.empty_like(blocks))
    return _unsigned(codes.T).reshape(rows.shape), scales.reshape(len(rows), -1)


def compensated(rows: np.ndarray, block_size: int, moments: list[Moments]) -> tuple[np.ndarray, np.ndarray]:
    """As `nearest`, but each column makes up for the errors of those before it, as far as what enters the
    product goes with them: GPTQ's rule, written as QuIP's LDLQ."""
    # Columns along the first axis, since they are taken one by one.
    columns = np.ascontiguousarray(rows.T)
    codes, scales = np.empty_like(columns), np.empty((len(columns) // block_size, len(rows)), np.float32)
    first = 0
    for part in moments:
        end = first + len(part.importance)
        share = slice(first // block_size, end // block_size)
        _compensate(columns[first:end], part, codes[first:end], scales[share])
        first = end
    return _unsigned(codes.T), np.ascontiguousarray(scales.T)


class Moments:
    """Second moments of some of the channels that enter a product, as `compensated` wants them."""

    def __init__(self, entering: np.ndarray) -> None:
        """Of rows float32 [tokens, channels]."""
        moments = (entering.T @ entering).astype(np.float64)
        diagonal = np.einsum("kk->k", moments)
        own = diagonal.copy()
        for damping in DAMPINGS:
            # A channel that is always zero weighs little, but is not left out: a factor must exist.
            diagonal[:] = own + (damping * own.mean() + np.finfo(np.float32).tiny)
            with suppress(np.linalg.LinAlgError):
                # moments = U D U.T with U upper unit triangular, of which the reversed has the usual factor.
                factor = np.linalg.cholesky(moments[::-1, ::-1])[::-1, ::-1]
                break
        else:
            raise ExportError("the second moments of what enters a product have no factor")
        self.importance = diagonal.astype(np.float32)
        self.feedback = (factor / np.diag(factor)).astype(np.float32)

    @classmethod
    def of(cls, entering: np.ndarray, block_size: int) -> list[Moments]:
        """Of all channels, in segments of whole blocks."""
        step = SEGMENT // block_size * block_size
        return [cls(entering[:, first : first + step]) for first in range(0, entering.shape[1], step)]


def _compensate(columns: np.ndarray, moments: Moments, codes: np.ndarray, scales: np.ndarray) -> None:
    """Fills codes and scales of one segment."""
    block_size = len(columns) // len(scales)
    feedback, errors = moments.feedback, np.empty_like(columns)
    for index, first in enumerate(range(0, len(columns), block_size)):
        end = first + block_size
        # Errors of all blocks before at once, those within the block as they arise.
        wanted = columns[first:end] - feedback[:first, first:end].T @ errors[:first]
        scale = scales[index] = _scales(wanted, moments.importance[first:end, None])
        for column in range(first, end):
            value = wanted[column - first] - feedback[first:column, column] @ errors[first:column]
            code = _codes(value, scale, codes[column])
            np.subtract(code * scale, columns[column], out=errors[column])


def _scales(blocks: np.ndarray, importance: np.ndarray) -> np.ndarray:
    """Float32 that float16 holds, one a column of [block, n], or infinite where float16 ends; negative where
    the largest weight is positive, so that it takes the longer side."""
    low, high = blocks.min(axis=0), blocks.max(axis=0)
    exact = np.where(high > -low, high, low) / np.float32(LOWEST)
    codes = np.empty_like(blocks)
    weighted = importance * blocks

    def products(scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        _codes(blocks, scales, codes)
        along = np.einsum("kb,kb->b", weighted, codes)
        np.square(codes, out=codes)
        return along, np.einsum("kb,kb->b", np.broadcast_to(importance, codes.shape), codes)

    best_scales, best_gain = _stored(exact), np.full_like(exact, -np.inf)
    for shrink in SHRINKS:
        along, length = products(exact * np.float32(shrink))
        scales = _stored(along * _reciprocal(length))
        along, length = products(scales)
        # What these codes and this scale take off the error; of an infinite scale it is not a number.
        with np.errstate(invalid="ignore"):
            is_better = (gain := scales * (2 * along - scales * length)) > best_gain
        best_gain = np.where(is_better, gain, best_gain)
        best_scales = np.where(is_better, scales, best_scales)
    return best_scales


def _codes(values: np.ndarray, scales: np.ndarray, out: np.ndarray) -> np.ndarray:
    np.multiply(values, _reciprocal(scales), out=out)
    return np.clip(np.rint(out, out=out), LOWEST, HIGHEST, out=out)


def _unsigned(codes: np.ndarray) -> np.ndarray:
    return (codes - LOWEST).astype(np.uint8)


def _stored(scales: np.ndarray) -> np.ndarray:
    # Beyond float16 is found where the matrix's name is known.
    with np.errstate(over="ignore"):
        return scales.astype(np.float16).astype(np.float32)


def _reciprocal(values: np.ndarray) -> np.ndarray:
    return np.divide(1, values, out=np.zeros_like(values), where=values != 0)
