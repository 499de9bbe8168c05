//! Owns the inner loops: scores, weights, weighted values, and folding one tile into another.
//!
//! Invariant: each result is one chain of operations in a fixed order (over channels for a score,
//! over keys for a sum or an output) whatever the number of rows, keys or columns computed side by
//! side. That is what makes a row's bits independent of the tile it is computed in.

use super::exp::exp;
use super::kv_cache::{LINE, Rows, prefetch};
use super::simd::{Lanes, Level, MASKED};

/// The rows of a tile: their queries, and what they may see.
#[derive(Clone, Copy)]
pub(super) struct Queries {
    /// `[head_dim][width]`.
    pub(super) query: *const f32,
    pub(super) head_dim: usize,
    /// Of each row: how many of the tile's keys it sees, `[width]`.
    pub(super) visible: *const f32,
    /// Keys that all rows see.
    pub(super) all_visible: usize,
}

/// Scores of `T` vectors of rows with the tile's first `num_keys` keys, `X` at a time, and each
/// row's highest. Scores past `num_keys` are masked, up to a multiple of `X`.
///
/// # Safety
/// `queries` are of width `T * R::NUM`; `scores` has room for `[num_keys rounded up to X]` times that;
/// the keys' rows hold `head_dim` floats. `X` divides 16, and no row sees a key from `num_keys` on.
#[inline(always)]
pub(super) unsafe fn score<R: Lanes, const T: usize, const X: usize>(
    lanes: R,
    queries: Queries,
    keys: &Rows,
    values: &Rows,
    num_keys: usize,
    scores: *mut f32,
) -> [R::Vector; T] {
    let width = T * R::NUM;
    let mut top = [lanes.splat(MASKED); T];
    let mut key = 0;
    while key < num_keys {
        let (row, next, value) = (keys.row(key), keys.row(key + X), values.row(key));
        let mut rows = [row; X];
        for (x, other) in rows.iter_mut().enumerate() {
            *other = row.wrapping_add(x * keys.stride());
        }
        let mut s = [[lanes.splat(0.0); T]; X];
        for c in 0..queries.head_dim {
            if T == 1 && c % LINE == 0 {
                // With few rows the caches' memory is the limit. Ask for the next keys, and for the
                // values of these, which are read in narrow columns that no CPU foresees.
                for x in 0..X {
                    prefetch(next.wrapping_add(x * keys.stride() + c));
                    prefetch(value.wrapping_add(x * keys.stride() + c));
                }
            }
            let mut q = [lanes.splat(0.0); T];
            for (t, q) in q.iter_mut().enumerate() {
                // SAFETY: c < head_dim and t < T, so this is within the queries.
                *q = unsafe { lanes.load(queries.query.add(c * width + t * R::NUM)) };
            }
            for (s, row) in s.iter_mut().zip(rows) {
                // SAFETY: `X` keys from a multiple of `X` on lie in one run of a block, and a row
                // has head_dim floats.
                let k = lanes.splat(unsafe { *row.add(c) });
                for (s, q) in s.iter_mut().zip(q) {
                    *s = lanes.mul_add(q, k, *s);
                }
            }
        }
        for (x, s) in s.into_iter().enumerate() {
            for (t, mut score) in s.into_iter().enumerate() {
                if key + X > queries.all_visible {
                    // SAFETY: t < T, so this is within `visible`.
                    let visible = unsafe { lanes.load(queries.visible.add(t * R::NUM)) };
                    score = lanes.hide(score, lanes.splat((key + x) as f32), visible);
                }
                top[t] = lanes.max(top[t], score);
                // SAFETY: key + x is below num_keys rounded up to X.
                unsafe { lanes.store(scores.add((key + x) * width + t * R::NUM), score) };
            }
        }
        key += X;
    }
    top
}

/// Turns scores into weights relative to each row's `top`, and sums them.
///
/// # Safety
/// `scores` holds `[num_keys][T * R::NUM]` floats.
#[inline(always)]
pub(super) unsafe fn weights<R: Lanes, const T: usize>(
    lanes: R,
    scores: *mut f32,
    num_keys: usize,
    top: [R::Vector; T],
) -> [R::Vector; T] {
    let mut sum = [lanes.splat(0.0); T];
    for key in 0..num_keys {
        for t in 0..T {
            // SAFETY: key < num_keys and t < T.
            unsafe {
                let at = scores.add((key * T + t) * R::NUM);
                let weight = exp(lanes, lanes.sub(lanes.load(at), top[t]));
                sum[t] = lanes.add(sum[t], weight);
                lanes.store(at, weight);
            }
        }
    }
    sum
}

