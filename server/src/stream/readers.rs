//! Owns the count of streamed answers that still read a reply, and the word that their time is over.
//!
//! Invariant: an answer is counted from before its head is sent until its body has ended or its connection is gone.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

/// All streamed answers that are being sent.
#[derive(Debug, Default)]
pub struct Readers {
    tracker: TaskTracker,
    is_over: Arc<AtomicBool>,
}

/// What an answer holds while it is sent.
#[derive(Debug)]
pub struct ReaderPermit {
    _token: TaskTrackerToken,
    is_over: Arc<AtomicBool>,
}

impl Readers {
    /// Counts one more answer, until the permit is dropped.
    pub fn permit(&self) -> ReaderPermit {
        ReaderPermit { _token: self.tracker.token(), is_over: Arc::clone(&self.is_over) }
    }

    /// Answers that are being sent.
    pub fn len(&self) -> usize {
        self.tracker.len()
    }

    /// Whether no answer is being sent.
    pub fn is_empty(&self) -> bool {
        self.tracker.is_empty()
    }

    /// Tells answers that have more to send than the end to stop with an error.
    pub(crate) fn cut_short(&self) {
        self.is_over.store(true, Ordering::Release);
    }

    /// Waits until no answer is being sent.
    pub(crate) async fn wait(&self) {
        self.tracker.close();
        self.tracker.wait().await;
    }
}

impl ReaderPermit {
    /// Whether the server has no more time for this answer.
    pub fn is_over(&self) -> bool {
        self.is_over.load(Ordering::Acquire)
    }
}
