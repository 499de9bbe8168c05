"""Owns the quantiser's bounds."""

import numpy as np
import pytest

from glm_export.error import ExportError
from glm_export.quantise.quantize import Scheme, search

SCHEMES = [Scheme(bits, block) for bits in (4, 8) for block in (16, 32, 64, 128)]


def matrix(seed=0, shape=(24, 256)):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_error_is_bounded_by_the_step(scheme):
    rows = matrix()
    arrays = scheme.quantize(rows)
    assert {part: array.shape for part, array in arrays.items()} == scheme.shapes(*rows.shape)
    error = np.abs(scheme.dequantize(arrays) - rows).reshape(*arrays["scales"].shape, -1)
    # The search cuts up to 0.14 of a 4-bit range of 15 steps off, and the zero point is rounded.
    steps = 0.5 + 15 * 0.14 + 0.5 if scheme.asymmetric else 0.5
    assert (error <= arrays["scales"][..., None] * steps * 1.0001).all()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_rows_do_not_depend_on_the_chunk(scheme):
    rows = matrix()
    whole = scheme.quantize(rows)
    for part, array in scheme.quantize(rows[5:9]).items():
        np.testing.assert_array_equal(array, whole[part][5:9])


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_zeros_and_constants_are_exact(scheme):
    rows = np.zeros((3, 256), np.float32)
    rows[1] = 0.75
    rows[2] = -3.0
    found = scheme.dequantize(scheme.quantize(rows))
    np.testing.assert_allclose(found, rows, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.007), (4, 0.079)])
def test_relative_error_of_normal_weights(bits, bound):
    rows, scheme = matrix(1), Scheme(bits, 32)
    error = np.linalg.norm(scheme.dequantize(scheme.quantize(rows)) - rows) / np.linalg.norm(rows)
    assert error < bound


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_search_beats_the_plain_range(block_size):
    rows = matrix(3)
    codes, scales, zeros = search(rows, 4, block_size)
    assert codes.max() <= 15
    assert (codes.dtype, zeros.dtype) == (np.uint8, np.uint8)
    blocks = rows.reshape(*scales.shape, block_size)
    offsets = codes.reshape(blocks.shape) - zeros[..., None].astype(np.float32)
    found = ((offsets * scales[..., None] - blocks) ** 2).sum()
    low, high = blocks.min(axis=-1, keepdims=True), blocks.max(axis=-1, keepdims=True)
    step, zero = (high - low) / 15, np.rint(-low * 15 / (high - low))
    plain = (np.clip(np.rint(blocks / step) + zero, 0, 15) - zero) * step
    assert found < 0.97 * ((plain - blocks) ** 2).sum()


def test_weights_of_a_grid_are_found_again():
    """What was quantised once, in blocks of the same size, loses nothing more."""
    scheme = Scheme(4, 32)
    rows = scheme.dequantize(scheme.quantize(matrix(4)))
    again = scheme.dequantize(scheme.quantize(rows))
    assert np.linalg.norm(again - rows) < 0.01 * np.linalg.norm(rows)


def test_block_shrinks_until_it_divides():
    assert Scheme(4, 128).fitted("w", 576) == Scheme(4, 64)
    assert Scheme(4, 128).fitted("w", 13696) == Scheme(4, 128)
    with pytest.raises(ExportError, match="w: rows of 24 values"):
        Scheme(8, 32).fitted("w", 24)


def test_odd_number_of_blocks_pads_the_zero_points():
    rows = matrix(2, (5, 48))
    scheme = Scheme(4, 16)
    arrays = scheme.quantize(rows)
    assert arrays["zeros"].shape == (5, 2)
    assert (arrays["zeros"][:, 1] >> 4 == 0).all()
    assert np.abs(scheme.dequantize(arrays) - rows).max() < 0.3
