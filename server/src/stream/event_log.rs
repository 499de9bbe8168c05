//! Owns the bounded log of one reply's events, and the readers of it.
//!
//! Invariants: events are only appended; exactly one terminal event ends a log, even if its writer is
//! torn down; a reader sees every event once and in order, whenever it comes and from wherever it
//! starts, and a role not before what follows it; a reader whose own time limits pass ends alone; the
//! writer knows at once how many readers there are. Must not know HTTP, JSON or the engine's channel.

use std::sync::Arc;

use tokio::sync::watch;
use tokio::time::Instant;

use super::event::{Event, StreamError};
use super::time_limits::{Milestones, TimeLimits};

/// What a log may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogLimits {
    /// Most events.
    pub max_events: usize,
    /// Most bytes of text.
    pub max_bytes: usize,
}

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

#[derive(Debug, Default)]
struct Log {
    events: Vec<(Instant, Event)>,
    num_bytes: usize,
    milestones: Milestones,
}

impl Log {
    fn push(&mut self, event: Event) {
        self.events.push((Instant::now(), event));
    }

    fn terminal(&self) -> Option<&Event> {
        self.events.last().map(|(_, event)| event).filter(|event| event.is_terminal())
    }

    /// The first event that a client can't foresee.
    fn opening(&self) -> Option<&Event> {
        self.events.iter().map(|(_, event)| event).find(|event| **event != Event::Role)
    }

    /// What readers may have. A role alone says nothing, and whoever times the first chunk would take it
    /// for the first token.
    fn readable(&self) -> &[(Instant, Event)] {
        if self.opening().is_some() { &self.events } else { &[] }
    }
}

#[derive(Debug)]
struct Shared {
    log: watch::Sender<Log>,
    num_readers: watch::Sender<usize>,
}

/// The writing end; there is one.
#[derive(Debug)]
pub struct LogWriter {
    shared: Arc<Shared>,
    limits: LogLimits,
}

/// The log itself; it makes readers and is none.
#[derive(Debug, Clone)]
pub struct EventLog(Arc<Shared>);

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

/// An empty log.
pub fn event_log(limits: LogLimits) -> (LogWriter, EventLog) {
    let shared =
        Arc::new(Shared { log: watch::Sender::new(Log::default()), num_readers: watch::Sender::new(0) });
    (LogWriter { shared: Arc::clone(&shared), limits }, EventLog(shared))
}

impl LogWriter {
    /// Appends an event that is not terminal.
    ///
    /// # Errors
    /// [`StreamError::TooLarge`]: nothing was appended; the log has room for a terminal event yet.
    pub fn append(&mut self, event: Event) -> Result<(), StreamError> {
        debug_assert!(!event.is_terminal());
        let num_bytes = match &event {
            Event::Delta { text, .. } => text.len(),
            _ => 0,
        };
        {
            let log = self.shared.log.borrow();
            if log.events.len() >= self.limits.max_events {
                return Err(StreamError::TooLarge("number of events"));
            }
            if log.num_bytes + num_bytes > self.limits.max_bytes {
                return Err(StreamError::TooLarge("number of bytes"));
            }
        }
        self.shared.log.send_modify(|log| {
            log.push(event);
            log.num_bytes += num_bytes;
        });
        Ok(())
    }

    /// Notes how far the reply is, for readers with time limits.
    pub fn set_milestones(&mut self, milestones: Milestones) {
        self.shared.log.send_if_modified(|log| {
            let before = std::mem::replace(&mut log.milestones, milestones);
            // A later token only moves a limit back, which its reader finds out when it would have passed.
            before.is_admitted != milestones.is_admitted
                || before.last_token.is_some() != milestones.last_token.is_some()
        });
    }

    /// Appends the terminal event and closes the log.
    pub fn close(self, event: Event) {
        debug_assert!(event.is_terminal());
        self.shared.log.send_modify(|log| log.push(event));
    }

    /// The number of readers, and news of it.
    pub fn readers(&self) -> watch::Receiver<usize> {
        self.shared.num_readers.subscribe()
    }
}

impl Drop for LogWriter {
    /// A log without an end would keep its readers for ever.
    fn drop(&mut self) {
        self.shared.log.send_if_modified(|log| {
            let is_lost = log.terminal().is_none();
            if is_lost {
                log.push(Event::Error(StreamError::Lost));
            }
            is_lost
        });
    }
}

impl EventLog {
    /// A reader whose first event is the one at `index`, which need not be there yet.
    pub fn reader(&self, index: usize) -> LogReader {
        let shared = Arc::clone(&self.0);
        shared.num_readers.send_modify(|number| *number += 1);
        let (limits, since) = (TimeLimits::default(), Instant::now());
        LogReader { log: shared.log.subscribe(), shared, next_index: index, ended: false, limits, since }
    }

    /// The event at `index`, if it is there for readers.
    pub fn get(&self, index: usize) -> Option<Event> {
        self.0.log.borrow().readable().get(index).map(|(_, event)| event.clone())
    }

