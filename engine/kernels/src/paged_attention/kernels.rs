//! Owns the inner loops: scores, weights, weighted values, and folding one tile into another.
//!
//! Invariant: each result is one chain of operations in a fixed order (over channels for a score,
//! over keys for an output) or, for what is reduced over keys, 16 such chains that are combined by halving, whatever
//! the number of rows, keys or columns computed side by side. That is what makes a row's bits independent of the
//! tile it is computed in and of the instruction set.

use super::element::Element;
use super::exp::exp;
use super::kv_cache::{RUN, Runs, TILE, prefetch};
use super::lanes::{Lanes, MASKED, Registers};
#[cfg(doc)]
use super::plan::ROWS;

/// The rows of a row tile.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    /// How many, a multiple of [`ROWS`].
    pub(super) width: usize,
    pub(super) head_dim: usize,
    /// Queries, `[width][head_dim]`.
    pub(super) query: *const f32,
    /// Of each row: how many of the key tile's keys it sees, `[width]`.
    pub(super) visible: *const f32,
    /// Memory for what is between the two products, as much as the products need.
    pub(super) work: *mut f32,
}

/// Lanes that sums and maxima over keys have at every level, in as many registers as it takes.
const LANES: usize = 16;
/// Registers that hold them at most.
const MAX_REGISTERS: usize = LANES / 4;

/// Scores of `A` rows from `row` on with the tile's first `num_keys` keys, `B` vectors of them at a time,
/// into the working memory, `[width][TILE]`. What a row does not see is masked, up to a multiple of 16 keys and of
/// `B` vectors.
///
/// # Safety
/// There are `row + A` rows, and no row sees a key from `num_keys` on; the working memory has room for the
/// scores, and the runs' blocks for `head_dim` channels. `B` vectors divide a tile.
#[inline(always)]
pub(super) unsafe fn score<L: Lanes, E: Element, const A: usize, const B: usize>(
    lanes: L,
    rows: &Rows,
    row: usize,
    runs: &Runs<E>,
    num_keys: usize,
) {
    let Rows { query, head_dim, visible, work: scores, .. } = *rows;
    let query = query.wrapping_add(row * head_dim);
    for first in (0..num_keys.next_multiple_of(LANES)).step_by(B * L::NUM) {
        let mut keys = [runs.keys[0]; B];
        let mut values = [runs.values[0]; B];
        let mut next = [runs.keys[0]; B];
        for b in 0..B {
            let key = first + b * L::NUM;
            keys[b] = runs.keys[key / RUN].wrapping_add(key % RUN);
            values[b] = runs.values[key / RUN].wrapping_add(key % RUN * head_dim);
            let after = (key + B * L::NUM).min(TILE);
            next[b] = runs.keys[after / RUN].wrapping_add(after % RUN);
        }
        let mut sums = [[lanes.splat(0.0); B]; A];
        for channel in 0..head_dim {
            let mut k = [lanes.splat(0.0); B];
            for b in 0..B {
                let at = channel * runs.block_size;
                if row == 0 {
                    // With few rows the caches' memory is the limit. Ask for the next keys, and for
                    // the values of these.
                    prefetch(next[b].wrapping_add(at));
                    prefetch(values[b].wrapping_add(channel * L::NUM));
                }
                // SAFETY: a vector of keys lies in one run, and the run's block has every channel.
                k[b] = unsafe { E::load(lanes, keys[b].wrapping_add(at)) };
            }
            for (a, sums) in sums.iter_mut().enumerate() {
                // SAFETY: row + a is a row of the queries.
                let q = lanes.splat(unsafe { *query.add(a * head_dim + channel) });
                for (sum, k) in sums.iter_mut().zip(k) {
                    *sum = lanes.mul_add(q, k, *sum);
                }
            }
        }
        for (a, sums) in sums.into_iter().enumerate() {
            // SAFETY: row + a is a row of the queries, and the keys are below TILE.
            unsafe {
                let visible = lanes.splat(*visible.add(row + a));
                for (b, sum) in sums.into_iter().enumerate() {
                    let key = first + b * L::NUM;
                    let position = lanes.add(lanes.iota(), lanes.splat(key as f32));
                    lanes.store(scores.add((row + a) * TILE + key), lanes.hide(sum, position, visible));
                }
            }
        }
    }
}

