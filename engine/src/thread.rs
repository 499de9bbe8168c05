//! Owns the engine's thread, its clock and its channels; nothing else in this crate touches them.
//!
//! Invariant: the engine never blocks on a reader. Each request's channel holds all the events the
//! request can cause, so sending cannot fail for want of room and no event is lost.

use std::sync::Arc;

use tokio::sync::mpsc;

use crate::error::SubmitError;
use crate::observer::EngineGauges;
use crate::request::{Request, TokenEvent};

/// What bounds every request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EngineLimits {
    /// Longest sequence, prompt and output: the smallest of model, configuration and KV cache.
    pub max_model_len: usize,
    /// Ids below this are real tokens.
    pub vocab_size: usize,
    /// Bytes of the KV cache.
    pub kv_cache_bytes: usize,
}

/// What the engine is doing, as of its last step.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct EngineStatus {
    /// Whether the thread runs and takes requests.
    pub accepting: bool,
    /// Whether the thread is there at all.
    pub alive: bool,
    /// Sequences and blocks.
    pub gauges: EngineGauges,
}

/// The receiving end of one request. Dropping it aborts the request.
#[derive(Debug)]
pub struct EventReceiver {
    events: mpsc::Receiver<TokenEvent>,
}

impl EventReceiver {
    /// The next event; after the terminal one, `None`. Cancel-safe.
    pub async fn recv(&mut self) -> Option<TokenEvent> {
        self.events.recv().await
    }
}

/// Submits requests from any thread. Cheap to clone.
#[derive(Debug, Clone)]
pub struct EngineHandle {
    shared: Arc<EngineLimits>,
}

impl EngineHandle {
    /// Queues a request; never blocks.
    ///
    /// # Errors
    /// [`SubmitError`] says why nothing was queued.
    pub fn submit(&self, request: Request) -> Result<EventReceiver, SubmitError> {
        let _ = request;
        Err(SubmitError::Unavailable("not built yet"))
    }

    /// The limits.
    pub fn limits(&self) -> EngineLimits {
        *self.shared
    }

    /// The latest state.
    pub fn status(&self) -> EngineStatus {
        EngineStatus::default()
    }

    /// Takes no more requests; what was accepted goes on.
    pub fn drain(&self) {}

    /// Ends everything that was accepted with [`crate::SequenceError::ShuttingDown`].
    pub fn abort_all(&self) {}
}

/// The thread itself; joined by [`EngineThread::join`].
#[derive(Debug)]
pub struct EngineThread {}
