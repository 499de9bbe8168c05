//! Owns the seam between the engine and what computes logits.
//!
//! Must not know: the scheduler, sequences or sampling. A runner sees plans and nothing else.

#[cfg(any(test, feature = "test-doubles"))]
pub mod fake;
pub mod ort;

use ndarray::{Array2, Axis};

use crate::error::{LoadError, RunError};
use crate::request::RequestId;
use crate::step::{StepOutput, StepPlan};

/// Size of the KV cache a runner allocated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvCacheLayout {
    /// Blocks in the pool.
    pub num_blocks: usize,
    /// Tokens a block holds.
    pub block_size: usize,
    /// Bytes of the whole pool.
    pub num_bytes: usize,
}

/// Computes the logits of a step.
pub trait ModelRunner: Send {
    /// The cache this runner owns; constant over its life.
    fn kv_cache(&self) -> KvCacheLayout;

    /// Does what would otherwise hold up the first steps. Called once at most, by the engine's thread, before its
    /// first step.
    ///
    /// # Errors
    /// [`LoadError`] if steps can't be run.
    fn prepare(&mut self) -> Result<(), LoadError> {
        Ok(())
    }

    /// Writes the step's keys and values to their slots and returns the wanted rows.
    ///
    /// # Errors
    /// [`RunError`]: slots of the step may hold anything, no other slot changed.
    fn run(&mut self, plan: &StepPlan) -> Result<StepOutput<'_>, RunError>;
}

/// The logits of every position of one sequence, computed in steps of `chunk` tokens: `[token_ids,
/// vocabulary]`. Steps of one token are what decoding runs.
///
/// # Errors
/// [`RunError`] if the sequence doesn't fit the cache or a run fails.
pub fn logits(
    runner: &mut impl ModelRunner,
    token_ids: &[u32],
    chunk: usize,
) -> Result<Array2<f32>, RunError> {
    let KvCacheLayout { num_blocks, block_size, .. } = runner.kv_cache();
    let needed = token_ids.len().div_ceil(block_size);
    if token_ids.is_empty() || needed > num_blocks {
        return Err(RunError::new(format!(
            "{} tokens need {needed} of {num_blocks} blocks",
            token_ids.len()
        )));
    }
    // The order of the blocks must not matter, so don't use the obvious one.
    let blocks: Vec<u32> = (0..needed as u32).rev().collect();
    let mut plan = StepPlan::default();
    let mut parts = Vec::new();
    for (index, tokens) in token_ids.chunks(chunk.max(1)).enumerate() {
        plan.clear(needed);
        let num_tokens = tokens.len();
        plan.push(RequestId(0), tokens.iter().copied(), index * chunk, &blocks, block_size, num_tokens);
        parts.push(runner.run(&plan)?.logits.rows()?.to_owned());
    }
    let views: Vec<_> = parts.iter().map(|part| part.view()).collect();
    ndarray::concatenate(Axis(0), &views).map_err(|error| RunError::new(error.to_string()))
}
