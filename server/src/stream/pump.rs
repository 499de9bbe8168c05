//! Owns the task that moves one reply from the engine into its log, and the clock that limits it.
//!
//! Invariants: it alone holds the request's [`EventReceiver`], so that dropping it (a limit passed, a
//! stop string found, nobody reads and nobody may come back) aborts the request in the engine; the
//! log gets its terminal event even if the engine hangs; every accepted request ends in the metrics
//! exactly once. Must not know HTTP, JSON or who reads the log.

use std::sync::Arc;
use std::time::Duration;

use glm_engine::{EventReceiver, FinishReason, Progress, TimedEvent, TokenEvent};
use tokio::sync::{oneshot, watch};
use tokio::time::Instant;

use super::event::{AbortReason, EndReason, Event, StreamError};
use super::event_log::LogWriter;
use super::generation::{Generated, Generation};
use super::reply_stream::{ReplyStream, Wishes};
use super::store::StreamStore;
use super::time_limits::{Milestones, TimeLimits};
use super::worker_wakes;
use crate::metrics::{Outcome, StreamRecord};

/// What a pump moves.
#[derive(Debug)]
pub struct Pump {
    /// The engine's side.
    pub events: EventReceiver,
    /// What it has generated so far.
    pub generation: Generation,
    /// The readers' side.
    pub log: LogWriter,
    /// The reply.
    pub stream: Arc<ReplyStream>,
    /// What others want of it.
    pub wishes: Wishes,
    /// Who is told when it is left alone and when it ends.
    pub store: Arc<dyn StreamStore>,
    /// What the metrics hear.
    pub record: StreamRecord,
    /// When to give up.
    pub limits: TimeLimits,
    /// How long a reply that can be resumed goes on without a reader.
    pub grace: Duration,
}

/// What a pump keeps of the time that has passed.
#[derive(Debug)]
struct Seen {
    milestones: Milestones,
    /// Since when nobody reads.
    detached: Option<Instant>,
}

enum Wake {
    Abort,
    Readers,
    Question(oneshot::Sender<Progress>),
    Engine(TimedEvent),
    Clock(StreamError),
}

impl Pump {
    /// Runs to the end of the reply.
    pub async fn run(mut self) {
        self.events.wake_by(&worker_wakes::group());
        let end = match self.pump().await {
            Ok(end) => end,
            Err(error) => Event::Error(error),
        };
        self.record.end(match &end {
            Event::Finish { reason: EndReason::Length, .. } => Outcome::Length,
            Event::Error(StreamError::Aborted(_)) => Outcome::Abort,
            Event::Error(StreamError::Timeout(..)) => Outcome::Timeout,
            Event::Error(_) => Outcome::Error,
            _ => Outcome::Stop,
        });
        if let Event::Error(error) = &end
            && !matches!(error, StreamError::Aborted(_))
        {
            tracing::warn!(%error, "a reply failed");
        }
        self.log.close(end);
        self.store.ended(&self.stream);
    }

    async fn pump(&mut self) -> Result<Event, StreamError> {
        let mut seen = Seen { milestones: Milestones::default(), detached: None };
        let mut readers = self.log.readers();
        self.count_readers(&mut seen, &mut readers)?;
        self.log.append(Event::Role)?;
        loop {
            match self.wake(&seen, &mut readers).await {
                Wake::Abort => {
                    let reason = self.wishes.abort.borrow().unwrap_or(AbortReason::Deleted);
                    return Err(StreamError::Aborted(reason));
                }
                Wake::Readers => self.count_readers(&mut seen, &mut readers)?,
                // Who asked may be gone.
                Wake::Question(asker) => drop(asker.send(self.events.progress())),
                Wake::Clock(error) => return Err(error),
                Wake::Engine(event) => {
                    if let Some(end) = self.take(event, &mut seen)? {
                        return Ok(end);
                    }
                }
            }
        }
    }

    /// Waits for the next thing to do. Tokens come before the clock: one that is there is in time.
    async fn wake(&mut self, seen: &Seen, readers: &mut watch::Receiver<usize>) -> Wake {
        let (until, error) = self.deadline(seen).unzip();
        tokio::select! {
            biased;
            // The other end is in the stream, which this pump holds.
            Ok(()) = self.wishes.abort.changed() => Wake::Abort,
            Ok(()) = readers.changed() => Wake::Readers,
            Some(asker) = self.wishes.questions.recv() => Wake::Question(asker),
            // After the terminal event nobody asks again.
            Some(event) = self.events.recv_timed() => Wake::Engine(event),
            Some(error) = clock(until, error) => Wake::Clock(error),
        }
    }

    /// The first moment at which to give up, and why.
    fn deadline(&self, seen: &Seen) -> Option<(Instant, StreamError)> {
        let limit = self.limits.first_to_pass(self.record.arrival(), &seen.milestones);
        let limit = limit.map(|(until, limit, duration)| (until, StreamError::Timeout(limit, duration)));
        // A client that was told to come later has the time that the limits give it.
        let detached = seen.detached.filter(|_| !self.stream.is_promised());
        let grace = detached.map(|since| (since + self.grace, StreamError::Aborted(AbortReason::GraceOver)));
        limit.into_iter().chain(grace).min_by_key(|(until, _)| *until)
    }

    /// Notes whether anybody reads.
    fn count_readers(
        &mut self,
        seen: &mut Seen,
        readers: &mut watch::Receiver<usize>,
    ) -> Result<(), StreamError> {
        let is_detached = *readers.borrow_and_update() == 0;
        if is_detached == seen.detached.is_some() {
            return Ok(());
        }
        if is_detached && !self.stream.is_resumable() {
            return Err(StreamError::Aborted(AbortReason::Left));
        }
        seen.detached = is_detached.then(Instant::now);
        self.events.set_detached(is_detached);
        self.store.set_detached(&self.stream, is_detached);
        Ok(())
    }

    /// Takes what the engine said; returns the end of the reply.
    fn take(&mut self, event: TimedEvent, seen: &mut Seen) -> Result<Option<Event>, StreamError> {
        let TimedEvent { at, event } = event;
        let age = self.events.elapsed(at);
        match &event {
            TokenEvent::Admitted { .. } => seen.milestones.is_admitted = true,
            TokenEvent::Token { .. } => {
                seen.milestones = Milestones { is_admitted: true, last_token: Some(Instant::now()) };
                self.record.token(at, age);
            }
            // The stop id is no text, but was generated all the same.
            TokenEvent::Finished { reason: FinishReason::Stop { .. }, .. } => self.record.token(at, age),
            TokenEvent::Finished { .. } | TokenEvent::Failed(_) => {}
        }
        self.log.set_milestones(seen.milestones);
        let is_last_of_engine = event.is_terminal();
        let Generated { delta, end } = self.generation.take(event)?;
        if let Some(delta) = delta {
            self.record.text();
            self.log.append(delta)?;
        }
        if end.is_some() && !is_last_of_engine {
            // A stop string ended it, of which the engine knows nothing.
            self.events.set_complete();
        }
        Ok(end)
    }
}

/// Resolves at `until`; at once to nothing if there is no such time.
async fn clock(until: Option<Instant>, error: Option<StreamError>) -> Option<StreamError> {
    tokio::time::sleep_until(until?).await;
    error
}
