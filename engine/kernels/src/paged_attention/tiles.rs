//! Owns the products of a row tile with a key tile in AMX's tiles of bfloat16.
//!
//! The caches' numbers are bfloat16 as it is. Queries and weights are split into two that add up to them, so
//! little is lost: a query or a weight keeps 16 bits or more. For one left side, 16 rows:
//!
//! ```text
//! [head_dim / 32 or TILE / 32][high, low][16 rows][32 channels or keys]
//! ```
//!
//! Invariant: as in [`super::products`]; sums are over 32 channels or keys at a time, from multiples of 32 on,
//! in order. Rows of a tile beyond `width` hold any numbers, which nobody reads.

use std::arch::x86_64::{__m512, __m512i};

use ort::value::TensorElementType;

use super::attend::{Job, attend};
use super::batch::{Geometry, MAX_HEAD_DIM};
use super::element::Element;
use super::exp::exp;
use super::kernels::{self, Rows, Sink};
use super::kv_cache::{RUN, Runs, TILE};
use super::lanes::{Lanes, MASKED, Registers};
use super::level::Level;
use super::plan::Task;
use super::products::Products;
use super::simd::amx::{ACROSS, Amx, Right};
use super::workspace::Scratch;
use crate::amx::{self, HEIGHT, ROW, Shapes};

/// Numbers of a tile's row: channels of a score, keys of an output.
const DEPTH: usize = 32;
/// Columns of a tile.
const COLUMNS: usize = 16;
/// Columns of a product: keys of scores, channels of outputs.
const WIDTH: usize = ACROSS * COLUMNS;
/// Bytes of a whole tile.
const TILE_BYTES: usize = HEIGHT * ROW;
/// With more rows than this memory is not the limit, and nothing is asked for ahead of its use.
const MAX_FEW: usize = HEIGHT;
/// Floats of a cache line.
const LINE: usize = 16;
/// Floats that one part of a left side takes: lines of high and low parts.
const PART: usize = 2 * HEIGHT * LINE;

/// Whether tiles multiply what a cache of this geometry holds.
pub(super) fn suit<E: Element>(geometry: &Geometry) -> bool {
    matches!(E::TYPE, TensorElementType::Bfloat16) && geometry.head_dim.is_multiple_of(WIDTH)
}

/// Products in tiles.
#[derive(Clone, Copy)]
pub(super) struct Tiles(pub(super) Amx);

impl Level for Amx {
    fn attend<E: Element>(self, job: &Job<E>, task: Task, scratch: &mut Scratch) {
        #[target_feature(enable = "avx2,fma,avx512f,avx512vl,avx512bw,avx512dq,avx512bf16")]
        fn compiled<E: Element>(level: Amx, job: &Job<E>, task: Task, scratch: &mut Scratch) {
            let shapes = Shapes::new((0..8).map(|tile| (tile, ROW, HEIGHT)));
            // SAFETY: `level` is the proof that there is AMX; all eight tiles are whole, and released below.
            unsafe { shapes.load() };
            attend(level, Tiles(level), job, task, scratch);
            // SAFETY: they were set up above.
            unsafe { amx::release() };
        }
        match job.cache.in_tiles() {
            // SAFETY: `self` is the proof that this CPU has these features.
            true => unsafe { compiled(self, job, task, scratch) },
            false => self.0.attend(job, task, scratch),
        }
    }
}

/// The working memory, cut up.
struct Work {
    /// The queries' left sides, one for each 16 rows.
    queries: *mut f32,
    /// The weights', likewise.
    weights: *mut f32,
    /// Results: scores, `[width][TILE]`, or values of 16 rows, `[16][WIDTH]`.
    results: *mut f32,
    /// Values of the key tile that don't lie together: for each 32 keys `[head_dim / 16][16][16 channels][2]`.
    values: *mut f32,
    num_floats: usize,
}

impl Work {
    fn new(start: *mut f32, width: usize, head_dim: usize) -> Self {
        let num_left = width.div_ceil(HEIGHT);
        let weights = num_left * head_dim / DEPTH * PART;
        let results = weights + num_left * TILE / DEPTH * PART;
        let values = results + num_left * HEIGHT * TILE;
        Self {
            queries: start,
            weights: start.wrapping_add(weights),
            results: start.wrapping_add(results),
            values: start.wrapping_add(values),
            num_floats: values + TILE * head_dim / 2,
        }
    }
}

impl Tiles {
    /// Splits 32 numbers of `row` into their place in a part of a left side.
    ///
    /// # Safety
    /// `part` is valid for a part.
    #[inline(always)]
    unsafe fn split(self, numbers: [__m512; 2], part: *mut f32, row: usize) {
        // SAFETY: the caller vouches for it; a line is as long as a register.
        unsafe {
            let [high, low] = self.0.split(numbers);
            let to = part.add(row % HEIGHT * LINE).cast::<__m512i>();
            to.write(high);
            to.add(HEIGHT).write(low);
        }
    }

