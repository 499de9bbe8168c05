//! Owns a reader of a reply's log, which may have time limits of its own.
//!
//! Invariant: a reader takes nothing from the log and ends nothing but itself; as long as it is there, it counts.

use std::sync::Arc;

use tokio::sync::watch;
use tokio::time::Instant;

use super::log::{Log, Shared};
use crate::stream::event::{Event, StreamError};
use crate::stream::time_limits::TimeLimits;

/// An event and where it stands.
#[derive(Debug, Clone, PartialEq)]
pub struct LoggedEvent {
    /// Its place in the log.
    pub index: usize,
    /// When it was appended.
    pub at: Instant,
    /// The event.
    pub event: Event,
}

/// A cursor over the log.
#[derive(Debug)]
pub struct LogReader {
    shared: Arc<Shared>,
    log: watch::Receiver<Log>,
    next_index: usize,
    ended: bool,
    /// Its own, beside those that end the reply.
    limits: TimeLimits,
    since: Instant,
}

impl LogReader {
    pub(super) fn new(shared: Arc<Shared>, next_index: usize) -> Self {
        shared.num_readers.send_modify(|number| *number += 1);
        let (limits, since) = (TimeLimits::default(), Instant::now());
        Self { log: shared.log.subscribe(), shared, next_index, ended: false, limits, since }
    }

    /// The same, with time limits of its own, which are counted from now on.
    pub fn within(mut self, limits: TimeLimits) -> Self {
        (self.limits, self.since) = (limits, Instant::now());
        self
    }

    /// The next event; after the terminal one, `None`. Cancel-safe.
    ///
    /// # Errors
    /// A time limit of this reader passed; it has no more events.
    pub async fn next(&mut self) -> Result<Option<LoggedEvent>, StreamError> {
        if self.ended {
            return Ok(None);
        }
        let index = self.next_index;
        let has_news = |log: &Log| log.readable().len() > index || log.terminal().is_some();
        let waited = self.until(has_news).await;
        self.ended = waited.is_err();
        waited?;
        let Some((at, event)) = self.log.borrow().readable().get(index).cloned() else {
            self.ended = true;
            return Ok(None);
        };
        self.next_index += 1;
        self.ended = event.is_terminal();
        Ok(Some(LoggedEvent { index, at, event }))
    }

    /// Whether there is more for it to read than the terminal event.
    pub fn is_behind(&self) -> bool {
        let log = self.log.borrow();
        !self.ended && log.events.get(self.next_index).is_some_and(|(_, event)| !event.is_terminal())
    }

    /// Reads no further: there is no next event.
    pub fn stop(&mut self) {
        self.ended = true;
    }

    /// Waits until the reply has said something or ended. Cancel-safe.
    ///
    /// # Errors
    /// It ended with this before it said anything, or a time limit of this reader passed.
    pub async fn opening(&mut self) -> Result<(), StreamError> {
        self.until(|log| log.opening().is_some()).await?;
        match self.log.borrow().opening() {
            Some(Event::Error(error)) => Err(error.clone()),
            _ => Ok(()),
        }
    }

    /// Waits until the reply has ended. Cancel-safe.
    ///
    /// # Errors
    /// A time limit of this reader passed.
    pub async fn terminal(&mut self) -> Result<(), StreamError> {
        self.until(|log| log.terminal().is_some()).await
    }

    /// Waits until the log is as it is waited for: that comes before the clock, as in the pump.
    async fn until(&mut self, is_it: impl Fn(&Log) -> bool) -> Result<(), StreamError> {
        loop {
            let first = {
                let log = self.log.borrow_and_update();
                if is_it(&log) {
                    return Ok(());
                }
                self.limits.first_to_pass(self.since, &log.milestones)
            };
            // The sender lives as long as this reader, which holds it.
            let Some((until, limit, duration)) = first else {
                let _ = self.log.changed().await;
                continue;
            };
            if until <= Instant::now() {
                return Err(StreamError::ReaderTimeout(limit, duration));
            }
            // Whichever it is, a change or the time: the log says what it means.
            let _ = tokio::time::timeout_at(until, self.log.changed()).await;
        }
    }
}

impl Drop for LogReader {
    fn drop(&mut self) {
        self.shared.num_readers.send_modify(|number| *number -= 1);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::stream::event::{EndReason, Usage};
    use crate::stream::event_log::{EventLog, LogLimits, event_log};
    use crate::stream::time_limits::{Limit, Milestones};

    const LIMITS: LogLimits = LogLimits { max_events: 3, max_bytes: 4 };

    fn delta(text: &str) -> Event {
        Event::Delta { text: text.to_owned(), usage: Usage::default() }
    }

    fn finish() -> Event {
        Event::Finish {
            reason: EndReason::Stop { token_id: None },
            usage: Usage::default(),
            text_sha256: String::new(),
        }
    }

    #[tokio::test]
    async fn a_reader_with_limits_of_its_own_ends_alone() {
        let limited = |log: &EventLog, limit: &str| log.reader(0).within(TimeLimits::parse(limit).unwrap());
        let gave_up = |limit| Err(StreamError::ReaderTimeout(limit, Duration::from_millis(20)));
        let (mut writer, log) = event_log(LIMITS);
        let mut patient = log.reader(0);
        assert_eq!(limited(&log, "queue=0.02,total=9").opening().await, gave_up(Limit::Queue));
        writer.set_milestones(Milestones { is_admitted: true, last_token: None });
        let mut reader = limited(&log, "queue=0.02,first-token=0.02");
        assert_eq!(reader.next().await, gave_up(Limit::FirstToken).map(|()| None));
        assert_eq!(reader.next().await, Ok(None), "it has no more events");
        assert_eq!(limited(&log, "total=0.02").terminal().await, gave_up(Limit::Total));
        writer.set_milestones(Milestones { is_admitted: true, last_token: Some(Instant::now()) });
        writer.append(delta("a")).unwrap();
        // What is there is in time, however late it is asked for.
        let mut late = limited(&log, "inter-token=0.02,total=0.02");
        tokio::time::sleep(Duration::from_millis(60)).await;
        assert_eq!(late.next().await.unwrap().unwrap().event, delta("a"));
        let late = late.within(TimeLimits::parse("inter-token=0.02").unwrap()).next().await;
        assert_eq!(late, gave_up(Limit::InterToken).map(|()| None));
        // The others never noticed.
        assert_eq!(patient.next().await.unwrap().unwrap().event, delta("a"));
        writer.close(finish());
        assert_eq!(patient.next().await.unwrap().unwrap().event, finish());
    }

    #[tokio::test]
    async fn a_token_without_text_keeps_a_reader_waiting() {
        let second = Duration::from_secs(1);
        let (mut writer, log) = event_log(LIMITS);
        let mut set = |last_token| {
            writer.set_milestones(Milestones { is_admitted: true, last_token: Some(last_token) });
        };
        set(Instant::now() + second);
        let mut reader = log.reader(0).within(TimeLimits::parse("inter-token=0.001").unwrap());
        let token = async { set(Instant::now() + 100 * second) };
        let (still_waits, ()) = tokio::join!(tokio::time::timeout(second * 3 / 2, reader.next()), token);
        assert!(still_waits.is_err(), "{still_waits:?}");
    }
}
