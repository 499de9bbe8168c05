//! Owns the engine's limits.

use std::time::Duration;

use crate::request::TenantId;

/// Whether blocks of keys and values are used again for prompts that start alike.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum PrefixCaching {
    /// Never.
    Off,
    /// By everybody. Who measures time can find out whether another tenant sent the same start.
    #[default]
    Shared,
    /// By the tenant who sent them only.
    PerTenant,
}

impl PrefixCaching {
    /// What keeps a tenant's blocks apart; `None` if there are none to share.
    pub fn salt(self, tenant: TenantId) -> Option<u64> {
        match self {
            Self::Off => None,
            Self::Shared => Some(0),
            Self::PerTenant => Some(u64::from(tenant.0)),
        }
    }
}

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
    /// Shares of the tenants: tokens that they get, in proportion, while all of them have requests that
    /// wait. [`crate::TenantId`] counts these; at least one.
    pub tenant_weights: Vec<u32>,
    /// Most requests of one tenant that may run and wait together, so that one can't fill the queue.
    pub max_num_requests_per_tenant: usize,
    /// Whether the priority of a request counts.
    pub honours_priority: bool,
    /// Whether prompts that start alike share blocks.
    pub prefix_caching: PrefixCaching,
    /// Deadline of a request that names none or a longer one: no request waits behind one that came
    /// this much later, so nothing starves.
    pub default_deadline: Duration,
    /// Longest step the cost model may predict, reached by taking fewer prompt tokens: the longest
    /// time until the engine looks at what arrived or was aborted. One block is always taken.
    pub max_step_time: Duration,
    /// The same while a reply is generated: the longest pause that another request's prompt puts into it.
    pub target_inter_token_latency: Duration,
    /// Most draft tokens of a running sequence that are checked in one step; 0 turns speculation off.
    pub max_num_draft_tokens: usize,
    /// How many times its predicted time a step may take before it counts as stalled.
    pub stall_factor: u32,
    /// Least time before a step counts as stalled. Until step times are learnt, it is taken
    /// `stall_factor` times: the first step may have to page the weights in.
    pub stall_min: Duration,
    /// Steps in a row that must fail before the engine is at fault.
    pub max_consecutive_run_errors: u32,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            max_num_seqs: 64,
            max_num_batched_tokens: 512,
            max_model_len: 8192,
            max_num_waiting: 256,
            watermark_permille: 10,
            tenant_weights: vec![1],
            max_num_requests_per_tenant: usize::MAX,
            honours_priority: true,
            prefix_caching: PrefixCaching::default(),
            default_deadline: Duration::from_secs(60),
            // Long enough that reading the weights once is a small part of a step.
            max_step_time: Duration::from_millis(500),
            // A pause that a reader of a stream still takes for writing.
            target_inter_token_latency: Duration::from_millis(250),
            max_num_draft_tokens: 8,
            stall_factor: 10,
            stall_min: Duration::from_secs(30),
            max_consecutive_run_errors: 3,
        }
    }
}
