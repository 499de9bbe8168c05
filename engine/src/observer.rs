//! Owns the seam through which the engine reports figures. The server turns them into metrics.
//!
//! Must not know Prometheus. Calls come from the engine thread and must return at once.

use std::time::Duration;

use crate::fault::Fault;

/// Figures of one step.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct StepReport {
    /// Time the step took, scheduling and sampling included.
    pub duration: Duration,
    /// Tokens computed.
    pub num_scheduled_tokens: usize,
    /// Of those, tokens that were computed for the first time and belong to a user's prompt.
    pub num_prompt_tokens: usize,
    /// Tokens sampled for users.
    pub num_generated_tokens: usize,
    /// Draft tokens computed beside users' decodes.
    pub num_draft_tokens: usize,
    /// Of those, tokens that were accepted.
    pub num_accepted_draft_tokens: usize,
    /// Sequences preempted in this step.
    pub num_preemptions: usize,
    /// Sequences that failed because their logits were not finite.
    pub num_non_finite: usize,
    /// Whether nothing was computed for want of memory: the next step has the same tokens, but fewer of prompts.
    pub is_shrunk: bool,
    /// Whether the runner failed, in computing or in handing out what it computed.
    pub failed: bool,
    /// What the step showed to be wrong with the engine.
    pub fault: Option<Fault>,
    /// Whether a request of a user was computed; else the step was for a probe only.
    pub serves_users: bool,
}

/// Figures of a request that was admitted for the first time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdmissionReport {
    /// Whether it is a probe and not a user's.
    pub is_probe: bool,
    /// From its submission.
    pub queue_time: Duration,
    /// Tokens that were looked up in the prefix cache: its prompt, unless it takes no part.
    pub num_queried_tokens: usize,
    /// Of those, tokens that were found and are not computed.
    pub num_cached_tokens: usize,
}

/// The engine's state between two steps.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct EngineGauges {
    /// Sequences that own blocks.
    pub num_running: usize,
    /// Sequences in the queue.
    pub num_waiting: usize,
    /// Blocks that sequences own; what is only cached is not among them.
    pub num_used_blocks: usize,
    /// Blocks of the pool.
    pub num_blocks: usize,
}

/// Receives figures. All methods do nothing by default.
pub trait EngineObserver: Send + Sync {
    /// A step ended.
    fn step(&self, report: &StepReport) {
        let _ = report;
    }
    /// The state changed: after each step, and when the engine becomes idle.
    fn gauges(&self, gauges: &EngineGauges) {
        let _ = gauges;
    }
    /// A user's request was admitted for the first time.
    fn admitted(&self, report: &AdmissionReport) {
        let _ = report;
    }
}

/// An observer that ignores everything.
#[derive(Debug, Default)]
pub struct NoObserver;

impl EngineObserver for NoObserver {}