    /// Turns a row's scores with `num_keys` keys, of which it sees the first `visible`, into weights, split into
    /// the row's place in parts of a left side. Returns the highest score and the sum of the weights.
    ///
    /// # Safety
    /// `scores` is valid for `num_keys` floats, rounded up to 32, and `parts` for as many.
    #[inline(always)]
    unsafe fn soften(
        self,
        scores: *mut f32,
        visible: f32,
        num_keys: usize,
        parts: *mut f32,
        row: usize,
    ) -> (f32, f32) {
        let lanes = self.0.wide();
        let mut tops = [lanes.splat(MASKED); 2];
        for key in (0..num_keys).step_by(DEPTH) {
            for (half, top) in tops.iter_mut().enumerate() {
                let key = key + half * LINE;
                // SAFETY: the caller vouches for the scores.
                unsafe {
                    let mut score = lanes.load(scores.add(key));
                    if visible < (key + LINE) as f32 {
                        let position = lanes.add(lanes.iota(), lanes.splat(key as f32));
                        score = lanes.hide(score, position, lanes.splat(visible));
                        lanes.store(scores.add(key), score);
                    }
                    *top = lanes.max(*top, score);
                }
            }
        }
        let top = kernels::reduce(lanes, [lanes.max(tops[0], tops[1]); _], |a, b| if a > b { a } else { b });
        let mut sums = [lanes.splat(0.0); 2];
        for key in (0..num_keys).step_by(DEPTH) {
            // SAFETY: the caller vouches for scores and parts.
            unsafe {
                let mut weights = [lanes.splat(0.0); 2];
                for (half, weight) in weights.iter_mut().enumerate() {
                    let score = lanes.load(scores.add(key + half * LINE));
                    *weight = exp(lanes, lanes.sub(score, lanes.splat(top)));
                    sums[half] = lanes.add(sums[half], *weight);
                }
                self.split(weights, parts.add(key / DEPTH * PART), row);
            }
        }
        (top, kernels::reduce(lanes, [lanes.add(sums[0], sums[1]); _], |a, b| a + b))
    }

    /// Where the tiles of each 32 of the first `num_keys` values start, and bytes from one to that of the next
    /// channels; zeros follow the last. What does not lie like this is copied to `to`: it crosses the end of a
    /// block, or is fewer than 32.
    ///
    /// # Safety
    /// As [`Products::weigh`]; `to` has room for a key tile's values.
    #[inline(always)]
    unsafe fn values<E>(
        self,
        runs: &Runs<E>,
        num_keys: usize,
        head_dim: usize,
        to: *mut f32,
    ) -> [(*const u8, usize); TILE / DEPTH] {
        let stride = runs.block_size / 2 * ROW;
        let mut starts = [(std::ptr::null(), stride); _];
        for (i, start) in starts.iter_mut().enumerate().take(num_keys.div_ceil(DEPTH)) {
            let [first, second] = [runs.values[2 * i].cast::<u8>(), runs.values[2 * i + 1].cast()];
            start.0 = first;
            let num_keys = num_keys - i * DEPTH;
            if num_keys >= DEPTH && second == first.wrapping_add(RUN / 2 * ROW) {
                continue;
            }
            let to = to.wrapping_add(i * DEPTH / 2 * head_dim).cast::<u8>();
            for (tile, pair) in
                (0..head_dim / COLUMNS).flat_map(|tile| (0..HEIGHT).map(move |pair| (tile, pair)))
            {
                let run = if pair < RUN / 2 { first } else { second };
                let from = run.wrapping_add(tile * stride + pair % (RUN / 2) * ROW).cast::<__m512i>();
                let to = to.wrapping_add((tile * HEIGHT + pair) * ROW).cast::<__m512i>();
                // SAFETY: a run has 8 pairs of as many channels, and `to` room for 16.
                unsafe { to.write(self.0.first_of_pairs(from, num_keys.saturating_sub(2 * pair))) };
            }
            *start = (to, TILE_BYTES);
        }
        starts
    }
}

impl<E: Element> Products<E> for Tiles {
    fn num_floats(width: usize, head_dim: usize) -> usize {
        Work::new(std::ptr::null_mut(), width, head_dim).num_floats
    }

