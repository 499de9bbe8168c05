//! Owns one call: write the caches, then attend, task by task.
//!
//! Invariant: every slot is written before any key is read, so a token sees itself and the tokens
//! before it in the same call; tasks write disjoint rows of the output.

use std::sync::PoisonError;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::batch::{Batch, Sequence};
use super::kernels::{self, Queries, Sink, State};
use super::kv_cache::{KvCache, TILE};
use super::plan::{Plan, RowTile, partial_floats};
use super::simd::{Lanes, Level, MASKED, Simd};
use super::workspace::{Parts, Scratch, Workspace};

pub(super) use super::plan::Task;
use crate::operators::parallel::{Guard, Parallel};

/// Below this many products of two floats, waking other threads costs more than they save.
const MIN_PARALLEL_PRODUCTS: usize = 1 << 16;
/// Below this many floats of new keys, one thread writes them all.
const MIN_PARALLEL_WRITES: usize = 1 << 15;

/// What the tasks of a call share.
pub(super) struct Job<'a> {
    batch: &'a Batch<'a>,
    cache: KvCache,
    plan: &'a Plan,
    scale: f32,
    output: *mut f32,
    partials: *mut f32,
}

// SAFETY: tasks write disjoint parts of `output` and `partials`; see `attend`.
unsafe impl Sync for Job<'_> {}

impl Job<'_> {
    /// Rows of the task's tile.
    pub(super) fn width(&self, task: Task) -> usize {
        self.plan.tiles[task.tile].width
    }
}

/// Computes attention for all of `batch`'s tokens into `output`, `[T, num_heads * head_dim]`.
///
/// # Errors
/// When threads can't be had, or a task panicked: never for a validated batch.
pub(super) fn run(
    simd: Simd,
    batch: &Batch,
    cache: KvCache,
    scale: f32,
    output: &mut [f32],
    workspace: &mut Workspace,
    threads: &impl Parallel,
) -> Result<(), String> {
    assert_eq!(output.len(), batch.num_tokens * batch.geometry.output_width());
    let geometry = &batch.geometry;
    let guard = Guard::default();

    let write = |kv_head| guard.call(&|| cache.write(batch, kv_head));
    let num_writes = batch.num_tokens * geometry.kv_num_heads * geometry.head_dim;
    if num_writes < MIN_PARALLEL_WRITES {
        (0..geometry.kv_num_heads).for_each(write);
    } else {
        threads.run(geometry.kv_num_heads, &write)?;
    }

    workspace.plan.rebuild(batch, simd.widths(), threads.num_threads());
    let products = workspace.plan.work() * 2 * geometry.head_dim;
    let num_workers = match products {
        0..MIN_PARALLEL_PRODUCTS => 1,
        _ => threads.num_threads().clamp(1, workspace.plan.tasks.len().max(1)),
    };
    let partials = workspace.reserve(num_workers);
    let Workspace { plan, scratches, .. } = workspace;
    let job = Job { batch, cache, plan, scale, output: output.as_mut_ptr(), partials };
    // Workers take tasks, longest first, as they get to them; each has scratch memory of its own.
    let next = AtomicUsize::new(0);
    let work = |worker: usize| {
        guard.call(&|| {
            let mut scratch = scratches[worker].lock().unwrap_or_else(PoisonError::into_inner);
            while let Some(task) = job.plan.tasks.get(next.fetch_add(1, Ordering::Relaxed)) {
                simd.attend(&job, *task, &mut scratch);
            }
        });
    };
    if num_workers == 1 {
        work(0);
    } else {
        threads.run(num_workers, &work)?;
    }
    guard.finish()
}

