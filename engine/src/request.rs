//! Owns what crosses the engine's edge: a request in, token events out.
//!
//! Must not know text, JSON or HTTP: ids only.

use std::ops::RangeInclusive;
use std::time::Duration;

use crate::error::SequenceError;
use crate::sampling_params::SamplingParams;

/// Names a request inside one engine; grows with arrival.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// Priorities that a request may have.
pub const PRIORITIES: RangeInclusive<i32> = -100..=100;

/// Whose a request is: an index into [`crate::EngineConfig::tenant_weights`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TenantId(pub u32);

/// What a caller asks for.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Request {
    /// Ids of the whole prompt, special tokens included; at least one.
    pub prompt_token_ids: Vec<u32>,
    /// How to sample.
    pub sampling: SamplingParams,
    /// Time from submission within which the first token is wanted. Orders the queue and lets the
    /// engine refuse what it can't meet; nothing is aborted when it passes.
    pub deadline: Option<Duration>,
    /// Longest time from submission to admission. What can't leave the queue in time is refused; nothing is
    /// aborted when it passes.
    pub max_queue_time: Option<Duration>,
    /// Whose it is.
    pub tenant: TenantId,
    /// One of [`PRIORITIES`]. A lower one is admitted first, but for every eighth admission.
    pub priority: i32,
}

/// Why a sequence ended well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop id was sampled.
    Stop {
        /// The id, which is not among the tokens.
        token_id: u32,
    },
    /// `max_tokens` were generated.
    Length,
}

/// What a request's channel carries: at most one `Admitted` and any number of tokens after it, then
/// exactly one `Finished` or `Failed`.
#[derive(Debug, Clone, PartialEq)]
pub enum TokenEvent {
    /// The request left the queue and got blocks, for the first time.
    Admitted {
        /// Tokens of the prompt that need not be computed.
        num_cached_tokens: usize,
    },
    /// One generated token.
    Token {
        /// Its id.
        token_id: u32,
    },
    /// The sequence ended well.
    Finished {
        /// Why.
        reason: FinishReason,
        /// Tokens generated, the stop id included.
        num_generated_tokens: usize,
    },
    /// The sequence could not be finished.
    Failed(SequenceError),
}

/// An event, and when it happened.
#[derive(Debug, Clone, PartialEq)]
pub struct TimedEvent {
    /// Engine time: of an admission its step's start, of everything else its step's end. What one step generates has
    /// one time.
    pub at: Duration,
    /// What happened.
    pub event: TokenEvent,
}

impl TimedEvent {
    /// A sequence that could not be finished.
    pub(crate) fn failed(at: Duration, error: SequenceError) -> Self {
        Self { at, event: TokenEvent::Failed(error) }
    }
}

impl TokenEvent {
    /// Whether nothing follows.
    pub fn is_terminal(&self) -> bool {
        !matches!(self, Self::Admitted { .. } | Self::Token { .. })
    }
}
