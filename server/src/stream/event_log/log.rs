//! Owns the events of one reply.

use tokio::sync::watch;
use tokio::time::Instant;

use crate::stream::event::Event;
use crate::stream::time_limits::Milestones;

/// The events, how much they are, and how far the reply is.
#[derive(Debug, Default)]
pub(super) struct Log {
    pub(super) events: Vec<(Instant, Event)>,
    pub(super) num_bytes: usize,
    pub(super) milestones: Milestones,
}

impl Log {
    pub(super) fn push(&mut self, event: Event) {
        self.events.push((Instant::now(), event));
    }

    pub(super) fn terminal(&self) -> Option<&Event> {
        self.events.last().map(|(_, event)| event).filter(|event| event.is_terminal())
    }

    /// The first event that a client can't foresee.
    pub(super) fn opening(&self) -> Option<&Event> {
        self.events.iter().map(|(_, event)| event).find(|event| **event != Event::Role)
    }

    /// What readers may have. A role alone says nothing, and whoever times the first chunk would take it
    /// for the first token.
    pub(super) fn readable(&self) -> &[(Instant, Event)] {
        if self.opening().is_some() { &self.events } else { &[] }
    }
}

/// What the writer and the readers share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) log: watch::Sender<Log>,
    pub(super) num_readers: watch::Sender<usize>,
}
