//! Owns the bounded log of one reply's events, and the readers of it.
//!
//! Invariants: events are only appended; exactly one terminal event ends a log, even if its writer is
//! torn down; a reader sees every event once and in order, whenever it comes and from wherever it
//! starts, and a role not before what follows it; a reader whose own time limits pass ends alone; the
//! writer knows at once how many readers there are. Must not know HTTP, JSON or the engine's channel.

mod log;
mod reader;

use std::sync::Arc;

use tokio::sync::watch;
use tokio::time::Instant;

use self::log::{Log, Shared};
pub use self::reader::{LogReader, LoggedEvent};
use super::event::{Event, StreamError};
use super::time_limits::Milestones;

/// What a log may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogLimits {
    /// Most events.
    pub max_events: usize,
    /// Most bytes of text.
    pub max_bytes: usize,
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
        LogReader::new(Arc::clone(&self.0), index)
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
        Event::Finish { reason: EndReason::Stop { token_id: None }, usage: USAGE, text_sha256: String::new() }
    }

    /// The events that are there, each with its position.
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
}
