//! Owns one call: write the caches, then attend, task by task.
//!
//! Invariant: every slot is written before any key is read, so a token sees itself and the tokens
//! before it in the same call.

use std::sync::PoisonError;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::attend::Job;
use super::batch::Batch;
use super::element::Element;
use super::kv_cache::KvCache;
use super::simd::Simd;
use super::workspace::Workspace;
use crate::parallel::{Guard, Parallel, Phase};

/// Below this many products of two floats, waking other threads costs more than they save.
const MIN_PARALLEL_PRODUCTS: usize = 1 << 16;
/// Neighbouring tokens whose keys and values a thread writes at a time: several blocks of them, since the
/// keys of a block share lines.
const TOKENS_PER_WRITE: usize = 64;

/// Computes attention for all of `batch`'s tokens into `output`, `[T, num_heads * head_dim]`.
///
/// # Errors
/// When threads can't be had, or a task panicked: never for a validated batch.
pub(super) fn run<E: Element>(
    simd: Simd,
    batch: &Batch,
    cache: KvCache<E>,
    scale: f32,
    output: &mut [f32],
    workspace: &mut Workspace,
    threads: &impl Parallel,
) -> Result<(), String> {
    assert_eq!(output.len(), batch.num_tokens * batch.geometry.output_width());
    let geometry = &batch.geometry;
    workspace.plan.rebuild(batch, threads.num_threads(), cache.in_tiles());
    let products = workspace.plan.work() * 2 * geometry.head_dim;
    let num_workers = match products {
        0..MIN_PARALLEL_PRODUCTS => 1,
        _ => threads.num_threads().clamp(1, workspace.plan.tasks.len().max(1)),
    };
    let partials = workspace.reserve(num_workers);
    let Workspace { plan, scratches, .. } = workspace;
    let (guard, written) = (Guard::default(), Phase::default());
    let num_parts = batch.num_tokens.div_ceil(TOKENS_PER_WRITE);
    let write = |i: usize| {
        let (kv_head, part) = (i / num_parts, i % num_parts);
        cache.write(batch, kv_head, part * TOKENS_PER_WRITE..(part + 1) * TOKENS_PER_WRITE);
    };
    let job = Job { batch, cache, plan, scale, output: output.as_mut_ptr(), partials };
    // Workers take tasks, longest first, as they get to them; each has scratch memory of its own.
    let next = AtomicUsize::new(0);
    let work = |worker: usize| {
        written.run(geometry.kv_num_heads * num_parts, &guard, write);
        guard.call(|| {
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
