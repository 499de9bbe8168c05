//! Owns the seam between the walk over key tiles and the arithmetic with each: vectors here, AMX's tiles in
//! [`super::tiles`].
//!
//! Invariant: a row's results depend on the row, on keys and values and on their absolute positions only,
//! not on the rows beside it.

use super::element::Element;
use super::kernels::{self, Rows, Sink};
use super::kv_cache::{Runs, TILE};
use super::lanes::Registers;
use super::plan::ROWS;

/// The two products of a row tile with a key tile: of queries with keys, which become weights, and of weights
/// with values.
pub(super) trait Products<E>: Copy {
    /// Floats of working memory.
    fn num_floats(width: usize, head_dim: usize) -> usize;

    /// Readies the queries for all key tiles to come.
    ///
    /// # Safety
    /// The rows' pointers are valid for `width` rows, here and below.
    unsafe fn begin(self, _rows: &Rows) {}

    /// Weights of the tile's first `num_keys` keys, into the working memory; of each row the highest score and
    /// the sum of the weights, which are relative to it, go to `tops` and `sums`, `[width]`.
    ///
    /// # Safety
    /// The runs' blocks have `head_dim` channels, and no row sees a key from `num_keys` on.
    unsafe fn weights(&self, rows: &Rows, runs: &Runs<E>, num_keys: usize, tops: *mut f32, sums: *mut f32);

    /// Values of the same keys, by these weights.
    ///
    /// # Safety
    /// As [`Self::weights`], which was called for these; the sink is for these rows.
    unsafe fn weigh(&self, rows: &Rows, runs: &Runs<E>, num_keys: usize, sink: Sink);
}

/// Products in vectors: `A` rows at a time with `B` vectors of keys or columns, and the last rows, if they are
/// fewer, [`ROWS`] at a time with `C` vectors.
#[derive(Clone, Copy)]
pub(super) struct Vectors<L, const A: usize, const B: usize, const C: usize>(pub(super) L);

impl<L: Registers, E: Element, const A: usize, const B: usize, const C: usize> Products<E>
    for Vectors<L, A, B, C>
{
    fn num_floats(width: usize, _head_dim: usize) -> usize {
        width * TILE
    }

    #[inline(always)]
    unsafe fn weights(&self, rows: &Rows, runs: &Runs<E>, num_keys: usize, tops: *mut f32, sums: *mut f32) {
        const { assert!(A.is_multiple_of(ROWS)) };
        let lanes = self.0.wide();
        // SAFETY: the caller vouches for all of it; the working memory is the scores'.
        unsafe {
            let mut row = 0;
            while row + A <= rows.width {
                kernels::score::<_, _, A, B>(lanes, rows, row, runs, num_keys);
                row += A;
            }
            while row < rows.width {
                kernels::score::<_, _, ROWS, C>(lanes, rows, row, runs, num_keys);
                row += ROWS;
            }
            for row in 0..rows.width {
                let (top, sum) = kernels::weights(lanes, rows.work.add(row * TILE), num_keys);
                tops.add(row).write(top);
                sums.add(row).write(sum);
            }
        }
    }

    #[inline(always)]
    unsafe fn weigh(&self, rows: &Rows, runs: &Runs<E>, num_keys: usize, sink: Sink) {
        // SAFETY: the caller vouches for all of it.
        unsafe {
            let mut row = 0;
            while row + A <= rows.width {
                kernels::weigh::<_, _, A, B>(self.0, rows, row, runs, num_keys, sink);
                row += A;
            }
            while row < rows.width {
                kernels::weigh::<_, _, ROWS, C>(self.0, rows, row, runs, num_keys, sink);
                row += ROWS;
            }
        }
    }
}
