//! Owns one reply while it is generated: its text, its usage, and the seal over the text.
//!
//! Invariant: plain state, which depends on what the engine said and on nothing else. Must not know clocks, channels,
//! the log or who reads it.

use glm_engine::{FinishReason, SequenceError, TokenEvent};
use sha2::{Digest, Sha256};

use super::event::{EndReason, Event, Usage};
use super::names::hex;
use crate::text::reply::{ReplyStep, ReplyText};

/// A reply that is being generated.
#[derive(Debug)]
pub struct Generation {
    text: ReplyText,
    usage: Usage,
    seal: Sha256,
}

/// What one event of the engine comes to.
#[derive(Debug, Default, PartialEq)]
pub struct Generated {
    /// Text that it completes.
    pub delta: Option<Event>,
    /// The end of the reply.
    pub end: Option<Event>,
}

impl Generation {
    /// Nothing yet, after a prompt of so many tokens.
    pub fn new(text: ReplyText, num_prompt_tokens: usize) -> Self {
        Self { text, usage: Usage { num_prompt_tokens, ..Usage::default() }, seal: Sha256::new() }
    }

    /// Takes what the engine said. After an end nothing may follow.
    ///
    /// # Errors
    /// The engine gave up.
    pub fn take(&mut self, event: TokenEvent) -> Result<Generated, SequenceError> {
        match event {
            TokenEvent::Admitted { num_cached_tokens } => {
                self.usage.num_cached_tokens = num_cached_tokens;
                Ok(Generated::default())
            }
            TokenEvent::Token { token_id } => {
                self.usage.num_generated_tokens += 1;
                let ReplyStep { text, stopped } = self.text.push(token_id);
                Ok(self.generated(text, stopped.then_some(EndReason::Stop { token_id: None })))
            }
            TokenEvent::Finished { reason, num_generated_tokens } => {
                self.usage.num_generated_tokens = num_generated_tokens;
                let ReplyStep { text, stopped } = self.text.finish();
                let reason = match reason {
                    _ if stopped => EndReason::Stop { token_id: None },
                    FinishReason::Stop { token_id } => EndReason::Stop { token_id: Some(token_id) },
                    FinishReason::Length => EndReason::Length,
                };
                Ok(self.generated(text, Some(reason)))
            }
            TokenEvent::Failed(error) => Err(error),
        }
    }

    fn generated(&mut self, text: String, reason: Option<EndReason>) -> Generated {
        self.seal.update(&text);
        let usage = self.usage;
        let text_sha256 = || hex(&self.seal.clone().finalize());
        let end = reason.map(|reason| Event::Finish { reason, usage, text_sha256: text_sha256() });
        Generated { delta: (!text.is_empty()).then_some(Event::Delta { text, usage }), end }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::sync::Arc;

    use glm_engine::model::manifest::PieceKind;

    use super::*;
    use crate::text::detokenizer::Detokenizer;
    use crate::text::stop::StopMatcher;
    use crate::text::vocabulary::Vocabulary;

    fn generation(stop: &[&str]) -> Generation {
        let vocab: HashMap<String, u32> = ["a", "b", "c"].map(str::to_owned).into_iter().zip(0..).collect();
        let vocabulary = Arc::new(Vocabulary::new(&vocab, PieceKind::Sentencepiece, &[]));
        let stop = StopMatcher::new(stop.iter().map(ToString::to_string).collect());
        Generation::new(ReplyText::new(Detokenizer::new(vocabulary), "", stop, 0), 7)
    }

    fn token(token_id: u32) -> TokenEvent {
        TokenEvent::Token { token_id }
    }

    fn finish(generated: Generated) -> (EndReason, usize, String) {
        match generated.end {
            Some(Event::Finish { reason, usage, text_sha256 }) => {
                (reason, usage.num_generated_tokens, text_sha256)
            }
            other => panic!("{other:?} is no end"),
        }
    }

    fn sha256(text: &str) -> String {
        hex(&Sha256::digest(text))
    }

    #[test]
    fn each_step_says_its_text_and_the_end_seals_all_of_it() {
        let mut reply = generation(&[]);
        assert_eq!(reply.take(TokenEvent::Admitted { num_cached_tokens: 3 }), Ok(Generated::default()));
        let usage = Usage { num_prompt_tokens: 7, num_cached_tokens: 3, num_generated_tokens: 1 };
        let delta = Some(Event::Delta { text: "a".into(), usage });
        assert_eq!(reply.take(token(0)), Ok(Generated { delta, end: None }));
        reply.take(token(1)).unwrap();
        let end = TokenEvent::Finished { reason: FinishReason::Length, num_generated_tokens: 2 };
        assert_eq!(finish(reply.take(end).unwrap()), (EndReason::Length, 2, sha256("ab")));
    }

    #[test]
    fn the_end_says_which_stop_id_it_was() {
        let mut reply = generation(&[]);
        reply.take(token(0)).unwrap();
        let reason = FinishReason::Stop { token_id: 9 };
        let end = reply.take(TokenEvent::Finished { reason, num_generated_tokens: 2 }).unwrap();
        assert_eq!(finish(end), (EndReason::Stop { token_id: Some(9) }, 2, sha256("a")));
    }

    #[test]
    fn a_stop_string_ends_a_reply_that_the_engine_goes_on_with() {
        let mut reply = generation(&["bc"]);
        reply.take(token(0)).unwrap();
        assert_eq!(reply.take(token(1)), Ok(Generated::default()), "it may be the start of one");
        assert_eq!(
            finish(reply.take(token(2)).unwrap()),
            (EndReason::Stop { token_id: None }, 3, sha256("a"))
        );
    }

    #[test]
    fn what_the_engine_gives_up_on_is_an_error() {
        assert_eq!(
            generation(&[]).take(TokenEvent::Failed(SequenceError::EngineDied)),
            Err(SequenceError::EngineDied)
        );
    }
}
