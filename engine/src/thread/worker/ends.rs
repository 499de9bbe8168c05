//! Owns how requests end when the engine can't end them: the server goes away, or the thread ends.
//!
//! Invariant: each of them gets one terminal event, and its permit is given back before it hears of it.

use std::sync::atomic::Ordering;

use super::Worker;
use crate::error::SequenceError;
use crate::observer::EngineGauges;
use crate::request::{RequestId, TimedEvent, TokenEvent};
use crate::runner::ModelRunner;
use crate::thread::command::{Command, Submission};

impl<R: ModelRunner> Worker<R> {
    /// Keeps the first words about the device for all whom its loss ends.
    pub(super) fn note_lost_device(&mut self) {
        let words = self.engine.events().iter().find_map(|(_, event)| match event {
            TokenEvent::Failed(SequenceError::DeviceLost(words)) => Some(words.clone()),
            _ => None,
        });
        let words = words.unwrap_or_default();
        tracing::error!(words, "the device failed for good: no step can succeed any more");
        self.lost_device = Some(SequenceError::DeviceLost(words));
    }

    /// Whether the thread ended because no step can succeed any more.
    pub(in crate::thread) fn has_lost_device(&self) -> bool {
        self.lost_device.is_some()
    }

    pub(super) fn end(&mut self, id: RequestId, error: SequenceError) {
        if let Some(client) = self.clients.remove(&id) {
            self.published.release(client.permit);
            let _ = client.events.try_send(TimedEvent::failed(self.published.clock.now(), error));
        }
    }

    /// Ends a request that the engine never saw.
    pub(super) fn refuse(&mut self, submission: Submission, error: SequenceError) {
        let _ = submission.events.try_send(TimedEvent::failed(self.published.clock.now(), error));
        self.published.release(submission.permit);
    }

    /// Ends whatever is left when the thread ends, for whichever reason.
    pub(in crate::thread) fn close(&mut self) {
        self.published.accepting.store(false, Ordering::Release);
        // Before the channel is emptied: a handle that sends later sees it and takes its request back.
        self.published.alive.store(false, Ordering::SeqCst);
        self.published.is_busy.store(false, Ordering::Release);
        let ids: Vec<RequestId> = self.clients.keys().copied().collect();
        let error = self.lost_device.clone().unwrap_or(SequenceError::EngineDied);
        ids.into_iter().for_each(|id| self.end(id, error.clone()));
        // A bounded channel keeps what it holds while any sender exists: those requests would get no end.
        while let Ok(command) = self.commands.try_recv() {
            if let Command::Submit(submission) = command {
                self.refuse(*submission, error.clone());
            }
        }
        self.observer.gauges(&EngineGauges::default());
    }
}
