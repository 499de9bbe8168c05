"""Owns the proof that 4-bit codes are chosen by the stored scale, and that errors are made up for."""

import numpy as np
import pytest

from glm_export.error import ExportError
from glm_export.quantise import rounding
from glm_export.quantise.rounding import Moments, compensated, nearest

BLOCK_SIZES = (32, 64, 128, 256)


def matrix(seed, shape=(24, 256)):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def correlated(seed, width=256, tokens=400):
    """What enters a product: few directions have most of it, and some channels nothing."""
    rows = matrix(seed, (tokens, width // 8)) @ matrix(seed + 1, (width // 8, width)) + matrix(
        seed + 2, (tokens, width)
    )
    rows[:, 40:48] = 0
    return rows


def values(codes, scales):
    offsets = codes.reshape(*scales.shape, -1).astype(np.float32) - 8
    return (offsets * scales[..., None]).reshape(codes.shape)


def by_q4_0(rows, block_size):
    """llama.cpp's rule: the largest weight is exact, and no weight is cut off by more than half a step."""
    blocks = rows.reshape(-1, block_size)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=-1)[:, None], -1)
    scales = largest / -8
    codes = np.minimum(15, np.floor(blocks / scales + 8.5))
    return ((codes - 8) * scales.astype(np.float16)).astype(np.float32).reshape(rows.shape)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_nearest_is_nearest_by_the_scale_that_is_stored(block_size):
    rows = matrix(1)
    codes, scales = nearest(rows, block_size)
    assert codes.dtype == np.uint8
    assert codes.max() <= 15
    np.testing.assert_array_equal(scales, scales.astype(np.float16))
    steps = np.repeat(scales, block_size, axis=1)
    np.testing.assert_array_equal(codes, np.clip(np.rint(rows / steps) + 8, 0, 15))
    assert (scales < 0).any()
    assert (scales > 0).any()


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_nearest_beats_the_rule_of_q4_0_where_weights_are_large(block_size):
    rows = matrix(2)
    found, other = values(*nearest(rows, block_size)), by_q4_0(rows, block_size)
    assert np.square(found - rows).sum() < 0.95 * np.square(other - rows).sum()
    importance = np.abs(rows)
    assert (importance * np.square(found - rows)).sum() < 0.97 * (importance * np.square(other - rows)).sum()


def test_zeros_constants_and_what_is_on_the_grid_are_exact():
    rows = np.zeros((4, 64), np.float32)
    rows[1], rows[2] = 0.75, -3
    rows[3] = np.arange(64) % 16 * 0.125 - 1
    np.testing.assert_array_equal(values(*nearest(rows, 32)), rows)


def test_what_float16_does_not_hold_has_an_infinite_scale():
    rows = np.full((1, 32), 1e7, np.float32)
    _, scales = nearest(rows, 32)
    assert np.isinf(scales).all()


@pytest.mark.parametrize(
    ("block_size", "segment"), [(32, 128), (64, 128), (128, 128), (32, 4096), (128, 4096), (256, 4096)]
)
def test_errors_are_made_up_for(monkeypatch, block_size, segment):
    monkeypatch.setattr(rounding, "SEGMENT", segment)
    rows, entering, others = matrix(3), correlated(4), correlated(4)[:100] + matrix(7, (100, 256))
    moments = Moments.of(entering, block_size)
    assert len(moments) == -(-256 // segment)
    codes, scales = compensated(rows, block_size, moments)
    assert codes.dtype == np.uint8
    assert codes.max() <= 15
    np.testing.assert_array_equal(scales, scales.astype(np.float16))
    plain, found = values(*nearest(rows, block_size)), values(codes, scales)
    # Each weight by itself is further off, the product is nearer: with other inputs of the kind too.
    assert np.linalg.norm(found - rows) > np.linalg.norm(plain - rows)
    for inputs, share in ((entering, 0.75), (others, 0.9)):
        assert np.linalg.norm(inputs @ (found - rows).T) < share * np.linalg.norm(inputs @ (plain - rows).T)


def test_codes_follow_the_rule_column_by_column():
    """By its definition: the nearest code of the weight less what the errors before it call for."""
    rows, entering = matrix(5, (3, 64)), correlated(6, 64)
    (moments,) = Moments.of(entering, 32)
    codes, scales = compensated(rows, 32, [moments])
    errors = values(codes, scales).astype(np.float64) - rows
    for column in range(64):
        wanted = rows[:, column] - errors[:, :column] @ moments.feedback[:column, column]
        exact = wanted / scales[:, column // 32]
        # Half a step, and float32's own error.
        off = np.abs(np.clip(exact, -8, 7) - (codes[:, column] - 8.0))
        assert (off < 0.501).all()


def test_the_factor_is_that_of_the_moments():
    entering = correlated(8, 64)
    (moments,) = Moments.of(entering, 32)
    feedback = moments.feedback.astype(np.float64)
    np.testing.assert_array_equal(np.tril(feedback, -1), 0)
    np.testing.assert_array_equal(np.diag(feedback), 1)
    expected = entering.astype(np.float64).T @ entering
    expected += np.eye(64) * rounding.DAMPINGS[0] * np.diag(expected).mean()
    inverse = np.linalg.inv(feedback)
    diagonal = inverse @ expected @ inverse.T
    off = diagonal - np.diag(np.diag(diagonal))
    assert np.abs(off).max() < 1e-3 * np.abs(np.diag(diagonal)).max()


def test_moments_without_a_factor_are_damped_more(monkeypatch):
    """-1 takes away the trace, which leaves no factor for sure, as float32's error may."""
    entering, found = correlated(12, 64), {}
    for dampings in ((-1.0, 0.1), (0.1,)):
        monkeypatch.setattr(rounding, "DAMPINGS", dampings)
        found[dampings] = Moments(entering)
    first, second = found.values()
    np.testing.assert_array_equal(first.feedback, second.feedback)
    np.testing.assert_array_equal(first.importance, second.importance)
    monkeypatch.setattr(rounding, "DAMPINGS", (-1.0,))
    with pytest.raises(ExportError, match="have no factor"):
        Moments(entering)


def test_rows_do_not_depend_on_the_chunk():
    rows = matrix(9)
    moments = Moments.of(correlated(10), 64)
    for rule in (nearest, lambda part, block_size: compensated(part, block_size, moments)):
        whole = rule(rows, 64)
        for part, array in zip(rule(rows[8:16], 64), whole, strict=True):
            np.testing.assert_allclose(part, array[8:16], rtol=1e-3, atol=0)


def test_a_product_that_nothing_enters_is_rounded_like_any():
    rows = matrix(11)
    codes, scales = compensated(rows, 32, Moments.of(np.zeros((10, 256), np.float32), 32))
    error = np.linalg.norm(values(codes, scales) - rows) / np.linalg.norm(rows)
    assert error < 0.09
