//! ChatGLM2's rounds: one plain text, whose only special tokens are those before it.
//!
//! Invariant: a conversation is questions and answers in turn. What rounds cannot say is refused, as the
//! authors' own server drops it in silence.

use super::format::Format;
use super::message::Role;
use crate::text::TextError;
use crate::text::tokenizer::Tokenizer;

#[derive(Debug)]
pub(super) struct ChatGlm2;

impl Format for ChatGlm2 {
    fn encode(
        &self,
        turns: &[(Role, &str)],
        tokenizer: &Tokenizer,
        ids: &mut Vec<u32>,
    ) -> Result<(), TextError> {
        // The authors' server puts a system message before the last question.
        let (system, first) = match turns {
            [(Role::System, content), ..] => (*content, 1),
            _ => ("", 0),
        };
        let rounds = &turns[first..];
        for (i, (role, _)) in rounds.iter().enumerate() {
            let expected = if i % 2 == 0 { Role::User } else { Role::Assistant };
            if *role != expected {
                let message =
                    "ChatGLM2 knows questions and answers in turn, after at most one system message";
                return Err(TextError::Conversation { index: first + i, message });
            }
        }
        let Some((question, answered)) = rounds.split_last().filter(|_| rounds.len() % 2 == 1) else {
            let message = "ChatGLM2 needs a message of the user at the end";
            return Err(TextError::Conversation { index: turns.len().saturating_sub(1), message });
        };
        let mut text = String::new();
        for (i, round) in answered.chunks_exact(2).enumerate() {
            text += &format!("[Round {}]\n\n问：{}\n\n答：{}\n\n", i + 1, round[0].1, round[1].1);
        }
        text += &format!("[Round {}]\n\n问：{system}{}\n\n答：", answered.len() / 2 + 1, question.1);
        // As a whole, since it was whole when the model was trained: pieces span what was put together.
        tokenizer.encode_into(&text, ids)
    }
}