    #[inline(always)]
    unsafe fn begin(self, rows: &Rows) {
        let Rows { width, head_dim, query, work, .. } = *rows;
        let queries = Work::new(work, width, head_dim).queries;
        let (lanes, num_parts) = (self.0.wide(), head_dim / DEPTH);
        for row in 0..width {
            for i in 0..num_parts {
                // SAFETY: the row has these channels, and the queries a part for them.
                unsafe {
                    let part = queries.add((row / HEIGHT * num_parts + i) * PART);
                    let from = query.add(row * head_dim + i * DEPTH);
                    self.split([lanes.load(from), lanes.load(from.add(LINE))], part, row);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn weights(&self, rows: &Rows, runs: &Runs<E>, num_keys: usize, tops: *mut f32, sums: *mut f32) {
        let Rows { width, head_dim, visible, work, .. } = *rows;
        let Work { queries, weights, results, .. } = Work::new(work, width, head_dim);
        let num_parts = head_dim / DEPTH;
        let value_stride = runs.block_size / 2 * ROW;
        let num_ahead = if width > MAX_FEW { 0 } else { num_parts };
        for key in (0..num_keys).step_by(WIDTH) {
            let mut right: [Right; MAX_HEAD_DIM / DEPTH] = [[std::ptr::null(); _]; _];
            let mut ahead = right;
            for (i, (right, ahead)) in right.iter_mut().zip(&mut ahead).enumerate().take(num_parts) {
                for (tile, (at, ahead)) in right.iter_mut().zip(ahead).enumerate() {
                    let run = key / RUN + tile;
                    *at = runs.keys[run].cast::<u8>().wrapping_add(i * TILE_BYTES);
                    // These keys' values: two runs share each tile of channels.
                    let values = runs.values[run / 2 * 2].cast::<u8>();
                    *ahead = values.wrapping_add((2 * i + run % 2) * value_stride);
                }
            }
            for left in 0..width.div_ceil(HEIGHT) {
                // SAFETY: the queries were split; runs have a pair of each channel for 16 keys, and the results
                // hold a whole number of products.
                unsafe {
                    let queries = queries.add(left * num_parts * PART);
                    let to = results.add(left * HEIGHT * TILE + key);
                    self.0.multiply(
                        queries,
                        &right[..num_parts],
                        &ahead[..num_ahead],
                        to,
                        TILE * size_of::<f32>(),
                    );
                }
            }
        }
        for row in 0..width {
            // SAFETY: the results have the row's scores, and the weights a part for each 32 of them.
            unsafe {
                let part = weights.add(row / HEIGHT * (TILE / DEPTH) * PART);
                let (top, sum) = self.soften(results.add(row * TILE), *visible.add(row), num_keys, part, row);
                tops.add(row).write(top);
                sums.add(row).write(sum);
            }
        }
    }

    #[inline(always)]
    unsafe fn weigh(&self, rows: &Rows, runs: &Runs<E>, num_keys: usize, sink: Sink) {
        let Rows { width, head_dim, work, .. } = *rows;
        let Work { weights, results, values, .. } = Work::new(work, width, head_dim);
        let lanes = self.0.wide();
        // SAFETY: the caller vouches for the runs.
        let values = unsafe { self.values(runs, num_keys, head_dim, values) };
        let num_parts = num_keys.div_ceil(DEPTH);
        let num_ahead = if width > MAX_FEW { 0 } else { num_parts };
        for column in (0..head_dim).step_by(WIDTH) {
            let right: [Right; TILE / DEPTH] = values.map(|(start, stride)| {
                std::array::from_fn(|tile| start.wrapping_add((column / COLUMNS + tile) * stride))
            });
            // As many channels of the next key tile.
            let ahead: [Right; TILE / DEPTH] = std::array::from_fn(|i| {
                std::array::from_fn(|tile| {
                    let run = runs.keys[TILE / RUN + 2 * i + tile % 2].cast::<u8>();
                    run.wrapping_add((column / DEPTH + tile / 2) * TILE_BYTES)
                })
            });
            for left in 0..width.div_ceil(HEIGHT) {
                // SAFETY: the weights were split; each 32 keys have pairs of values of each channel.
                unsafe {
                    let weights = weights.add(left * (TILE / DEPTH) * PART);
                    self.0.multiply(
                        weights,
                        &right[..num_parts],
                        &ahead[..num_ahead],
                        results,
                        WIDTH * size_of::<f32>(),
                    );
                }
                for row in left * HEIGHT..width.min((left + 1) * HEIGHT) {
                    for line in (0..WIDTH).step_by(LINE) {
                        let offset = row * head_dim + column + line;
                        // SAFETY: the row and the columns are within results and output.
                        unsafe {
                            let sum = lanes.load(results.add(row % HEIGHT * WIDTH + line));
                            sink.put(lanes, row, offset, sum);
                        }
                    }
                }
            }
        }
    }
}