/// Turns a row's scores, `[TILE]`, into weights relative to the highest of the first `num_keys`; returns
/// that and the sum of the weights.
///
/// # Safety
/// `scores` holds `num_keys` floats, rounded up to 16, those from `num_keys` on masked.
#[inline(always)]
pub(super) unsafe fn weights<L: Lanes>(lanes: L, scores: *mut f32, num_keys: usize) -> (f32, f32) {
    let num_registers = LANES / L::NUM;
    let mut tops = [lanes.splat(MASKED); MAX_REGISTERS];
    for key in (0..num_keys).step_by(LANES) {
        for (i, top) in tops.iter_mut().enumerate().take(num_registers) {
            // SAFETY: the caller vouches for the scores.
            *top = lanes.max(*top, unsafe { lanes.load(scores.add(key + i * L::NUM)) });
        }
    }
    let top = reduce(lanes, tops, |a, b| if a > b { a } else { b });
    let mut sums = [lanes.splat(0.0); MAX_REGISTERS];
    for key in (0..num_keys).step_by(LANES) {
        for (i, sum) in sums.iter_mut().enumerate().take(num_registers) {
            // SAFETY: as above.
            unsafe {
                let score = scores.add(key + i * L::NUM);
                let weight = exp(lanes, lanes.sub(lanes.load(score), lanes.splat(top)));
                *sum = lanes.add(*sum, weight);
                lanes.store(score, weight);
            }
        }
    }
    (top, reduce(lanes, sums, |a, b| a + b))
}

/// 16 lanes as one, halving in a fixed order; they are in as many registers as it takes at this level.
#[inline(always)]
pub(super) fn reduce<L: Lanes>(
    lanes: L,
    registers: [L::Vector; MAX_REGISTERS],
    f: impl Fn(f32, f32) -> f32,
) -> f32 {
    let mut parts = [0f32; LANES];
    for (part, register) in parts.chunks_exact_mut(L::NUM).zip(registers) {
        // SAFETY: the part has room for a vector.
        unsafe { lanes.store(part.as_mut_ptr(), register) };
    }
    let mut len = LANES;
    while len > 1 {
        len /= 2;
        for i in 0..len {
            parts[i] = f(parts[i], parts[i + len]);
        }
    }
    parts[0]
}

/// Where weighted values go.
#[derive(Clone, Copy)]
pub(super) enum Sink {
    /// A partial result of their own.
    Store { output: *mut f32 },
    /// Folded into what there is: `output * keep + values * take`, per row.
    Fold { output: *mut f32, keep: *const f32, take: *const f32 },
}

impl Sink {
    /// Writes a vector of `row`'s sums, `offset` floats from the output's start.
    ///
    /// # Safety
    /// The output is valid for a vector there, the factors for the row.
    #[inline(always)]
    pub(super) unsafe fn put<C: Lanes>(self, lanes: C, row: usize, offset: usize, sum: C::Vector) {
        // SAFETY: the caller vouches for it.
        unsafe {
            match self {
                Self::Store { output } => lanes.store(output.add(offset), sum),
                Self::Fold { output, keep, take } => {
                    let (keep, take) = (lanes.splat(*keep.add(row)), lanes.splat(*take.add(row)));
                    fold_at(lanes, output.add(offset), keep, sum, take);
                }
            }
        }
    }
}

/// Values of the tile's first `num_keys` keys, weighted for `A` rows from `row` on, into
/// `[width][head_dim]`.
///
/// # Safety
/// The working memory holds weights, `[width][TILE]`, and the runs' values `head_dim` channels; the sink's output
/// is `[width][head_dim]`, its factors `[width]`, with `row + A` rows.
#[inline(always)]
pub(super) unsafe fn weigh<L: Registers, E: Element, const A: usize, const B: usize>(
    level: L,
    rows: &Rows,
    row: usize,
    runs: &Runs<E>,
    num_keys: usize,
    sink: Sink,
) {
    let Rows { head_dim, work: weights, .. } = *rows;
    let mut column = 0;
    macro_rules! columns {
        ($lanes:expr, $many:expr) => {
            while column + $many * width_of($lanes) <= head_dim {
                let at = Place { row, column, head_dim };
                // SAFETY: the columns and the rows are within the output.
                unsafe { strip::<_, E, A, { $many }>($lanes, weights, runs, num_keys, at, sink) };
                column += $many * width_of($lanes);
            }
        };
    }
    columns!(level.wide(), B);
    columns!(level.wide(), 1);
    columns!(level.narrow(), 1);
    columns!(level.single(), 1);
}

#[inline(always)]
fn width_of<C: Lanes>(_: C) -> usize {
    C::NUM
}

#[derive(Clone, Copy)]
struct Place {
    row: usize,
    column: usize,
    head_dim: usize,
}

