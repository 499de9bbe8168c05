//! Owns what can happen to a reply: it begins, says something, and ends well or badly.
//!
//! Invariant: plain data, which means the same to every reader. Must not know HTTP, JSON or the engine's
//! channel.

use std::time::Duration;

use glm_engine::{SequenceError, SubmitError};

use super::time_limits::Limit;

/// Tokens of a reply.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub num_prompt_tokens: usize,
    /// Of those, tokens that were not computed for this reply.
    pub num_cached_tokens: usize,
    /// Tokens generated so far, the stop id included.
    pub num_generated_tokens: usize,
}

/// Why a reply ended well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndReason {
    /// A stop id or a stop string.
    Stop {
        /// The stop id; `None` if it was a stop string.
        token_id: Option<u32>,
    },
    /// `max_tokens` were generated.
    Length,
}

/// Why a reply ended badly after it was accepted.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum StreamError {
    /// The engine never took it; others may have been waiting for the same reply.
    #[error(transparent)]
    Refused(#[from] SubmitError),
    /// The engine gave up.
    #[error(transparent)]
    Sequence(#[from] SequenceError),
    /// A time limit passed.
    #[error("the {0} time limit of {1:?} passed")]
    Timeout(Limit, Duration),
    /// A time limit of one reader passed; it is told to that reader only and is in no log.
    #[error("this request's own {0} time limit of {1:?} passed; the reply that it shares has not ended")]
    ReaderTimeout(Limit, Duration),
    /// Somebody or something ended it on purpose.
    #[error("the reply was aborted: {0}")]
    Aborted(AbortReason),
    /// The reply outgrew its log.
    #[error("the reply is larger than the {0} that a reply may have")]
    TooLarge(&'static str),
    /// The task that writes the log ended without a word.
    #[error("the reply was lost inside the server")]
    Lost,
}

impl StreamError {
    /// Whether the same request, made again, may well end otherwise. Not if its owner wanted this end,
    /// and hardly if it says too much.
    pub(super) fn may_pass(&self) -> bool {
        !matches!(self, Self::Aborted(AbortReason::Deleted) | Self::TooLarge(_))
    }
}

/// Who ended a reply that could have gone on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AbortReason {
    /// `DELETE`.
    #[error("its owner deleted it")]
    Deleted,
    /// The only client it was for left.
    #[error("its client left")]
    Left,
    /// Nobody came back within the grace time.
    #[error("nobody came back to read it")]
    GraceOver,
    /// Its owner has more detached replies than are allowed, and it was the oldest.
    #[error("too many replies of this owner have no reader")]
    TooManyDetached,
}

/// One event of a reply.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The request was accepted; the assistant speaks.
    Role,
    /// Text that one step completed; never empty.
    Delta {
        /// The text.
        text: String,
        /// Usage after that step.
        usage: Usage,
    },
    /// The reply is complete.
    Finish {
        /// Why.
        reason: EndReason,
        /// Final usage.
        usage: Usage,
        /// Hash of the whole text, in hexadecimal: what a reader puts together has to match.
        text_sha256: String,
    },
    /// The reply is not complete and nothing follows.
    Error(StreamError),
}

impl Event {
    /// Whether nothing follows.
    pub fn is_terminal(&self) -> bool {
        matches!(self, Self::Finish { .. } | Self::Error(_))
    }
}
