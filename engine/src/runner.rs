//! Owns the seam between the engine and what computes logits.
//!
//! Must not know: the scheduler, sequences or sampling. A runner sees plans and nothing else.

pub mod fake;
pub mod ort;

use crate::error::RunError;
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

    /// Writes the step's keys and values to their slots and returns the wanted rows.
    ///
    /// # Errors
    /// [`RunError`]: slots of the step may hold anything, no other slot changed.
    fn run(&mut self, plan: &StepPlan) -> Result<StepOutput<'_>, RunError>;
}
