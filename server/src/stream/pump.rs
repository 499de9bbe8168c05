//! Owns the task that moves one reply from the engine into its log.
//!
//! Invariants: it alone holds the request's [`EventReceiver`], so that dropping it (no reader left, a
//! stop string found, the log full) aborts the request in the engine; and every accepted request ends
//! in the metrics exactly once. Must not know HTTP, JSON or who reads the log.

use glm_engine::{EventReceiver, FinishReason, SequenceError, TokenEvent};

use super::event_log::{EndReason, Event, LogWriter, StreamError, Usage};
use crate::metrics::{Outcome, StreamRecord};
use crate::text::reply::{ReplyStep, ReplyText};

/// What a pump moves.
#[derive(Debug)]
pub struct Pump {
    /// The engine's side.
    pub events: EventReceiver,
    /// How ids become text.
    pub text: ReplyText,
    /// The readers' side.
    pub log: LogWriter,
    /// What the metrics hear.
    pub record: StreamRecord,
    /// Tokens of the prompt.
    pub num_prompt_tokens: usize,
}

impl Pump {
    /// Runs to the end of the reply.
    pub async fn run(mut self) {
        let Some(end) = self.pump().await else {
            self.record.end(Outcome::Abort);
            return;
        };
        if let Event::Error(error) = &end {
            tracing::warn!(%error, "a reply failed");
        }
        self.record.end(match end {
            Event::Finish { reason: EndReason::Length, .. } => Outcome::Length,
            Event::Finish { .. } => Outcome::Stop,
            _ => Outcome::Error,
        });
        self.log.close(end);
    }

    /// Returns the terminal event, or `None` when nobody reads any more.
    async fn pump(&mut self) -> Option<Event> {
        let mut usage = Usage { num_prompt_tokens: self.num_prompt_tokens, num_generated_tokens: 0 };
        if let Err(error) = self.log.append(Event::Role) {
            return Some(Event::Error(error));
        }
        loop {
            let event = tokio::select! {
                biased;
                () = self.log.abandoned() => return None,
                event = self.events.recv() => event,
            };
            let result = match event {
                Some(TokenEvent::Admitted) => Ok(None),
                Some(TokenEvent::Token { token_id }) => {
                    usage.num_generated_tokens += 1;
                    self.record.token();
                    let step = self.text.push(token_id);
                    self.append(step, usage).map(|stopped| stopped.then_some(EndReason::Stop))
                }
                Some(TokenEvent::Finished { reason, num_generated_tokens }) => {
                    usage.num_generated_tokens = num_generated_tokens;
                    let step = self.text.finish();
                    self.append(step, usage).map(|stopped| match reason {
                        FinishReason::Length if !stopped => Some(EndReason::Length),
                        _ => Some(EndReason::Stop),
                    })
                }
                Some(TokenEvent::Failed(error)) => Err(error.into()),
                None => Err(SequenceError::EngineDied.into()),
            };
            match result {
                Ok(None) => {}
                Ok(Some(reason)) => return Some(Event::Finish { reason, usage }),
                Err(error) => return Some(Event::Error(error)),
            }
        }
    }

    fn append(&mut self, step: ReplyStep, usage: Usage) -> Result<bool, StreamError> {
        if !step.text.is_empty() {
            self.record.text();
            self.log.append(Event::Delta { text: step.text, usage })?;
        }
        Ok(step.stopped)
    }
}
