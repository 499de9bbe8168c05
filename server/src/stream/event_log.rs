//! Owns the bounded log of one reply's events, and the readers of it.
//!
//! Invariants: events are only appended; exactly one terminal event ends a log; a reader sees every
//! event once and in order, whenever it comes; when the last reader is gone the writer knows at once.
//! Must not know HTTP, JSON or the engine's channel.

use glm_engine::SequenceError;
use tokio::sync::watch;

/// What a log may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogLimits {
    /// Most events.
    pub max_events: usize,
    /// Most bytes of text.
    pub max_bytes: usize,
}

/// Tokens of a reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub num_prompt_tokens: usize,
    /// Tokens generated so far, the stop id included.
    pub num_generated_tokens: usize,
}

/// Why a reply ended well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndReason {
    /// A stop id or a stop string.
    Stop,
    /// `max_tokens` were generated.
    Length,
}

/// Why a reply ended badly after it was accepted.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum StreamError {
    /// The engine gave up.
    #[error(transparent)]
    Sequence(#[from] SequenceError),
    /// The reply outgrew its log.
    #[error("the reply is larger than the {0} that a reply may have")]
    TooLarge(&'static str),
    /// The task that writes the log ended without a word.
    #[error("the reply was lost inside the server")]
    Lost,
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

#[derive(Debug, Default)]
struct Log {
    events: Vec<Event>,
    num_bytes: usize,
}

/// The writing end; there is one.
#[derive(Debug)]
pub struct LogWriter {
    log: watch::Sender<Log>,
    limits: LogLimits,
}

/// A cursor over the log.
#[derive(Debug)]
pub struct LogReader {
    log: watch::Receiver<Log>,
    next_index: usize,
    ended: bool,
}

/// An empty log and its first reader.
pub fn event_log(limits: LogLimits) -> (LogWriter, LogReader) {
    let (sender, receiver) = watch::channel(Log::default());
    let writer = LogWriter { log: sender, limits };
    let reader = LogReader { log: receiver, next_index: 0, ended: false };
    (writer, reader)
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
            let log = self.log.borrow();
            if log.events.len() >= self.limits.max_events {
                return Err(StreamError::TooLarge("number of events"));
            }
            if log.num_bytes + num_bytes > self.limits.max_bytes {
                return Err(StreamError::TooLarge("number of bytes"));
            }
        }
        self.log.send_modify(|log| {
            log.events.push(event);
            log.num_bytes += num_bytes;
        });
        Ok(())
    }

    /// Appends the terminal event and closes the log.
    pub fn close(self, event: Event) {
        debug_assert!(event.is_terminal());
        self.log.send_modify(|log| log.events.push(event));
    }

    /// Resolves when no reader is left. Cancel-safe.
    pub async fn abandoned(&self) {
        self.log.closed().await;
    }
}

impl LogReader {
    /// The next event; after the terminal one, `None`. Cancel-safe.
    pub async fn next(&mut self) -> Option<Event> {
        if self.ended {
            return None;
        }
        let index = self.next_index;
        let event = match self.log.wait_for(|log| log.events.len() > index).await {
            Ok(log) => log.events[index].clone(),
            Err(_) => Event::Error(StreamError::Lost),
        };
        self.next_index += 1;
        self.ended = event.is_terminal();
        Some(event)
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    const LIMITS: LogLimits = LogLimits { max_events: 3, max_bytes: 4 };
    const USAGE: Usage = Usage { num_prompt_tokens: 1, num_generated_tokens: 1 };

    fn delta(text: &str) -> Event {
        Event::Delta { text: text.to_owned(), usage: USAGE }
    }

    fn finish() -> Event {
        Event::Finish { reason: EndReason::Stop, usage: USAGE }
    }

    #[test]
    fn a_reader_sees_all_events_before_and_after_the_close() {
        let (mut writer, mut reader) = event_log(LIMITS);
        assert_eq!(reader.next().now_or_never(), None, "nothing yet");
        writer.append(Event::Role).unwrap();
        assert_eq!(reader.next().now_or_never(), Some(Some(Event::Role)));
        writer.append(delta("a")).unwrap();
        writer.close(finish());
        let rest: Vec<_> = std::iter::from_fn(|| reader.next().now_or_never().flatten()).collect();
        assert_eq!(rest, [delta("a"), finish()]);
        assert_eq!(reader.next().now_or_never(), Some(None));
    }

    #[test]
    fn a_full_log_refuses_and_still_takes_the_terminal_event() {
        let (mut writer, mut reader) = event_log(LIMITS);
        assert_eq!(writer.append(delta("12345")), Err(StreamError::TooLarge("number of bytes")));
        for _ in 0..3 {
            writer.append(delta("1")).unwrap();
        }
        let full = writer.append(delta("1")).unwrap_err();
        assert_eq!(full, StreamError::TooLarge("number of events"));
        writer.close(Event::Error(full.clone()));
        let events: Vec<_> = std::iter::from_fn(|| reader.next().now_or_never().flatten()).collect();
        assert_eq!(events.last(), Some(&Event::Error(full)));
    }

    #[test]
    fn a_lost_writer_is_an_error_and_a_lost_reader_is_known() {
        let (writer, mut reader) = event_log(LIMITS);
        assert_eq!(writer.abandoned().now_or_never(), None);
        drop(writer);
        assert_eq!(reader.next().now_or_never(), Some(Some(Event::Error(StreamError::Lost))));
        assert_eq!(reader.next().now_or_never(), Some(None));
        let (writer, reader) = event_log(LIMITS);
        drop(reader);
        assert_eq!(writer.abandoned().now_or_never(), Some(()));
    }
}