/// Where weighted values go.
#[derive(Clone, Copy)]
pub(super) enum Sink {
    /// A partial result of their own.
    Store { output: *mut f32 },
    /// Folded into what there is: `output * keep + values * take`, per row.
    Fold { output: *mut f32, keep: *const f32, take: *const f32 },
}

/// Values of the tile's first `num_keys` keys, weighted for `width` rows, into `[width][head_dim]`.
///
/// # Safety
/// `weights` holds `[num_keys][width]` floats and the values' rows `head_dim`; the sink's output is
/// `[width][head_dim]`, its factors `[width]`. `A` divides `width`.
#[inline(always)]
pub(super) unsafe fn weigh<L: Level, const A: usize, const B: usize>(
    level: L,
    weights: *const f32,
    width: usize,
    values: &Rows,
    num_keys: usize,
    head_dim: usize,
    sink: Sink,
) {
    let mut column = 0;
    macro_rules! columns {
        ($lanes:expr, $many:expr) => {
            while column + $many * width_of($lanes) <= head_dim {
                let at = Place { width, column, head_dim };
                for row in (0..width).step_by(A) {
                    // SAFETY: the columns and, as A divides width, the rows are within the output.
                    unsafe { strip::<_, A, { $many }>($lanes, weights, values, num_keys, row, at, sink) };
                }
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
    width: usize,
    column: usize,
    head_dim: usize,
}

/// `A` rows from `row` on by `B` vectors of columns.
///
/// # Safety
/// As [`weigh`], for these rows and columns.
#[inline(always)]
unsafe fn strip<C: Lanes, const A: usize, const B: usize>(
    lanes: C,
    weights: *const f32,
    values: &Rows,
    num_keys: usize,
    row: usize,
    at: Place,
    sink: Sink,
) {
    let mut sums = [[lanes.splat(0.0); B]; A];
    let mut key = 0;
    while key < num_keys {
        let run = values.run(key).min(num_keys - key);
        let mut value = values.row(key).wrapping_add(at.column);
        let mut weight = weights.wrapping_add(key * at.width + row);
        for _ in 0..run {
            let mut v = [lanes.splat(0.0); B];
            for (b, v) in v.iter_mut().enumerate() {
                // SAFETY: the caller vouches that these columns are within the row.
                *v = unsafe { lanes.load(value.add(b * C::NUM)) };
            }
            for (a, sums) in sums.iter_mut().enumerate() {
                // SAFETY: row + a < width.
                let w = lanes.splat(unsafe { *weight.add(a) });
                for (sum, v) in sums.iter_mut().zip(v) {
                    *sum = lanes.mul_add(w, v, *sum);
                }
            }
            value = value.wrapping_add(values.stride());
            weight = weight.wrapping_add(at.width);
        }
        key += run;
    }
    for (a, sums) in sums.iter().enumerate() {
        for (b, &sum) in sums.iter().enumerate() {
            let offset = (row + a) * at.head_dim + at.column + b * C::NUM;
            // SAFETY: row + a < width and the columns are below head_dim.
            unsafe {
                match sink {
                    Sink::Store { output } => lanes.store(output.add(offset), sum),
                    Sink::Fold { output, keep, take } => fold_at(
                        lanes,
                        output.add(offset),
                        lanes.splat(*keep.add(row + a)),
                        sum,
                        lanes.splat(*take.add(row + a)),
                    ),
                }
            }
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

/// A row's state that tiles are folded into, and the factors of the latest fold; pointers to `[width]`.
#[derive(Clone, Copy)]
pub(super) struct State {
    pub(super) top: *mut f32,
    pub(super) sum: *mut f32,
    pub(super) keep: *mut f32,
    pub(super) take: *mut f32,
}

impl State {
    /// Folds a vector of rows, from `row` on: highest score and sum.
    ///
    /// # Safety
    /// The pointers are valid for a vector at `row`.
    #[inline(always)]
    pub(super) unsafe fn fold<R: Lanes>(self, lanes: R, row: usize, top: R::Vector, sum: R::Vector) {
        // SAFETY: the caller vouches for it.
        unsafe {
            let old = lanes.load(self.top.add(row));
            let new = lanes.max(old, top);
            let keep = exp(lanes, lanes.sub(old, new));
            let take = exp(lanes, lanes.sub(top, new));
            let sum = lanes.mul_add(lanes.load(self.sum.add(row)), keep, lanes.mul(sum, take));
            lanes.store(self.top.add(row), new);
            lanes.store(self.sum.add(row), sum);
            lanes.store(self.keep.add(row), keep);
            lanes.store(self.take.add(row), take);
        }
    }
}

/// Folds a row's partial result into its output.
///
/// # Safety
/// Both are valid for `head_dim` floats.
#[inline(always)]
pub(super) unsafe fn fold_row<L: Level>(
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