/// Computes `task` with rows in `T` vectors of `lanes`; see [`kernels`] for `X`, `A` and `B`.
#[inline(always)]
pub(super) fn attend<L: Level, R: Lanes, const T: usize, const X: usize, const A: usize, const B: usize>(
    level: L,
    lanes: R,
    job: &Job,
    task: Task,
    scratch: &mut Scratch,
) {
    let tile = &job.plan.tiles[task.tile];
    let width = T * R::NUM;
    assert!(tile.width == width && width.is_multiple_of(A));
    let head_dim = job.batch.geometry.head_dim;
    let sequence = job.batch.sequence(tile.sequence);
    let mut parts = scratch.parts(width, head_dim);
    load_queries(job, tile, &sequence, &mut parts, width);
    reset(&mut parts);
    let state = State {
        top: parts.top.as_mut_ptr(),
        sum: parts.sum.as_mut_ptr(),
        keep: parts.keep.as_mut_ptr(),
        take: parts.take.as_mut_ptr(),
    };
    let output = parts.output.as_mut_ptr();

    for key_tile in task.key_tiles.0..task.key_tiles.1 {
        let start = key_tile * TILE;
        let num_keys = (tile.num_keys - start).min(TILE);
        let all_visible = see(job, tile, &sequence, start, parts.visible);
        let (keys, values) = job.cache.rows(&sequence, start, tile.kv_head);
        let scores = parts.scores.as_mut_ptr();
        // SAFETY: the parts are made for this width; `rows` are within the cache as the batch was
        // validated; a split tile's partial results were reserved by the plan, and no other task
        // has this key tile of it.
        unsafe {
            let queries = Queries {
                query: parts.query.as_ptr(),
                head_dim,
                visible: parts.visible.as_ptr(),
                all_visible,
            };
            let top = kernels::score::<R, T, X>(lanes, queries, &keys, &values, num_keys, scores);
            let sum = kernels::weights::<R, T>(lanes, scores, num_keys, top);
            let sink = match tile.partials {
                None => {
                    for t in 0..T {
                        state.fold(lanes, t * R::NUM, top[t], sum[t]);
                    }
                    Sink::Fold { output, keep: state.keep, take: state.take }
                }
                Some(first) => {
                    let partial = job.partials.add(first + key_tile * partial_floats(width, head_dim));
                    for t in 0..T {
                        lanes.store(partial.add(t * R::NUM), top[t]);
                        lanes.store(partial.add(width + t * R::NUM), sum[t]);
                    }
                    Sink::Store { output: partial.add(2 * width) }
                }
            };
            kernels::weigh::<L, A, B>(level, scores, width, &values, num_keys, head_dim, sink);
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
                for row in (0..width).step_by(R::NUM) {
                    state.fold(
                        lanes,
                        row,
                        lanes.load(partial.add(row)),
                        lanes.load(partial.add(width + row)),
                    );
                }
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

/// Puts the tile's queries, rotated and scaled, into `[head_dim][width]`; rows of padding are 0.
#[inline(always)]
fn load_queries(job: &Job, tile: &RowTile, sequence: &Sequence, parts: &mut Parts, width: usize) {
    let geometry = &job.batch.geometry;
    let (group, head_dim) = (geometry.group(), geometry.head_dim);
    for (r, row) in (tile.rows.start..tile.rows.start + width).enumerate() {
        let column = parts.query[r..].iter_mut().step_by(width).take(head_dim);
        if row >= tile.rows.end {
            column.for_each(|q| *q = 0.0);
            continue;
        }
        let (token, head) = (row / group, tile.kv_head * group + row % group);
        let from = (sequence.tokens.start + token) * geometry.packed_width() + head * head_dim;
        parts.head.copy_from_slice(&job.batch.packed[from..from + head_dim]);
        if let Some(rotary) = &job.batch.rotary {
            rotary.rotate(parts.head, sequence.past + token);
        }
        for (to, from) in column.zip(&*parts.head) {
            *to = from * job.scale;
        }
    }
}

/// A state into which the first tile folds as it is.
#[inline(always)]
fn reset(parts: &mut Parts) {
    parts.top.fill(MASKED);
    parts.sum.fill(0.0);
    parts.output.fill(0.0);
}

/// Notes how many keys each row sees of the tile that starts at `start`; returns the fewest.
#[inline(always)]
fn see(job: &Job, tile: &RowTile, sequence: &Sequence, start: usize, visible: &mut [f32]) -> usize {
    let group = job.batch.geometry.group();
    let seen = |row: usize| (sequence.past + row / group + 1).saturating_sub(start).min(TILE);
    for (r, visible) in visible.iter_mut().enumerate() {
        *visible = seen((tile.rows.start + r).min(tile.rows.end - 1)) as f32;
    }
    seen(tile.rows.start)
}

/// Divides by the sums and writes the tile's rows out.
#[inline(always)]
fn store_output(job: &Job, tile: &RowTile, sequence: &Sequence, parts: &Parts) {
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