/// `A` rows by `B` vectors of columns.
///
/// # Safety
/// As [`weigh`], for these rows and columns.
#[inline(always)]
unsafe fn strip<C: Lanes, E: Element, const A: usize, const B: usize>(
    lanes: C,
    weights: *const f32,
    runs: &Runs<E>,
    num_keys: usize,
    at: Place,
    sink: Sink,
) {
    let mut sums = [[lanes.splat(0.0); B]; A];
    let mut weight = weights.wrapping_add(at.row * TILE);
    for (run, first) in (0..num_keys).step_by(RUN).enumerate() {
        let mut value = runs.values[run].wrapping_add(at.column);
        for _ in first..num_keys.min(first + RUN) {
            let mut v = [lanes.splat(0.0); B];
            for (b, v) in v.iter_mut().enumerate() {
                // SAFETY: the caller vouches that these columns are within the value.
                *v = unsafe { E::load(lanes, value.add(b * C::NUM)) };
            }
            for (a, sums) in sums.iter_mut().enumerate() {
                // SAFETY: at.row + a is a row of the weights.
                let w = lanes.splat(unsafe { *weight.add(a * TILE) });
                for (sum, v) in sums.iter_mut().zip(v) {
                    *sum = lanes.mul_add(w, v, *sum);
                }
            }
            value = value.wrapping_add(at.head_dim);
            weight = weight.wrapping_add(1);
        }
    }
    for (a, sums) in sums.iter().enumerate() {
        for (b, &sum) in sums.iter().enumerate() {
            let row = at.row + a;
            let offset = row * at.head_dim + at.column + b * C::NUM;
            // SAFETY: the row and the columns are within the output.
            unsafe { sink.put(lanes, row, offset, sum) };
        }
    }
}

/// # Safety
/// `output` is valid for a vector.
#[inline(always)]
unsafe fn fold_at<C: Lanes>(lanes: C, output: *mut f32, keep: C::Vector, tile: C::Vector, take: C::Vector) {
    // SAFETY: the caller vouches for it.
    unsafe {
        let folded = lanes.mul_add(lanes.load(output), keep, lanes.mul(tile, take));
        lanes.store(output, folded);
    }
}

/// Each row's state that tiles are folded into, and the factors of the latest fold; pointers to
/// `[width]`.
#[derive(Clone, Copy)]
pub(super) struct State {
    pub(super) top: *mut f32,
    pub(super) sum: *mut f32,
    pub(super) keep: *mut f32,
    pub(super) take: *mut f32,
}

impl State {
    /// Folds a tile's highest scores and sums, `[width]`, into all rows.
    ///
    /// # Safety
    /// The pointers are valid for `width` floats, a multiple of 4.
    #[inline(always)]
    pub(super) unsafe fn fold<L: Registers>(
        self,
        level: L,
        width: usize,
        tops: *const f32,
        sums: *const f32,
    ) {
        let lanes = level.narrow();
        for row in (0..width).step_by(4) {
            // SAFETY: the caller vouches for it.
            unsafe {
                let (old, top) = (lanes.load(self.top.add(row)), lanes.load(tops.add(row)));
                let new = lanes.max(old, top);
                let keep = exp(lanes, lanes.sub(old, new));
                let take = exp(lanes, lanes.sub(top, new));
                let sum = lanes.mul(lanes.load(sums.add(row)), take);
                lanes.store(self.sum.add(row), lanes.mul_add(lanes.load(self.sum.add(row)), keep, sum));
                lanes.store(self.top.add(row), new);
                lanes.store(self.keep.add(row), keep);
                lanes.store(self.take.add(row), take);
            }
        }
    }
}

/// Folds a row's partial result into its output.
///
/// # Safety
/// Both are valid for `head_dim` floats.
#[inline(always)]
pub(super) unsafe fn fold_row<L: Registers>(
    level: L,
    output: *mut f32,
    keep: f32,
    partial: *const f32,
    take: f32,
    head_dim: usize,
) {
    let mut column = 0;
    macro_rules! columns {
        ($lanes:expr) => {
            let lanes = $lanes;
            while column + width_of(lanes) <= head_dim {
                // SAFETY: the columns are below head_dim.
                unsafe {
                    let tile = lanes.load(partial.add(column));
                    fold_at(lanes, output.add(column), lanes.splat(keep), tile, lanes.splat(take));
                }
                column += width_of(lanes);
            }
        };
    }
    columns!(level.wide());
    columns!(level.narrow());
    columns!(level.single());
}
