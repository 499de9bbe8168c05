//! Owns what the engine thread publishes about one request, and what its reader tells the thread.
//!
//! Invariant: single atomics, so neither side ever waits for the other, and a stage is never torn.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// Where a request is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// In the queue.
    Waiting {
        /// Requests ahead of it; 0 is the next.
        position: usize,
    },
    /// The prompt is being computed, or after a preemption the prompt and the output so far.
    Prefill {
        /// Tokens computed.
        num_computed_tokens: usize,
        /// Tokens to compute before the next one is generated.
        num_tokens: usize,
    },
    /// Tokens are being generated.
    Decode,
}

/// Where a request is and what is expected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Where it is.
    pub stage: Stage,
    /// Predicted time to the next token while it is waiting or in its prompt; `None` if nothing is
    /// learnt yet, and while tokens come.
    pub estimate: Option<Duration>,
}

const WAITING: u64 = 0;
const PREFILL: u64 = 1;
const DECODE: u64 = 2;
const TAG_BITS: u32 = 2;
const COUNT_BITS: u32 = 31;
const MAX_COUNT: u64 = (1 << COUNT_BITS) - 1;
const UNKNOWN: u64 = u64::MAX;

/// Shared between one request's receiver and the engine thread.
#[derive(Debug)]
pub(in crate::thread) struct RequestState {
    /// Tag in the lowest bits, then two counts.
    stage: AtomicU64,
    /// Engine time in nanoseconds at which the next token is expected.
    next_token_at: AtomicU64,
    is_detached: AtomicBool,
    is_complete: AtomicBool,
}

impl RequestState {
    /// A request in the queue.
    pub(in crate::thread) fn new(position: usize, next_token_at: Option<Duration>) -> Self {
        let state = Self {
            stage: AtomicU64::new(0),
            next_token_at: AtomicU64::new(0),
            is_detached: AtomicBool::new(false),
            is_complete: AtomicBool::new(false),
        };
        state.publish(Stage::Waiting { position }, next_token_at);
        state
    }

    /// Called by the engine thread.
    pub(in crate::thread) fn publish(&self, stage: Stage, next_token_at: Option<Duration>) {
        self.stage.store(pack(stage), Ordering::Relaxed);
        let nanos = next_token_at.and_then(|time| u64::try_from(time.as_nanos()).ok());
        self.next_token_at.store(nanos.unwrap_or(UNKNOWN), Ordering::Relaxed);
    }

    /// The latest state, as seen at `now`.
    pub(in crate::thread) fn progress(&self, now: Duration) -> Progress {
        let next_token_at = self.next_token_at.load(Ordering::Relaxed);
        let estimate =
            (next_token_at != UNKNOWN).then(|| Duration::from_nanos(next_token_at).saturating_sub(now));
        Progress { stage: unpack(self.stage.load(Ordering::Relaxed)), estimate }
    }

    /// Called by the reader.
    pub(in crate::thread) fn set_detached(&self, is_detached: bool) {
        self.is_detached.store(is_detached, Ordering::Relaxed);
    }

    /// Called by the reader.
    pub(in crate::thread) fn set_complete(&self) {
        self.is_complete.store(true, Ordering::Relaxed);
    }

    /// Whether its reader has all that it wants.
    pub(in crate::thread) fn is_complete(&self) -> bool {
        self.is_complete.load(Ordering::Relaxed)
    }

    /// Whether the request has no reader.
    pub(in crate::thread) fn is_detached(&self) -> bool {
        self.is_detached.load(Ordering::Relaxed)
    }
}

fn pack(stage: Stage) -> u64 {
    let count = |count: usize| (count as u64).min(MAX_COUNT);
    match stage {
        Stage::Waiting { position } => WAITING | count(position) << TAG_BITS,
        Stage::Prefill { num_computed_tokens, num_tokens } => {
            PREFILL | count(num_computed_tokens) << TAG_BITS | count(num_tokens) << (TAG_BITS + COUNT_BITS)
        }
        Stage::Decode => DECODE,
    }
}

fn unpack(packed: u64) -> Stage {
    let count = |shift: u32| (packed >> shift & MAX_COUNT) as usize;
    match packed & ((1 << TAG_BITS) - 1) {
        WAITING => Stage::Waiting { position: count(TAG_BITS) },
        PREFILL => {
            Stage::Prefill { num_computed_tokens: count(TAG_BITS), num_tokens: count(TAG_BITS + COUNT_BITS) }
        }
        _ => Stage::Decode,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_survive_packing() {
        let most = MAX_COUNT as usize;
        for stage in [
            Stage::Waiting { position: 0 },
            Stage::Waiting { position: most },
            Stage::Prefill { num_computed_tokens: 0, num_tokens: most },
            Stage::Prefill { num_computed_tokens: most, num_tokens: 1 },
            Stage::Decode,
        ] {
            assert_eq!(unpack(pack(stage)), stage);
        }
    }

    #[test]
    fn the_estimate_counts_down_and_stops_at_zero() {
        let state = RequestState::new(3, Some(Duration::from_secs(5)));
        let at = |seconds| state.progress(Duration::from_secs(seconds)).estimate;
        assert_eq!((at(2), at(9)), (Some(Duration::from_secs(3)), Some(Duration::ZERO)));
        state.publish(Stage::Decode, None);
        assert_eq!(at(2), None);
    }
}
