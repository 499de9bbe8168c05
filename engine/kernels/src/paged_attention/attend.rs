//! Owns one task of a call: the walk of a row tile over its key tiles.
//!
//! Invariant: tasks write disjoint rows of the output. It is generic over the vectors and the products, and inlined
//! into code that is compiled for an instruction set.

use super::batch::{Batch, Sequence};
use super::element::Element;
use super::kernels::{self, Rows, Sink, State};
use super::kv_cache::{KvCache, TILE};
use super::lanes::{MASKED, Registers};
use super::plan::{Plan, RowTile, Task, partial_floats};
use super::products::Products;
use super::workspace::{Parts, Scratch};

/// What the tasks of a call share.
pub(super) struct Job<'a, E> {
    pub(super) batch: &'a Batch<'a>,
    pub(super) cache: KvCache<E>,
    pub(super) plan: &'a Plan,
    /// What queries are multiplied by.
    pub(super) scale: f32,
    /// `[T, num_heads * head_dim]`.
    pub(super) output: *mut f32,
    /// Results of split tiles, as the plan lays them out.
    pub(super) partials: *mut f32,
}

// SAFETY: tasks write disjoint parts of `output` and `partials`; see `attend`.
unsafe impl<E> Sync for Job<'_, E> {}

/// Computes `task`.
#[inline(always)]
pub(super) fn attend<L: Registers, E: Element, P: Products<E>>(
    level: L,
    products: P,
    job: &Job<E>,
    task: Task,
    scratch: &mut Scratch,
) {
    let tile = &job.plan.tiles[task.tile];
    let width = tile.width();
    let head_dim = job.batch.geometry.head_dim;
    let sequence = job.batch.sequence(tile.sequence);
    let mut parts = scratch.parts(width, head_dim, P::num_floats(width, head_dim));
    load_queries(job, tile, &sequence, &mut parts, width);
    reset(&mut parts);
    let state = State {
        top: parts.top.as_mut_ptr(),
        sum: parts.sum.as_mut_ptr(),
        keep: parts.keep.as_mut_ptr(),
        take: parts.take.as_mut_ptr(),
    };
    let rows = Rows {
        width,
        head_dim,
        query: parts.query.as_ptr(),
        visible: parts.visible.as_ptr(),
        work: parts.work.as_mut_ptr(),
    };
    let output = parts.output.as_mut_ptr();
    // SAFETY: the parts are made for these rows.
    unsafe { products.begin(&rows) };

    for key_tile in task.key_tiles.0..task.key_tiles.1 {
        let start = key_tile * TILE;
        let num_keys = (tile.num_keys - start).min(TILE);
        see(job, tile, &sequence, start, parts.visible);
        let rows = Rows { visible: parts.visible.as_ptr(), ..rows };
        let runs = job.cache.runs(&sequence, start, tile.kv_head);
        let partial = tile
            .partials
            .map(|first| job.partials.wrapping_add(first + key_tile * partial_floats(width, head_dim)));
        // SAFETY: the parts are made for this width; the runs are within the cache as the batch was
        // validated; a split tile's partial results were reserved by the plan, and no other task
        // has this key tile of it.
        unsafe {
            let (tops, sums) = (parts.tile_top.as_mut_ptr(), parts.tile_sum.as_mut_ptr());
            products.weights(&rows, &runs, num_keys, tops, sums);
            let sink = match partial {
                None => {
                    state.fold(level, width, tops, sums);
                    Sink::Fold { output, keep: state.keep, take: state.take }
                }
                Some(partial) => {
                    partial.copy_from_nonoverlapping(tops, width);
                    partial.add(width).copy_from_nonoverlapping(sums, width);
                    Sink::Store { output: partial.add(2 * width) }
                }
            };
            products.weigh(&rows, &runs, num_keys, sink);
        }
    }

    if let Some(first) = tile.partials {
        if !job.plan.finish_task(task.tile) {
            return;
        }
        for key_tile in 0..tile.num_key_tiles() {
            // SAFETY: all tasks of the tile are done, so its partial results are written; see above
            // for their layout.
            unsafe {
                let partial = job.partials.add(first + key_tile * partial_floats(width, head_dim));
                state.fold(level, width, partial, partial.add(width));
                for row in 0..tile.rows.len() {
                    let from = partial.add(2 * width + row * head_dim);
                    let (keep, take) = (*state.keep.add(row), *state.take.add(row));
                    kernels::fold_row(level, output.add(row * head_dim), keep, from, take, head_dim);
                }
            }
        }
    }
    store_output(job, tile, &sequence, &parts);
}

/// Puts the tile's queries, rotated and scaled, into `[width][head_dim]`; rows of padding are 0.
#[inline(always)]
fn load_queries<E>(job: &Job<E>, tile: &RowTile, sequence: &Sequence, parts: &mut Parts, width: usize) {
    let geometry = &job.batch.geometry;
    let (group, head_dim) = (geometry.group(), geometry.head_dim);
    for (row, query) in (tile.rows.start..tile.rows.start + width).zip(parts.query.chunks_exact_mut(head_dim))
    {
        if row >= tile.rows.end {
            query.fill(0.0);
            continue;
        }
        let (token, head) = (row / group, tile.kv_head * group + row % group);
        let from = (sequence.tokens.start + token) * geometry.packed_width() + head * head_dim;
        query.copy_from_slice(&job.batch.packed[from..from + head_dim]);
        if let Some(rotary) = &job.batch.rotary {
            rotary.rotate(query, sequence.past + token);
        }
        query.iter_mut().for_each(|q| *q *= job.scale);
    }
}

/// A state into which the first tile folds as it is.
#[inline(always)]
fn reset(parts: &mut Parts) {
    parts.top.fill(MASKED);
    parts.sum.fill(0.0);
    parts.output.fill(0.0);
}

/// Notes how many keys each row sees of the tile that starts at `start`.
#[inline(always)]
fn see<E>(job: &Job<E>, tile: &RowTile, sequence: &Sequence, start: usize, visible: &mut [f32]) {
    let group = job.batch.geometry.group();
    for (r, visible) in visible.iter_mut().enumerate() {
        let row = (tile.rows.start + r).min(tile.rows.end - 1);
        *visible = (sequence.past + row / group + 1).saturating_sub(start).min(TILE) as f32;
    }
}

/// Divides by the sums and writes the tile's rows out.
#[inline(always)]
fn store_output<E>(job: &Job<E>, tile: &RowTile, sequence: &Sequence, parts: &Parts) {
    let geometry = &job.batch.geometry;
    let (group, head_dim) = (geometry.group(), geometry.head_dim);
    for (r, row) in tile.rows.clone().enumerate() {
        let (token, head) = (row / group, tile.kv_head * group + row % group);
        let to = (sequence.tokens.start + token) * geometry.output_width() + head * head_dim;
        // SAFETY: the output holds every token's heads, and this row is only in this tile.
        let to = unsafe { std::slice::from_raw_parts_mut(job.output.add(to), head_dim) };
        let factor = 1.0 / parts.sum[r];
        for (to, from) in to.iter_mut().zip(&parts.output[r * head_dim..]) {
            // Adding 0 turns -0 into +0: whether a sum ends at one or the other may depend on how
            // many hidden keys added nothing to it.
            *to = from * factor + 0.0;
        }
    }
}
