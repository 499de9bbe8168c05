//! Owns the engine's limits.

/// Limits of the scheduler. Every one bounds memory or time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineConfig {
    /// Most sequences in one step.
    pub max_num_seqs: usize,
    /// Most tokens in one step: decodes first, the rest is prefill.
    pub max_num_batched_tokens: usize,
    /// Longest sequence, prompt and output.
    pub max_model_len: usize,
    /// Most requests that wait; one more is refused.
    pub max_num_waiting: usize,
    /// Blocks kept free at admission, per thousand of the pool, so that running sequences can grow.
    pub watermark_permille: usize,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            max_num_seqs: 64,
            max_num_batched_tokens: 512,
            max_model_len: 8192,
            max_num_waiting: 256,
            watermark_permille: 10,
        }
    }
}
