//! Owns what handles tell the engine thread.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;

use super::published::Permit;
use super::published::progress::RequestState;
use crate::request::{Request, TimedEvent};

/// A request on its way to the engine thread.
pub(super) struct Submission {
    pub(super) request: Request,
    /// Estimated number of tokens of its prompt that the prefix cache holds.
    pub(super) num_cached_tokens: usize,
    pub(super) arrival: Duration,
    pub(super) permit: Permit,
    pub(super) events: mpsc::Sender<TimedEvent>,
    pub(super) state: Arc<RequestState>,
}

/// What the engine thread is asked to do.
pub(super) enum Command {
    /// A request, with its permit.
    Submit(Box<Submission>),
    /// The end of every request.
    AbortAll,
}