    /// Whether the reply failed for a reason that another try may not meet; if `unsaid`, before it said anything.
    pub fn is_worth_another_try(&self, unsaid: bool) -> bool {
        self.failure(unsaid).is_some_and(|error| error.may_pass())
    }

    /// Why the reply failed, if it did; if `unsaid`, before it said anything.
    pub fn failure(&self, unsaid: bool) -> Option<StreamError> {
        let log = self.0.log.borrow();
        match if unsaid { log.opening() } else { log.terminal() } {
            Some(Event::Error(error)) => Some(error.clone()),
            _ => None,
        }
    }

    /// Whether nothing follows what is there.
    pub fn has_ended(&self) -> bool {
        self.0.log.borrow().terminal().is_some()
    }

    /// Memory that the events take.
    pub fn num_bytes(&self) -> usize {
        let log = self.0.log.borrow();
        log.num_bytes + log.events.capacity() * size_of::<(Instant, Event)>()
    }
}

impl LogReader {
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

    use futures_util::FutureExt;
    use glm_engine::SequenceError;

    use super::*;
    use crate::stream::event::{AbortReason, EndReason, Usage};
    use crate::stream::time_limits::Limit;

    const LIMITS: LogLimits = LogLimits { max_events: 3, max_bytes: 4 };
    const USAGE: Usage = Usage { num_prompt_tokens: 1, num_cached_tokens: 0, num_generated_tokens: 1 };

    fn delta(text: &str) -> Event {
        Event::Delta { text: text.to_owned(), usage: USAGE }
    }

    fn finish() -> Event {
        Event::Finish { reason: EndReason::Stop, usage: USAGE, text_sha256: String::new() }
    }

    /// What is there, with each place.
    fn read(reader: &mut LogReader) -> Vec<(usize, Event)> {
        let next = || reader.next().now_or_never()?.unwrap();
        std::iter::from_fn(next).map(|logged| (logged.index, logged.event)).collect()
    }

    #[test]
    fn a_reader_sees_all_events_from_wherever_it_starts() {
        let (mut writer, log) = event_log(LIMITS);
        let mut early = log.reader(0);
        assert!(early.next().now_or_never().is_none(), "nothing yet");
        writer.append(Event::Role).unwrap();
        assert_eq!(read(&mut early), [], "a role says nothing");
        assert_eq!((log.get(0), early.opening().now_or_never()), (None, None));
        let mut ahead = log.reader(2);
        writer.append(delta("a")).unwrap();
        assert_eq!(early.opening().now_or_never(), Some(Ok(())));
        assert_eq!(read(&mut ahead), []);
        writer.close(finish());
        assert_eq!(read(&mut early), [(0, Event::Role), (1, delta("a")), (2, finish())]);
        assert_eq!(read(&mut ahead), [(2, finish())]);
        assert_eq!(read(&mut log.reader(1)), [(1, delta("a")), (2, finish())]);
        assert_eq!(log.reader(3).next().now_or_never(), Some(Ok(None)), "beyond the end");
    }

    #[test]
    fn a_full_log_refuses_and_still_takes_the_terminal_event() {
        let (mut writer, log) = event_log(LIMITS);
        assert_eq!(writer.append(delta("12345")), Err(StreamError::TooLarge("number of bytes")));
        for _ in 0..3 {
            writer.append(delta("1")).unwrap();
        }
        let full = writer.append(delta("1")).unwrap_err();
        assert_eq!(full, StreamError::TooLarge("number of events"));
        writer.close(Event::Error(full.clone()));
        assert_eq!(read(&mut log.reader(3)), [(3, Event::Error(full))]);
    }

    #[test]
    fn a_lost_writer_is_an_error_and_readers_are_counted() {
        let (writer, log) = event_log(LIMITS);
        let readers = writer.readers();
        let mut reader = log.reader(0);
        assert_eq!(*readers.borrow(), 1);
        drop(writer);
        assert_eq!(reader.opening().now_or_never(), Some(Err(StreamError::Lost)));
        assert_eq!(read(&mut reader), [(0, Event::Error(StreamError::Lost))]);
        drop(reader);
        assert_eq!(*readers.borrow(), 0);
    }

    #[test]
    fn a_failure_is_worth_another_try_and_a_wanted_or_sure_end_is_not() {
        for (end, expected) in [
            (Event::Error(StreamError::Timeout(Limit::Total, Duration::from_secs(1))), true),
            (Event::Error(StreamError::Sequence(SequenceError::Run(String::new()))), true),
            (Event::Error(StreamError::Aborted(AbortReason::GraceOver)), true),
            (Event::Error(StreamError::Lost), true),
            (Event::Error(StreamError::Aborted(AbortReason::Deleted)), false),
            (Event::Error(StreamError::TooLarge("number of bytes")), false),
            (finish(), false),
        ] {
            let (mut writer, log) = event_log(LIMITS);
            writer.append(delta("a")).unwrap();
            writer.close(end.clone());
            assert_eq!(log.is_worth_another_try(false), expected, "{end:?}");
            assert!(!log.is_worth_another_try(true), "it said something");
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
